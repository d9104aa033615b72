"""Faults that one would choose who has read `Audit`'s source: up to s ranks change no bit, more make the step fail."""

import dataclasses
import functools
import logging

import pytest
import torch
import torch.distributed as dist
from test_audit_compose import (
    BUCKETS,
    LOCAL,
    UNUSED,
    Branches,
    Case,
    Fault,
    Mlp,
    Probe,
    chosen,
    flip_one_bit,
    gather,
    loss,
    loss_of_chosen,
    pairs,
    run,
    times_minus_three,
)

from draco_ext import Audit, DecodingError
from draco_ext.testing.local import run_local

GHOST = 10  # a branch with this added to its number is computed, and has no influence


class Routed(Branches):
    """Branches whose choice goes wrong where activations do."""

    def forward(self, x, which):
        which = self.probe(which)
        for i in which[which >= GHOST].tolist():
            x = x + 0.0 * self.branches[i - GHOST](x[:, :5]).sum()
        return super().forward(x, which[which < GHOST])


def _flip_a_weight(model, step):
    """One bit of a parameter of rank 1 changes behind the optimizer."""
    if Probe.fault is not None and dist.get_rank() == 1 and step == 1:
        with torch.no_grad():
            weight = next(model.parameters())
            weight.copy_(flip_one_bit(weight))


def _note_buffers(noted, model, step):
    """Note whether all buffers are finite."""
    noted.append(all(bool(buffer.isfinite().all()) for buffer in model.buffers()))


def _note_unused(noted, model, step):
    """Note whether the branches are unused."""
    noted.append(all(parameter.grad is None for parameter in model.module.branches.parameters()))


def _route(other):
    return lambda x: other(x) if x.dtype == torch.int64 else x


PLAIN = Case(Mlp, pairs, loss, ddp=BUCKETS)
SMALL = Case(lambda: Mlp(norm=False), lambda rank: pairs(rank, 3), loss, ddp=BUCKETS)
BRANCHES = Case(Routed, chosen, loss_of_chosen, ddp=UNUSED | BUCKETS)
DROP = {"on_conviction": "drop"}
DROPPED = Case(Mlp, pairs, loss, options=DROP, between=_note_buffers)
NO_BRANCH = Case(
    Routed,
    lambda rank: ((x, torch.arange(0), y) for x, y in pairs(rank)),
    loss_of_chosen,
    ddp=UNUSED,
    options=DROP,
    between=_note_unused,
)


def always(change=times_minus_three):
    return lambda: Fault(change)


def when(function, change=times_minus_three, **options):
    return lambda: Fault(change, function, **options)


def only(*kinds):
    return when(lambda step, number, kind: kind in kinds)


def only_in_step_2(*kinds):
    return when(lambda step, number, kind: step == 2 and kind in kinds)


def never():
    return Fault(times_minus_three, lambda *_: False)


def minus_zero(g):
    return torch.where(g == 0, -g, g)


# name -> case, faults by rank
TWO_OF_FIVE = {
    "two persistent": (PLAIN, {1: always(), 3: always(flip_one_bit)}),
    "two alike": (PLAIN, {0: always(), 1: always()}),
    "one convicted, another later": (PLAIN, {2: always(), 4: when(lambda step, number, kind: step == 3)}),
    "one convicted, another once": (
        PLAIN,
        {2: always(), 0: when(lambda step, number, kind: step == 3 and number == 2)},
    ),
    "owner and opinions": (PLAIN, {1: only("own"), 2: only("opinion")}),
    "owner and auditor": (PLAIN, {0: only("own"), 1: only("audit")}),
    "audits and opinions": (PLAIN, {3: only("audit"), 4: only("opinion")}),
    "own pass again": (
        PLAIN,
        {
            0: when(lambda step, number, kind: step == 2 and number == 2 and kind == "own"),
            1: when(lambda step, number, kind: step == 2 and number > 2 and kind == "own"),
        },
    ),
    "alternating": (
        PLAIN,
        {
            1: when(lambda step, number, kind: step % 2 == 0, torch.zeros_like),
            2: when(lambda step, number, kind: step % 2 == 1, lambda g: g * torch.nan),
        },
    ),
    "forward, both": (
        PLAIN,
        {
            0: when(lambda *_: True, lambda x: x * 2, forward=True),
            4: when(lambda step, *_: step > 1, lambda x: x + torch.nan, forward=True),
        },
    ),
    "forward, own buffers": (
        Case(Mlp, pairs, loss, ddp=LOCAL),
        {0: when(lambda *_: True, lambda x: x * 2, forward=True), 2: always(minus_zero)},
    ),
    "other branches": (
        BRANCHES,
        {
            0: when(lambda *_: True, _route(lambda w: (w + 1) % 3), forward=True),
            3: when(lambda *_: True, _route(lambda w: w[:0]), forward=True),
        },
    ),
    "branches without influence": (
        BRANCHES,
        {rank: when(lambda *_: True, _route(lambda w: torch.arange(3) + GHOST), forward=True) for rank in (1, 2)},
    ),
    "a flipped weight": (PLAIN, {1: never}),
    "a flipped weight, and a fault": (PLAIN, {1: never, 2: always()}),
}
FLIPPED = {"a flipped weight", "a flipped weight, and a fault"}
WHOEVER_IT_IS = {
    f"rank {rank}, step {step}, {kind}": (
        SMALL,
        {rank: when(lambda t, number, k, step=step, kind=kind: (t, k) == (step, kind), flip_one_bit)},
    )
    for rank in range(3)
    for step in range(3)
    for kind in ("own", "audit")
}
# The same of five ranks, in opinions too, which another rank's wrong gradient causes.
WHOEVER_OF_FIVE = {
    f"rank {rank}, step {step}, {kind}": (
        SMALL,
        {
            rank: when(lambda t, number, k, step=step, kind=kind: (t, k) == (step, kind), flip_one_bit),
            (rank + 1 + step) % 5: when(lambda t, number, k, step=step: (t, k) == (step, "own")),
        },
    )
    for rank in range(5)
    for step in range(3)
    for kind in ("own", "audit", "opinion")
}
# With on_failure="skip": the last step fails, the others do not.
TOO_MANY = {
    "two owners": {0: only_in_step_2("own"), 1: only_in_step_2("own")},
    "owner and auditor": {1: only_in_step_2("own"), 2: only_in_step_2("audit")},
    "owner and opinions": {0: only_in_step_2("own"), 2: only_in_step_2("opinion")},
}


