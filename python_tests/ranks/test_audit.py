"""`Audit` in real processes over gloo: with every kind of fault the bits are those of plain DDP without any."""

import contextlib
import json
import logging
import random
from dataclasses import dataclass

import numpy
import pytest
import torch
import torch.distributed as dist
from conftest import SEED
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import draco_ext
from draco_ext import Audit, DecodingError
from draco_ext.testing.local import run_local
from draco_ext.training.audit import convictions
from draco_ext.training.audit.triggers import WINDOW

RANKS = 5
STEPS = 8


def network():
    """Dropout, BatchNorm, and several of DDP's buckets."""
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Linear(20, 61),
        nn.BatchNorm1d(61),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Linear(61, 33),
        nn.ReLU(),
        nn.Linear(33, 10),
    )


def mini_batches(rank, count):
    """Other data on every rank, made with noise from the global generators as augmentation is."""
    generator = torch.Generator().manual_seed(SEED + rank)
    for _ in range(count):
        yield torch.randn(8, 20, generator=generator) + 0.1 * torch.randn(8, 20), torch.arange(8) % 10


@dataclass(frozen=True)
class Fault:
    """Who computes what wrong, in which steps and kinds of pass, and how often in one of them."""

    ranks: tuple[int, ...] = ()
    how: str = "reversed"
    steps: tuple[int, ...] = tuple(range(STEPS))
    kinds: tuple[str, ...] = ("own", "audit", "opinion")
    times: int | None = None  # so many gradients of parameters in a step, then no more

    def adversary(self, rank):
        if rank not in self.ranks:
            return None
        done = {}

        def corrupt(step, gradient, kind):
            if step not in self.steps or kind not in self.kinds:
                return gradient
            done[step] = done.get(step, 0) + 1
            return HOW[self.how](gradient) if self.times is None or done[step] <= self.times else gradient

        return corrupt


def one_bit(gradient):
    changed = gradient.clone()
    changed.view(-1).view(torch.int32)[0] ^= 1
    return changed


HOW = {
    "reversed": lambda g: -3 * g,
    "nan": lambda g: torch.full_like(g, torch.nan),
    "one bit": one_bit,
    "zero": torch.zeros_like,
    "1e-4": lambda g: g + 1e-4 * g.abs().mean() * torch.randn(g.shape, generator=torch.Generator().manual_seed(1)),
}


def train(rank, fault=None, rate=1.0, *, steps=STEPS, s=1, accumulate=1, doubts=(), ddp=None, **options):
    """Parameters, buffers and optimizer state after some steps, and the guard's report; plain DDP without a fault."""
    torch.manual_seed(1000 + rank)
    random.seed(rank)
    numpy.random.seed(rank)
    model = DistributedDataParallel(network(), bucket_cap_mb=0.005, **(ddp or {}))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    loss = nn.CrossEntropyLoss()
    raised, report = None, None
    if fault is None:
        batches = mini_batches(rank, steps * accumulate)
        for _ in range(steps):
            optimizer.zero_grad()
            for i, (x, y) in enumerate([next(batches) for _ in range(accumulate)]):
                with model.no_sync() if i < accumulate - 1 else contextlib.nullcontext():
                    loss(model(x), y).backward()
            optimizer.step()
    else:
        guard = draco_ext.protect(model, Audit(RANKS, s, rate), adversary=fault.adversary(rank), **options)
        try:
            for step in guard.steps(mini_batches(rank, steps * accumulate), accumulate=accumulate):
                if guard.step in doubts and rank == 2:
                    guard.doubt("a test")
                for x, y in step:
                    loss(model(x), y).backward()
                optimizer.step()
        except DecodingError as error:
            raised = str(error)
        report = guard.report()
    state = [p.detach() for p in model.parameters()] + list(model.buffers())
    state += [v for p in model.parameters() for v in optimizer.state[p].values()]
    flat = torch.cat([v.flatten().double() for v in state])
    everybody = [torch.empty_like(flat) for _ in range(RANKS)]
    dist.all_gather(everybody, flat)
    return torch.stack(everybody).numpy(), raised, report


def run(rank, report, scenarios):
    torch.set_num_threads(1)
    logging.getLogger("draco_ext").setLevel(logging.ERROR)
    for name, settings in scenarios.items():
        report((name, *train(rank, **settings)))


def run_all(scenarios):
    """Results by name: state (ranks, elements), what was raised, report."""
    return {name: rest for name, *rest in run_local(run, RANKS, scenarios)}


def same_bits(first, second):
    return numpy.array_equal(first.view(numpy.int64), second.view(numpy.int64))


# ------------------------------------------------------------------------------------------------ faults

