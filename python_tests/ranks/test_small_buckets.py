"""Small buckets, which DistributedDataParallel makes of a small model, take the rounds of one."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import draco_ext
from draco_ext import CyclicCode, RepetitionCode
from draco_ext.protocol.communicator import ProcessGroupCommunicator
from draco_ext.testing.local import run_local

STEPS = 3
SIX = RepetitionCode(6, 1)
# code, transport, the collective that is counted, and how often a step takes it
CASES = [
    (SIX, "allreduce", "all_gather", 2),  # shares in keys, with the record of the step; digests
    (CyclicCode(3, 1), "allreduce", "all_gather", 2),  # the same; projections
    (SIX, "verified", "exchange", 6),
]


def _train(rank, code, transport, counted, *, bad=(), **options):
    torch.manual_seed(3)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(400, 500), nn.ReLU(), nn.Linear(500, 600)), **options)
    adversary = (lambda step, message: message + 1) if rank in bad else None
    guard = draco_ext.protect(model, code, transport=transport, adversary=adversary)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    calls, per_step = [], []
    inner = getattr(ProcessGroupCommunicator, counted)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ProcessGroupCommunicator, counted, lambda *arguments: calls.append(counted) or inner(*arguments))
        parts = code.assignment(guard.worker)
        data = torch.randn(code.parts, 8, 400, generator=torch.Generator().manual_seed(1))
        for step in guard.steps(data[part] for _ in range(STEPS) for part in parts):
            optimizer.zero_grad()
            for x in step:
                model(x).square().mean().backward()
            optimizer.step()
            per_step.append(len(calls))
            calls.clear()
    parameters = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    rows = [torch.empty_like(parameters) for _ in range(code.workers)]
    dist.all_gather(rows, parameters)
    assert all(torch.equal(row, parameters) for row in rows)
    return parameters, per_step[-1], sorted(guard.report().suspects)


def _runs(rank, report, code, transport, counted):
    clean, calls, suspects = _train(rank, code, transport, counted)
    one_by_one, more_calls, _ = _train(rank, code, transport, counted, bucket_cap_mb=0.5)
    report((calls, more_calls, suspects, (one_by_one - clean).abs().max().item()))
    attacked, _, suspects = _train(rank, code, transport, counted, bad=(1,), gradient_as_bucket_view=True)
    report((suspects, (attacked - clean).abs().max().item()))


@pytest.mark.parametrize(("code", "transport", "counted", "calls"), CASES)
def test_small_buckets_take_the_rounds_of_one(code, transport, counted, calls):
    clean, attacked = run_local(_runs, code.workers, code, transport, counted)
    together, one_by_one, suspects, distance = clean
    assert together == calls
    assert one_by_one > calls
    assert suspects == []
    tolerance = 0 if isinstance(code, RepetitionCode) else 1e-6
    assert distance <= tolerance
    suspects, distance = attacked
    assert suspects == [1]
    assert distance <= tolerance
