"""`Audit` in the loops of scripts: mistakes that show early, several models, copies, memory of healthy ranks."""

import copy
import gc
import itertools
import logging
import re

import pytest
import torch
from test_audit_compose import (
    BAD,
    BUCKETS,
    Case,
    Fault,
    Mlp,
    accumulated,
    bits,
    gather,
    loss,
    pairs,
    plain_steps,
    run,
    seed_all,
    times_minus_three,
)
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import draco_ext
from draco_ext import Audit
from draco_ext.testing.local import run_local
from draco_ext.training.audit import gradients

RARELY = Audit(3, 1, 1e-9)  # the first steps alone
ALWAYS = Audit(3, 1, 1.0)
BATCHES = 6


def _quiet():
    torch.set_num_threads(1)
    logging.getLogger("draco_ext").setLevel(logging.ERROR)


# ------------------------------------------------------------------------------------------------ wrong loops


def other_mini_batches(rank, model, optimizer, guard):
    """Compute with what is drawn within the step."""
    batches = pairs(rank, 100)
    for step in guard.steps(pairs(rank, BATCHES)):
        for _ in step:
            loss(model, next(batches)).backward()
        optimizer.step()


def clips_each_mini_batch(rank, model, optimizer, guard):
    for step in guard.steps(pairs(rank, 2 * BATCHES), accumulate=2):
        for mini_batch in step:
            loss(model, mini_batch).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        optimizer.step()


def draws_the_second_mini_batch(rank, model, optimizer, guard):
    """Computes with the first mini-batch that it gets: an audit of the first one alone would not see the mistake."""
    batches = pairs(rank, 100)
    for step in guard.steps(pairs(rank, 2 * BATCHES), accumulate=2):
        for i, mini_batch in enumerate(step):
            loss(model, next(batches) if i % 2 else mini_batch).backward()
        optimizer.step()


def _steps(rank, model, guard, update):
    """Make steps, each with an update of one's own."""
    for i, step in enumerate(guard.steps(pairs(rank, BATCHES))):
        for mini_batch in step:
            loss(model, mini_batch).backward()
        update(i)


def accumulates_over_steps(rank, model, optimizer, guard):
    _steps(rank, model, guard, lambda i: (optimizer.step(), optimizer.zero_grad()) if i % 2 else None)


def accumulates_from_a_later_step_on(rank, model, optimizer, guard):
    _steps(rank, model, guard, lambda i: optimizer.step() if i < 3 or i % 2 == 1 else None)


def sets_gradients_to_zero(rank, model, optimizer, guard):
    _steps(rank, model, guard, lambda i: optimizer.zero_grad(set_to_none=bool(i % 2)))


def clips_and_leaves_the_update_out(rank, model, optimizer, guard):
    _steps(rank, model, guard, lambda i: nn.utils.clip_grad_norm_(model.parameters(), 1.0))


def updates_by_hand(rank, model, optimizer, guard):
    @torch.no_grad()
    def update(i):
        for parameter in model.parameters():
            parameter -= 0.1 * parameter.grad

    _steps(rank, model, guard, update)


def updates_compiled(rank, model, optimizer, guard):
    update = torch.compile(optimizer.step, backend="aot_eager")
    _steps(rank, model, guard, lambda i: update())