KINDS = {
    "none": Fault(),
    "persistent": Fault((2,)),
    "persistent, begins later": Fault((0,), steps=tuple(range(5, STEPS))),
    "nan": Fault((4,), "nan"),
    "one bit": Fault((1,), "one bit"),
    "transient": Fault((3,), steps=(3,), kinds=("own",), times=1),
    "transient in step 0": Fault((3,), steps=(0,), kinds=("own",), times=1),
    "intermittent": Fault((1,), steps=(1, 3, 5, 7), kinds=("own",), times=1),
    "wrong auditor": Fault((2,), kinds=("audit",), steps=(4, 5)),
    "wrong in opinions": Fault((2,), kinds=("opinion",)),
    "zero": Fault((2,), "zero", steps=(2,)),
}
LESS_OFTEN = ("nan", "transient in step 0", "zero")  # only in the long layer


@pytest.mark.parametrize(
    ("accumulate", "ddp"),
    [
        (1, {}),
        pytest.param(1, {"broadcast_buffers": False}, marks=pytest.mark.long),
        pytest.param(3, {"gradient_as_bucket_view": True}, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_every_kind_of_fault_changes_nothing(accumulate, ddp, long):
    common = {"accumulate": accumulate, "ddp": ddp}
    kinds = {name: fault for name, fault in KINDS.items() if long or name not in LESS_OFTEN}
    results = run_all({"plain": common, **{name: {**common, "fault": fault} for name, fault in kinds.items()}})
    plain = results["plain"][0]
    for name, fault in kinds.items():
        state, raised, report = results[name]
        assert raised is None, name
        assert same_bits(state, plain), name
        found = report.audit
        assert found.audited == STEPS
        who = set() if name in ("none", "wrong in opinions") else set(fault.ranks)
        assert {dispute.rank for dispute in found.disputes} == who == set(report.suspects), name
        persistent = name in ("persistent", "persistent, begins later", "nan", "one bit", "zero")
        assert {dispute.persistent for dispute in found.disputes[:1]} == ({persistent} if who else set()), name
        convicted = persistent or name == "intermittent"
        assert set(found.convicted) == (who if convicted else set()), name
        for rank in range(RANKS):
            if rank not in found.convicted:
                assert found.last_clean_audit[rank] == STEPS - 1, name
        assert report.failed_steps == ()
    begins = results["persistent, begins later"][2].audit
    assert begins.convicted == {0: 5}
    assert begins.last_clean_audit[0] == 4
    intermittent = results["intermittent"][2].audit
    assert [dispute.step for dispute in intermittent.disputes] == [1, 3, 5]  # then its part is another's
    clean, substituted = results["none"][2].audit, results["persistent"][2].audit
    assert clean.passes == pytest.approx(2 * STEPS + 1)  # the first step is rehearsed
    assert substituted.passes == pytest.approx(2 * STEPS + 3)  # opinions on two parts, and the own pass again


def test_only_audited_steps_are_put_right_below_a_rate_of_1():
    """A later fault is found in the first audited step behind, and the run without faults is plain DDP."""
    steps, begin = 12, 5
    audit = Audit(RANKS, 1, 0.2)
    audited = [step for step in range(steps) if audit.is_audited(0, step)]
    found_in = next(step for step in audited if step >= begin)
    assert begin < found_in < steps - 1  # otherwise the seed shows nothing
    results = run_all(
        {
            "plain": {"steps": steps},
            "none": {"fault": Fault(), "rate": 0.2, "steps": steps},
            "transient in an audited step": {
                "fault": Fault((1,), steps=(audited[0],), kinds=("own",), times=1),
                "rate": 0.2,
                "steps": steps,
            },
            "persistent": {
                "fault": Fault((1,), "one bit", steps=tuple(range(begin, steps))),
                "rate": 0.2,
                "steps": steps,
            },
        }
    )
    plain = results["plain"][0]
    for name in ("none", "transient in an audited step"):
        assert same_bits(results[name][0], plain), name
        assert results[name][2].audit.audited == len(audited)
    found = results["persistent"][2].audit
    assert found.convicted == {1: found_in}
    assert [dispute.step for dispute in found.disputes] == [found_in]
    assert found.last_clean_audit[1] == max([step for step in audited if step < begin], default=None)
    assert found.audited == len([step for step in audited if step < found_in]) + steps - found_in  # substituted since
    assert not same_bits(results["persistent"][0], plain)  # the updates before were wrong


def test_doubts_and_triggers_have_a_step_audited():
    """Without any coin: what another tool has seen, and a conspicuous gradient, both put right."""
    steps, never = 6, 1e-9
    later = WINDOW + 2  # when the spread of norms is known
    own = {"kinds": ("own",)}
    results = run_all(
        {
            "plain": {"steps": steps},
            "doubt": {"fault": Fault(), "rate": never, "doubts": (4,), "steps": steps},
            "doubt and fault": {
                "fault": Fault((1,), steps=(4,), **own, times=1),
                "rate": never,
                "doubts": (4,),
                "steps": steps,
            },
            "nan": {"fault": Fault((3,), "nan", steps=(4,), **own, times=1), "rate": never, "steps": steps},
            # All 8 parameters of one backward pass.
            "zero": {"fault": Fault((3,), "zero", (later,), **own, times=8), "rate": never, "steps": later + 2},
            "plain, for longer": {"steps": later + 2},
        }
    )
    for name, (plain, step, rank, reason) in {
        "doubt": ("plain", 4, 2, "a test"),
        "doubt and fault": ("plain", 4, 2, "a test"),
        "nan": ("plain", 4, 3, "values that are not finite"),
        "zero": ("plain, for longer", later, 3, "the norm of bucket"),
    }.items():
        state, raised, report = results[name]
        assert raised is None
        assert same_bits(state, results[plain][0]), name
        triggers = [trigger for trigger in report.audit.triggers if trigger.step == step]
        assert any(trigger.rank == rank and reason in trigger.reason for trigger in triggers), name
        assert report.audit.audited == 2 + len({trigger.step for trigger in report.audit.triggers})  # 0 and 1, too
        accused = {"doubt": [], "doubt and fault": [1]}.get(name, [3])
        assert [(d.rank, d.persistent) for d in report.audit.disputes] == [(rank, False) for rank in accused], name


def test_more_wrong_ranks_than_the_audit_corrects():
    both = Fault((1, 3), steps=(4,))
    results = run_all(
        {
            "plain": {"steps": 4},
            "raise": {"fault": both},
            "skip": {"fault": both, "on_failure": "skip", "steps": 5},
            "two of five": {"fault": both, "s": 2, "steps": 4},
        }
    )
    plain = results["plain"][0]
    state, raised, report = results["raise"]
    assert "no gradient in step 4" in raised
    assert same_bits(state, plain)  # no update since
    assert report.failed_steps == (4,)
    state, raised, report = results["skip"]
    assert raised is None
    assert report.failed_steps == (4,)
    assert same_bits(state, plain)
    assert same_bits(results["two of five"][0], plain)


def test_what_happens_on_conviction():
    persistent = Fault((2,), steps=tuple(range(4, STEPS)))
    results = run_all(
        {
            "plain": {"steps": 4},
            "raise": {"fault": persistent, "on_conviction": "raise"},
            "drop": {"fault": persistent, "on_conviction": "drop"},
            "without": {"fault": Fault((2,), "zero", steps=tuple(range(4, STEPS))), "on_conviction": "drop"},
        }
    )
    state, raised, _ = results["raise"]
    assert "rank 2 on " in raised
    assert "convicted" in raised
    assert same_bits(state, results["plain"][0])
    # What a dropped rank computes has no influence: another fault of it leads to the same bits.
    assert same_bits(results["drop"][0], results["without"][0])
    found = results["drop"][2].audit
    assert found.convicted == {2: 4}
    parameters = sum(p.numel() for p in network().parameters())
    assert all(same_bits(row[:parameters], results["drop"][0][0, :parameters]) for row in results["drop"][0])


def probation(rank, report, scenarios):
    convictions.PROBATION = 4
    run(rank, report, scenarios)


def test_a_convicted_rank_is_acquitted_and_convicted_again():
    fault = Fault((2,), steps=(1, 6))
    results = {name: rest for name, *rest in run_local(probation, RANKS, {"plain": {}, "fault": {"fault": fault}})}
    state, raised, report = results["fault"]
    assert raised is None
    assert same_bits(state, results["plain"][0])
    assert report.audit.acquitted == {2: [5]}
    assert report.audit.convicted == {2: 6}
    assert [(d.step, d.persistent) for d in report.audit.disputes] == [(1, True), (6, True)]


def test_ranks_that_are_not_equal_in_bits():
    """With a tolerance: rounding noise on one rank is no fault, and an error of 1e-2 in one parameter is."""
    noise = Fault((0,), "1e-4")
    results = run_all(
        {
            "noise": {"fault": noise, "rtol": 3e-2},
            "noise, bits": {"fault": noise},
            "fault": {"fault": Fault((3,), "reversed", steps=(5,), kinds=("own",), times=1), "rtol": 3e-2},
            "none": {"fault": Fault(), "rtol": 3e-2},
            "plain": {},
        }
    )
    assert results["noise"][2].audit.disputes == []
    assert 0 < results["noise"][2].audit.sees < 3e-2
    assert {dispute.rank for dispute in results["noise, bits"][2].audit.disputes} == {0}
    assert same_bits(results["none"][0], results["plain"][0])
    assert same_bits(results["fault"][0], results["plain"][0])
    assert [(d.step, d.rank, d.persistent) for d in results["fault"][2].audit.disputes] == [(5, 3, False)]


def test_ledger_and_callback(tmp_path):
    path = tmp_path / "bad.jsonl"
    run_all({"fault": {"fault": Fault((2,), steps=(3,)), "ledger": str(path), "steps": 5}})
    (line,) = [json.loads(text) for text in path.read_text().splitlines()]
    assert (line["rank"], line["step"], line["kind"]) == (2, 3, "persistent")
