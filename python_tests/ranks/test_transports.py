"""Transports over gloo: the same decisions on all ranks, memory, buckets without elements."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import draco_ext
from draco_ext import CyclicCode, RepetitionCode
from draco_ext.protocol import communicator
from draco_ext.protocol.communicator import ProcessGroupCommunicator
from draco_ext.protocol.differences import Difference
from draco_ext.protocol.exchange import run_alone
from draco_ext.protocol.messages import GradientBuffer, Message
from draco_ext.protocol.transports import TRANSPORTS, make_transport, verified
from draco_ext.testing.local import run_local


def exchange(transport, values, number):
    verified.SMALL = 0  # small messages in pieces, too
    buffer = GradientBuffer(values, (values.numel(),), ("parameter",), "bucket")
    return run_alone(transport.exchange(Message(values, buffer), number))


def everybodys(value):
    rows = [None] * dist.get_world_size()
    dist.all_gather_object(rows, value)
    return rows


# --------------------------------------------------------------------- the same decision on all ranks


def _near_the_noise_floor(rank, report, code, steps):
    """A rank whose message is off by 6e-7 to 3e-6 of its size in every step, the same to all."""
    verified.SMALL = 0
    torch.set_num_threads(1)

    def adversary(step, message):
        error = torch.randn(message.shape, generator=torch.Generator().manual_seed(step))
        return message + error / error.norm() * message.norm() * (6e-7 + 2.4e-6 * step / steps)

    for transport in TRANSPORTS:
        torch.manual_seed(1)
        model = DistributedDataParallel(nn.Linear(20, 2))
        guard = draco_ext.protect(model, code, transport=transport, adversary=adversary if rank == 1 else None)
        parts = len(code.assignment(rank))
        inputs = torch.randn(steps * code.parts, 3, 20, generator=torch.Generator().manual_seed(2))
        loader = [inputs[step * code.parts + k] for step in range(steps) for k in code.assignment(rank)]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        assert len(loader) == steps * parts
        for step in guard.steps(loader):
            for x in step:
                model(x).square().sum().backward()
            optimizer.step()
        parameters = torch.cat([p.detach().flatten() for p in model.parameters()])
        found = guard.report().suspects
        named = {j: len(suspect.steps) for j, suspect in found.items()}
        report((transport, everybodys((guard.step, parameters.view(torch.int32).tolist(), named))))


@pytest.mark.parametrize(
    ("code", "steps"),
    [(CyclicCode(4, 1), 25), pytest.param(CyclicCode(7, 1), 40, marks=pytest.mark.long)],
    ids=repr,
)
def test_honest_ranks_leave_out_the_same_errors_near_the_noise_floor(code, steps):
    for transport, everybody in run_local(_near_the_noise_floor, code.workers, code, steps):
        assert all(of_rank == everybody[0] for of_rank in everybody), transport
        taken, _, named = everybody[0]
        assert taken == steps
        assert set(named) <= {1}, transport  # among few, errors near the floor are left out without naming anybody
        assert named.get(1, 0) < steps, transport


# ------------------------------------------------------------------------------------------------- memory


def _peak():
    """Of this process's memory, in MB."""
    return next(int(line.split()[1]) / 1e3 for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))


def _memory(rank, report):
    """How much each rank needs beside a message of 60 MB, of which rank 1 alters every element."""
    torch.set_num_threads(1)
    code, megabytes = RepetitionCode(3, 1), 60
    for name in TRANSPORTS:
        transport = make_transport(name, code, ProcessGroupCommunicator(dist.group.WORLD, range(3)))
        values = torch.ones(megabytes * 250_000) + (rank == 1)
        small = torch.ones(10)
        exchange(transport, small, 0)  # what is needed once
        before = _peak()
        outcome = exchange(transport, values, 1)
        report((name, everybodys((_peak() - before, values.min().item(), values.max().item(), outcome))))


STATUS = Path("/proc/self/status")


@pytest.mark.skipif(not STATUS.exists(), reason="needs Linux's count of memory")
def test_an_attack_on_a_large_bucket_takes_little_memory():
    for name, everybody in run_local(_memory, 3):
        for more, smallest, largest, outcome in everybody:
            assert smallest == largest == 1
            assert outcome.suspects == {1: Difference(15_000_000, 0, 1.0)}
            assert more < 60 + 25, (name, more)


# ----------------------------------------------------------------------------------------------- batches


def _in_batches(rank, report):
    """Point-to-point operations begin as on NCCL."""
    communicator._needs_batch = lambda values: True
    for code in (RepetitionCode(3, 1), CyclicCode(3, 1)):
        transport = make_transport("verified", code, ProcessGroupCommunicator(dist.group.WORLD, range(3)))
        values = torch.arange(40.0) + (rank == 1 and code.message_is_gradient)
        outcome = exchange(transport, values, 0)
        report(everybodys((values.tolist(), set(outcome.suspects))))


def test_operations_may_begin_in_batches():
    repetition, cyclic = run_local(_in_batches, 3)
    assert repetition == [(list(range(40)), {1})] * 3
    assert len(cyclic) == 3
    assert all(each == cyclic[0] for each in cyclic)


# ------------------------------------------------------------------------------------------- empty buckets


class _WithEmpty(nn.Module):
    """With a parameter that has no elements, alone in its dtype: a bucket of its own."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 1, bias=False)
        self.empty = nn.Parameter(torch.empty(0, dtype=torch.float64))

    def forward(self, x):
        return self.linear(x).sum() + self.empty.sum()


def _empty(rank, report):
    verified.SMALL = 0
    for code in (RepetitionCode(3, 1), RepetitionCode(3, 0), CyclicCode(3, 1)):
        for name in TRANSPORTS:
            model = DistributedDataParallel(_WithEmpty())
            guard = draco_ext.protect(model, code, transport=name)
            for step in guard.steps([torch.full((1, 3), float(part)) for part in code.assignment(rank)] * 2):
                model.zero_grad()  # no optimizer uses them
                for x in step:
                    model(x).backward()
            gradients = [p.grad.tolist() for p in model.parameters()]
            report((code, name, everybodys((gradients, guard.step, guard.report().suspects))))


def test_a_bucket_without_elements():
    for code, name, everybody in run_local(_empty, 3):
        for (empty, gradient), steps, suspects in everybody:
            assert gradient[0] == pytest.approx([(code.parts - 1) / 2] * 3, rel=1e-6), (code, name)
            assert (empty, steps, suspects) == ([], 2, {})