def overflows(rank, model, optimizer, guard):
    """A GradScaler leaves updates out, and the loop relies on steps that begin without gradients."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
    for step in guard.steps(pairs(rank, BATCHES)):
        for mini_batch in step:
            (scaler.scale(loss(model, mini_batch)) * 1e10).backward()
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() < 2.0**120


LOST = r"RuntimeError: step {0} would lose the gradients of step {1}, .* guard.steps\(loader, accumulate=...\)"
LOOPS = {
    other_mini_batches: "DecodingError: no gradient in step 0: .*the loop over a step must",
    clips_each_mini_batch: "DecodingError: no gradient in step 0: .*the loop over a step must",
    draws_the_second_mini_batch: "DecodingError: no gradient in step 0: .*the loop over a step must",
    accumulates_over_steps: LOST.format(1, 0),
    accumulates_from_a_later_step_on: LOST.format(5, 4),
    sets_gradients_to_zero: None,
    clips_and_leaves_the_update_out: None,
    updates_by_hand: None,
    updates_compiled: None,
    overflows: None,
}


def _loops(rank, report, functions):
    _quiet()
    for function in functions:
        torch.manual_seed(5)
        model = DistributedDataParallel(Mlp(norm=False), **BUCKETS)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        guard = draco_ext.protect(model, RARELY)
        seed_all(rank)
        error = None
        try:
            function(rank, model, optimizer, guard)
        except RuntimeError as caught:
            error = f"{type(caught).__name__}: {caught}"
        report((function.__name__, gather(error), guard.report().audit.audited))


def test_mistakes_in_the_loop_show_at_once(long):
    """At a rate at which no coin falls; and right loops are not refused."""
    loops = {function: expected for function, expected in LOOPS.items() if long or function is not updates_compiled}
    results = {name: rest for name, *rest in run_local(_loops, 3, list(loops))}
    for function, expected in loops.items():
        errors, audited = results[function.__name__]
        if expected is None:
            assert (errors, audited) == ([None] * 3, 2), function.__name__
        else:
            assert all(re.match(expected, error or "") for error in errors), (function.__name__, errors)


# ------------------------------------------------------------------------------------------------ resume


def _resume(rank, report):
    _quiet()
    state = None
    for _ in range(3):
        torch.manual_seed(5)
        model = DistributedDataParallel(Mlp())
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        guard = draco_ext.protect(model, RARELY)
        if state is not None:
            guard.load_state_dict(state)
        _steps(rank, model, guard, lambda i, optimizer=optimizer: optimizer.step())
        state = guard.state_dict()
        report((guard.step, guard.report().audit.audited))


def test_the_first_steps_are_not_audited_again_after_a_checkpoint():
    assert list(run_local(_resume, 3)) == [(BATCHES, 2), (2 * BATCHES, 2), (3 * BATCHES, 2)]


# ------------------------------------------------------------------------------------------------ two models


def _gan(rank, audit, faults):
    """Train two models in turn, each with a guard of its own; return digests of both models, and the reports."""
    torch.manual_seed(5)
    nets = (
        nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 20)),
        nn.Sequential(nn.Linear(20, 16), nn.Linear(16, 1)),
    )
    generator, critic = models = [DistributedDataParallel(net, **BUCKETS) for net in nets]
    optimizers = [torch.optim.Adam(model.parameters(), 1e-2) for model in models]
    guards = [
        audit and draco_ext.protect(model, audit, adversary=fault and fault.gradient)
        for model, fault in zip(models, faults, strict=True)
    ]
    seed_all(rank)

    def with_made():
        for x, _ in pairs(rank, BATCHES):
            with torch.no_grad():
                made = generator(torch.randn(8, 8))
            yield x, made

    loaders = [torch.randn(8, 8) for _ in range(BATCHES)], with_made()
    steps = [
        plain_steps(model, loader, 1) if guard is None else guard.steps(loader)
        for model, guard, loader in zip(models, guards, loaders, strict=True)
    ]
    for of_critic in steps[1]:
        optimizers[1].zero_grad()
        for x, made in of_critic:
            (nn.functional.softplus(-critic(x)) + nn.functional.softplus(critic.module(made))).mean().backward()
        optimizers[1].step()
        optimizers[0].zero_grad()
        critic.requires_grad_(False)  # it only passes gradients on to the generator
        for z in next(steps[0]):
            nn.functional.softplus(-critic.module(generator(z))).mean().backward()
        critic.requires_grad_(True)
        optimizers[0].step()
    reports = [guard and guard.report().audit for guard in guards]
    return gather([bits(list(model.parameters())) for model in models]), reports


def _gans(rank, report):
    _quiet()
    report(_gan(rank, None, (None, None)))
    for audit, bad in ((RARELY, {}), (RARELY, {1: 1}), (ALWAYS, {0: 1, 1: 2})):  # by model
        faults = [Fault(times_minus_three) if bad.get(i) == rank else None for i in range(2)]
        report((bad, *_gan(rank, audit, faults)))


def test_two_models_with_a_guard_each_in_one_process():
    """The loop of a GAN; a rank that is bad in one model is convicted there alone."""
    results = run_local(_gans, 3)
    plain, _ = next(results)
    for bad, found, reports in results:
        assert found == plain, bad
        for i, report in enumerate(reports):
            assert set(report.convicted) == ({bad[i]} if i in bad else set()), bad


# ------------------------------------------------------------------------------------------------ copies


def average(model):
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)


def _copies(rank, report):
    _quiet()
    x, y = next(pairs(rank, 1))
    for code in (ALWAYS, draco_ext.RepetitionCode(3, 1)):
        torch.manual_seed(5)
        model = DistributedDataParallel(Mlp())
        guard = draco_ext.protect(model, code)
        copied = copy.deepcopy(model)
        assert type(copied) is DistributedDataParallel
        # It computes with its own parameters, in training, outside of any step, and averages as plain DDP does.
        with torch.no_grad():
            for parameter in copied.parameters():
                parameter.mul_(0.5)
        plain = DistributedDataParallel(copy.deepcopy(copied.module))
        found = []
        for each in (copied, plain):
            torch.manual_seed(rank)
            nn.functional.cross_entropy(each(x), y).backward()
            found.append(bits([parameter.grad for parameter in each.parameters()]))
        assert found[0] == found[1]
        assert all(parameter.grad is None for parameter in model.parameters())
        # It is no more guarded, but may be.
        again = draco_ext.protect(copied, code)
        with pytest.raises(ValueError, match="model must not be guarded already"):
            draco_ext.protect(copied, code)
        assert again is not guard
    report(None)


def test_a_copy_of_a_protected_model_is_plain():
    assert list(run_local(_copies, 3)) == [None]


def _average(rank, report):
    """An average of the model, which is made after `protect`, with a fault and without an audit."""
    _quiet()
    for audit in (None, RARELY, ALWAYS):
        torch.manual_seed(5)
        model = DistributedDataParallel(Mlp(), **BUCKETS)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        fault = Fault(times_minus_three) if rank == BAD else None
        guard = audit and draco_ext.protect(model, audit, adversary=fault and fault.gradient)
        averaged = average(model)
        seed_all(rank)
        loader = pairs(rank, BATCHES)
        for step in plain_steps(model, loader, 1) if guard is None else guard.steps(loader):
            optimizer.zero_grad()
            for mini_batch in step:
                loss(model, mini_batch).backward()
            optimizer.step()
            averaged.update_parameters(model)
        averaged.eval()
        report((gather(bits(list(averaged.parameters()))), bits(averaged(torch.ones(2, 20)))))


def test_an_average_of_the_weights_made_after_protect():
    plain, *audited = run_local(_average, 3)
    assert len(audited) == 2
    assert all(found == plain for found in audited)


# ------------------------------------------------------------------------------------------------ hand-overs in chunks


def _chunks(rank, report):
    """Gradients are handed over in several messages, and the first layer is larger than a message may be."""
    _quiet()
    gradients.CHUNK = 300
    case = Case(Mlp, accumulated, loss, ddp=BUCKETS, accumulate=3)
    report(run(rank, case).bits)
    for fault in (lambda step, number, kind: True, lambda step, number, kind: step >= LATER, lambda *_: False):
        result = run(rank, case, Audit(3, 1, RATE), Fault(times_minus_three, fault) if rank == BAD else None)
        report((result.bits, result.report))


RATE = 0.1  # of mini-batches, so 0.3 of steps
LATER = next(step for step in range(2, 5) if Audit(3, 1, RATE).is_audited(0, step, 3))


def test_several_mini_batches_below_a_rate_of_1_and_hand_overs_in_chunks():
    """A persistent fault is found in the first step, or in the audited one in which it begins; then substituted."""
    plain, *results = run_local(_chunks, 3)
    assert all(found == plain for found, _ in results)
    assert [report.convicted for _, report in results] == [{BAD: 0}, {BAD: LATER}, {}]


# ------------------------------------------------------------------------------------------------ optimizer state


def _flipped_state(rank, report):
    """The sign of a moment of AdamW changes on one rank; with another fault, too."""
    _quiet()
    for watched, fault in ((None, None), (True, None), (True, times_minus_three), (False, None)):
        torch.manual_seed(5)
        model = DistributedDataParallel(Mlp(), **BUCKETS)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        guard = None
        if watched is not None:
            bad = fault is not None and rank == BAD
            adversary = Fault(fault, lambda step, number, kind: step == 3).gradient if bad else None
            guard = draco_ext.protect(model, Audit(3, 1, 0.5), adversary=adversary, check_state_every=1)
            if watched:
                guard.watch(optimizer)
        seed_all(rank)
        loader = pairs(rank, BATCHES)
        for i, step in enumerate(plain_steps(model, loader, 1) if guard is None else guard.steps(loader)):
            optimizer.zero_grad()
            for mini_batch in step:
                loss(model, mini_batch).backward()
            optimizer.step()
            if i == 2 and rank == 2 and guard is not None:
                optimizer.state[next(model.parameters())]["exp_avg"].neg_()
        found = None if guard is None else guard.report()
        report((gather(bits([list(model.parameters()), optimizer.state_dict()["state"]])), found))


def test_the_flipped_state_of_an_optimizer_is_put_right():
    (plain, _), (watched, report), (with_fault, report_with_fault), (unwatched, _) = run_local(_flipped_state, 3)
    assert watched == with_fault == plain
    assert unwatched[2] != plain[2]  # what is not watched stays
    assert report.audit.disputes == []
    assert {dispute.rank for dispute in report_with_fault.audit.disputes} <= {BAD}
    assert report.repaired == report_with_fault.repaired == {2: [3]}


# ------------------------------------------------------------------------------------------------ compiled


def _compiled(rank, report):
    _quiet()
    for where in ("inside", "outside"):
        case = Case(lambda: Mlp(norm=False), pairs, loss, compiled=where, backend="inductor")
        report(run(rank, case).bits)
        result = run(rank, case, ALWAYS, Fault(times_minus_three) if rank == BAD else None)
        report((result.bits, result.report))


@pytest.mark.long
def test_compiled_by_inductor_with_a_fault():
    plain_inside, inside, plain_outside, outside = run_local(_compiled, 3)
    for plain, (found, report) in ((plain_inside, inside), (plain_outside, outside)):
        assert found == plain
        assert report.convicted == {BAD: 0}


# ------------------------------------------------------------------------------------------------ memory

WIDTH = 300


class Deep(nn.Module):
    """Gradients of 8 layers, many times larger than a mini-batch and the buffers."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(8)), nn.BatchNorm1d(WIDTH))

    def forward(self, x):
        return self.net(x)


