"""`Audit` in the loops of scripts: mistakes that show early, several models, copies, memory of healthy ranks."""

import logging
import re

import torch
from test_audit_compose import (
    BUCKETS,
    Fault,
    Mlp,
    bits,
    gather,
    loss,
    pairs,
    plain_steps,
    seed_all,
    times_minus_three,
)
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import draco_ext
from draco_ext import Audit
from draco_ext.testing.local import run_local

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


def _loops(rank, report):
    _quiet()
    for function in LOOPS:
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


def test_mistakes_in_the_loop_show_at_once():
    """At a rate at which no coin falls; and right loops are not refused."""
    results = {name: rest for name, *rest in run_local(_loops, 3)}
    for function, expected in LOOPS.items():
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


def _gans(rank, report, audits):
    _quiet()
    report(_gan(rank, None, (None, None)))
    for audit in audits:
        for bad in ({}, {0: 1}, {1: 1}, {0: 1, 1: 2}):
            faults = [Fault(times_minus_three) if bad.get(i) == rank else None for i in range(2)]
            report((bad, *_gan(rank, audit, faults)))


def test_two_models_with_a_guard_each_in_one_process():
    """The loop of a GAN; a rank that is bad in one model is convicted there alone."""
    results = run_local(_gans, 3, (ALWAYS, RARELY))
    plain, _ = next(results)
    for bad, found, reports in results:
        assert found == plain, bad
        for i, report in enumerate(reports):
            assert set(report.convicted) == ({bad[i]} if i in bad else set()), bad