def _attack(rank, report, audit, table):
    _quiet()
    plain = {}
    for name, (case, faults) in globals()[table].items():
        if id(case) not in plain:
            plain[id(case)] = run(rank, case).bits
        expected = plain[id(case)]
        if name in FLIPPED:
            case = dataclasses.replace(case, between=_flip_a_weight)
        result = run(rank, case, audit, faults[rank]() if rank in faults else None)
        report((name, expected, result.bits, result.report))


def _fail(rank, report, audit):
    _quiet()
    case = Case(lambda: Mlp(norm=False), lambda rank: pairs(rank, 3), loss)
    before = run(rank, dataclasses.replace(case, data=lambda rank: pairs(rank, 2))).bits
    skipping = dataclasses.replace(case, options={"on_failure": "skip"})
    for name, faults in TOO_MANY.items():
        skipped = run(rank, skipping, audit, faults[rank]() if rank in faults else None)
        try:
            error = None
            run(rank, case, audit, faults[rank]() if rank in faults else None)
        except DecodingError as caught:
            error = str(caught)
        report((name, before, skipped.bits, gather(error)))


def _drop(rank, report, audit):
    _quiet()
    wrong = [lambda x: x * torch.nan, _route(lambda w: torch.arange(3) + GHOST)]
    for case, change in zip((DROPPED, NO_BRANCH), wrong, strict=True):
        noted = []
        case = dataclasses.replace(case, between=functools.partial(case.between, noted))
        result = run(rank, case, audit, Fault(change, forward=True) if rank == 0 else None)
        report((gather(noted), result.report))


def _quiet():
    torch.set_num_threads(1)
    logging.getLogger("draco_ext").setLevel(logging.ERROR)


@pytest.mark.long
def test_two_ranks_of_five():
    for name, expected, bits, report in run_local(_attack, 5, Audit(5, 2, 1.0), "TWO_OF_FIVE"):
        assert bits == expected, name
        wrong = TWO_OF_FIVE[name][1].items()
        assert {dispute.rank for dispute in report.disputes} == {rank for rank, make in wrong if make is not never}, (
            name
        )


@pytest.mark.parametrize(
    ("audit", "table"),
    [
        (Audit(3, 1, 1.0), "WHOEVER_IT_IS"),
        pytest.param(Audit(5, 2, 1.0), "WHOEVER_OF_FIVE", marks=pytest.mark.long),
    ],
    ids=str,
)
def test_any_rank_in_any_step_and_kind_of_pass(audit, table):
    """One wrong bit in every gradient of a pass; of five ranks two are wrong in the same step."""
    for name, expected, bits, report in run_local(_attack, audit.workers, audit, table):
        assert bits == expected, name
        step = name.split(", ")[1]
        assert {(dispute.rank, f"step {dispute.step}") for dispute in report.disputes} == {
            (rank, step) for rank in globals()[table][name][1]
        }, name


def test_more_than_s_wrong_ranks_change_nothing():
    """The step fails on all ranks, and with "skip" parameters and optimizer are those from before."""
    for name, before, skipped, errors in run_local(_fail, 3, Audit(3, 1, 1.0)):
        for rank, (parameters, _, optimizer, *_) in enumerate(skipped):
            assert (parameters, optimizer) == (before[rank][0], before[rank][2]), name
        assert all("no gradient in step 2" in str(error) for error in errors), name
        assert len(set(errors)) == 1, name


def test_a_dropped_rank_leaves_nothing_but_its_absence():
    """Neither its buffers, though DistributedDataParallel gives rank 0's to all, nor parameters that it alone uses."""
    for right, report in run_local(_drop, 3, Audit(3, 1, 1.0)):
        assert report.convicted == {0: 0}
        assert all(all(of_rank) for of_rank in right), right