def _live():
    """The bytes of all strided tensors that Python knows."""
    gc.collect()
    tensors = [o for o in gc.get_objects() if type(o) in (torch.Tensor, nn.Parameter) and o.layout == torch.strided]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _peak(call):
    """The largest number of bytes that torch has allocated during a call, besides what it had before."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        call()
    events = [(e.start_ns(), e.nbytes()) for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate(size for _, size in sorted(events, key=lambda event: event[0])))


def _memory(rank, report, audit):
    """The bytes in a step, after it, and at the peak of another one."""
    torch.manual_seed(5)
    model = DistributedDataParallel(Deep(), bucket_cap_mb=1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    loader = (torch.ones(4, WIDTH) for _ in itertools.count())
    if audit is None:
        model.register_comm_hook(None, allreduce_hook)  # so that Python knows the buckets, too
        steps = plain_steps(model, loader, 1)
    else:
        steps = draco_ext.protect(model, audit, check_state_every=None).steps(loader)

    def step(live=int):
        optimizer.zero_grad()
        for x in next(steps):
            error = model(x).square().mean()
            found = live()
            error.backward()
        optimizer.step()
        return found

    for _ in range(3):
        step()
    report((step(_live), _live(), _peak(step)))


def _memories(rank, report):
    _quiet()
    for audit in (None, RARELY, ALWAYS):
        _memory(rank, report, audit)


def test_memory_of_healthy_ranks_is_that_of_plain_ddp():
    """Nothing of a gradient is kept: a step has a copy of the mini-batch and the buffers, and between steps nothing."""
    plain, *audits = run_local(_memories, 3)
    more = [[found - of_plain for found, of_plain in zip(audit, plain, strict=True)] for audit in audits]
    mini_batch, buffers, gradient = 4 * WIDTH * 4, 2 * WIDTH * 4 + 8, 8 * (WIDTH + 1) * WIDTH * 4
    few = 20_000  # states of generators, digests, statistics
    print(f"gradient {gradient}, mini-batch {mini_batch}, buffers {buffers}; in a step, after it, peak: {more}")
    assert gradient > 50 * (mini_batch + buffers + few)
    # Between the passes of an audited step there is also what was sent, and what has come.
    for (in_step, after, _), copies in zip(more, (1, 3), strict=True):
        assert in_step <= copies * (mini_batch + buffers + few)
        assert after <= few
    assert more[0][2] <= mini_batch + buffers + few
    assert more[1][2] <= 2 * 2**20  # an audit flattens one bucket at a time
