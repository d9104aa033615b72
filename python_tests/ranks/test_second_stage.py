"""A code with a second stage under `protect`: bounded steps, and what report, ledger and metrics say of them."""

import logging

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import draco_ext
from draco_ext import ByzShieldCode, RepetitionCode
from draco_ext.testing.local import run_local


def _train(rank, report, transport, ledger):
    torch.set_num_threads(1)
    torch.manual_seed(1)
    code = RepetitionCode(9, 1, beyond="median")
    model = DistributedDataParallel(nn.Linear(20, 2))
    with pytest.raises(ValueError, match="transport must be 'verified' or 'server' for a code with a second stage"):
        draco_ext.protect(model, code)
    with pytest.raises(ValueError, match="code must be decoded column by column, got ByzShieldCode"):
        draco_ext.protect(model, ByzShieldCode(9, 1), transport="server")

    def adversary(step, message):
        """Rank 3 is wrong in step 1; in step 2 it colludes with 4, and in step 3 they do not agree."""
        if step == 0 or (step == 1 and rank == 4):
            return message
        return torch.full_like(message, -1e6 * (rank if step == 3 else 1))

    guard = draco_ext.protect(
        model, code, transport=transport, ledger=ledger, adversary=adversary if rank in (3, 4) else None
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    inputs = torch.randn(4, code.parts, 3, 20, generator=torch.Generator().manual_seed(2))
    steps = []
    for batches in inputs:
        own = []
        for x in batches:  # what each part's gradient is
            parameters = list(model.module.parameters())
            gradients = torch.autograd.grad(model.module(x).square().sum(), parameters)
            own.append(torch.cat([gradient.flatten() for gradient in gradients]))
        optimizer.zero_grad()
        model(batches[code.assignment(guard.worker)[0]]).square().sum().backward()
        # DDP's buckets hold parameters in any order, so elements are compared one by one.
        gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        steps.append((torch.stack(own).tolist(), gradient.tolist()))
        optimizer.step()
    found = guard.report()
    state = guard.state_dict()
    guard.load_state_dict(state)
    assert guard.report().undecided_steps == found.undecided_steps
    report((steps, found.bounded, found.undecided_steps, found.failed_steps, found.suspects, found.trust))
    report(found.metrics())


@pytest.mark.parametrize("transport", ["verified", "server"])
def test_steps_are_bounded_and_say_so(transport, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    ledger = tmp_path / "bad.jsonl"
    (steps, bounded, undecided, failed, suspects, trust), metrics = run_local(_train, 9, transport, str(ledger))
    assert bounded
    assert failed == ()
    assert undecided == (3,)
    assert metrics["draco/undecided_steps"] == 1
    assert {rank: suspect.steps for rank, suspect in suspects.items()} == {3: [1], 5: [2]}  # 5 is honest, but outvoted
    assert "gradients are bounded, not exact, while at most 1 of 3 parts have more than 1 bad ranks" in trust
    for step, numbers in enumerate(steps):
        parts, gradient = map(torch.tensor, numbers)
        honest = parts if step < 2 else parts[[0, 2]]
        assert (gradient >= honest.min(0).values - 1e-5).all()
        assert (gradient <= honest.max(0).values + 1e-5).all()
        if step < 2:
            torch.testing.assert_close(gradient, parts.median(0).values)
    findings = draco_ext.read_ledger(ledger)
    assert {(each.step, each.rank, each.kind) for each in findings} == {
        (1, 3, "gradient"),
        (2, 5, "gradient"),
        (3, 3, "undecided"),
        (3, 4, "undecided"),
        (3, 5, "undecided"),
    }
