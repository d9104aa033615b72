"""Transports by themselves, over gloo, without a model: their exchanges one after the other."""

import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import draco_ext
from draco_ext import CyclicCode, RepetitionCode
from draco_ext.protocol.transports import base as transports
from draco_ext.protocol.transports.base import Difference, Message, Peers
from draco_ext.testing.local import run_local
from draco_ext.training.guard import TRANSPORTS, _make_transport


def transport_of(name, code, rank, deadline=60.0, group=None, **tolerance):
    peers = Peers(group or dist.group.WORLD, code, rank, tuple(range(code.workers)))
    return _make_transport(name, peers, deadline=deadline, **tolerance)


def to_the_end(*exchanges):
    """What exchanges return, in turns as in a backward pass: each begins before those before it go on."""
    pending, returned = {}, {}

    def advance(i):
        try:
            pending[i] = exchanges[i].send(None if pending[i] is None else pending[i].wait())
        except StopIteration as stop:
            returned[i] = stop.value
            del pending[i]

    for i in range(len(exchanges)):
        before = list(pending)
        pending[i] = None
        for j in (i, *before):
            advance(j)
    while pending:
        for j in list(pending):
            advance(j)
    return [returned[i] for i in range(len(exchanges))]


def everybodys(value):
    rows = [None] * dist.get_world_size()
    dist.all_gather_object(rows, value)
    return rows


# ------------------------------------------------------------------------------------------------- records


def _records(rank, report):
    for name in TRANSPORTS:
        transport = transport_of(name, RepetitionCode(3, 1), rank)
        gathered = []
        for step in range(3):  # in turns with buckets
            values = torch.full((5,), float(step))
            [outcome] = to_the_end(transport.exchange(Message(values, values.clone(), (5,)), step))
            record = torch.tensor([2**62 + rank, -step])
            [(rows, missing)] = to_the_end(transport.gather_record(record))
            gathered.append((outcome.failed, rows.tolist(), missing))
        report((name, everybodys(gathered)))
    transport = transport_of("server", RepetitionCode(3, 1), rank, deadline=0.5)
    gathered = []
    for step in range(2):
        if (rank, step) == (2, 0):
            time.sleep(1.5)
        [(rows, missing)] = to_the_end(transport.gather_record(torch.tensor([7, rank])))
        gathered.append((rows.tolist(), missing))
        while rank == 0 and any(line._claimed < line._given for line in transport._lines.values()):
            time.sleep(0.01)  # until the one that was late has caught up
        dist.barrier()
    report(everybodys(gathered))


def test_every_rank_gets_the_same_records():
    *transports, late = run_local(_records, 3)
    for name, (_, everybody) in zip(TRANSPORTS, transports, strict=True):
        expected = [(False, [[2**62 + j, -step] for j in range(3)], ()) for step in range(3)]
        assert everybody == [expected] * 3, name
    assert late == [[([[7, 0], [7, 1], [0, 0]], (2,)), ([[7, 0], [7, 1], [7, 2]], ())]] * 3


# --------------------------------------------------------------------- the same decision on all ranks


def _near_the_noise_floor(rank, report, code, steps):
    """A rank whose message is off by 6e-7 to 3e-6 of its size in every step, the same to all."""
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
    [(CyclicCode(4, 1), 25), *(pytest.param(CyclicCode(n, 1), 100, marks=pytest.mark.long) for n in (4, 7))],
    ids=repr,
)
def test_honest_ranks_leave_out_the_same_errors_near_the_noise_floor(code, steps):
    for transport, everybody in run_local(_near_the_noise_floor, code.workers, code, steps):
        assert all(of_rank == everybody[0] for of_rank in everybody), transport
        taken, _, named = everybody[0]
        assert taken == steps
        assert set(named) <= {1}, transport  # among few, errors near the floor are left out without naming anybody
        assert named.get(1, 0) < steps, transport


class _Dishonest(transports.SharedSeed):
    """What rank 1 commits itself to and reveals. Rank 0's share is known: zeros."""

    how = "wrong"

    def commit(self, device):
        if self.how == "copied":
            share = bytes(transports.SHARE_BYTES)
            return share, self._swap(transports._commitment(0, share), device)
        return super().commit(device)

    def reveal(self, share, commitments):
        if self.how == "silent":
            return 0, []
        return super().reveal(share[::-1] if self.how == "wrong" else share, commitments)


def _noting_seeds(seeds, decode=CyclicCode._decode):
    def note_and_decode(code, rows, *, seed, **options):
        seeds.append(seed)
        return decode(code, rows, seed=seed, **options)

    return note_and_decode


def _dishonest(rank, report):
    code, length = CyclicCode(4, 1), 50
    gradients = torch.randn(code.parts, length, generator=torch.Generator().manual_seed(3))
    message = code.encode(rank, gradients[list(code.assignment(rank))])
    for how in ("wrong", "copied", "silent"):
        group = dist.new_group(timeout=timedelta(seconds=2 if how == "silent" else 60))
        seeds = []
        with pytest.MonkeyPatch.context() as patch:
            if rank == 1:
                patch.setattr(_Dishonest, "how", how)
                patch.setattr(transports, "SharedSeed", _Dishonest)
            if rank == 0:
                patch.setattr(transports.secrets, "token_bytes", bytes)
            patch.setattr(CyclicCode, "_decode", _noting_seeds(seeds))
            transport = transport_of("allgather", code, rank, group=group)
            own, bucket, error, outcome = message.clone(), torch.empty(length), None, None
            try:
                [outcome] = to_the_end(transport.exchange(Message(own, bucket, (length,)), 0))
            except RuntimeError as caught:
                error = str(caught)
        right = torch.allclose(bucket, gradients.mean(0), atol=1e-5)
        report((how, everybodys((error, seeds, outcome and outcome.suspects, right, bucket.tolist()))))


def test_a_share_that_is_not_the_one_committed_to():
    wrong, copied, silent = run_local(_dishonest, 4)
    for _, everybody in (wrong, copied):
        honest = [everybody[rank] for rank in (0, 2, 3)]
        assert all(of_rank == honest[0] for of_rank in honest)
        error, seeds, suspects, right, _ = honest[0]
        assert (error, suspects, right) == (None, {1: None}, True)
        assert len(seeds) == 1
        assert -(2**63) <= seeds[0] < 2**63
    _, everybody = silent
    for rank in (0, 2, 3):
        assert everybody[rank][0].startswith("rank 1 has died, hangs")


# ------------------------------------------------------------------------------------------------- slices


LENGTHS = (3, 60, 41)  # of the parameters in a bucket


def _message(code, rank, seed, alter=None):
    """A message for a bucket, and the gradient that it is to become."""
    gradients = torch.randn(code.parts, sum(LENGTHS), generator=torch.Generator().manual_seed(seed))
    mine = gradients[list(code.assignment(rank))].split(LENGTHS, dim=1)
    values = torch.cat([code.encode(rank, piece.contiguous()) for piece in mine])
    if alter is not None:
        alter(values)
    return Message(values, torch.empty(sum(LENGTHS)), LENGTHS), gradients.mean(0)


def _two_elements(values):
    values[20] += 1
    values[90] = -3


def _sliced(rank, report, code):
    def other(values):
        values[50] = rank

    for name in ("allgather", "server"):
        results = []
        for size in (2**22, 64):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(transports, "SLICE", size)
                patch.setattr(transports, "WINDOW", 3 * size)
                transport = transport_of(name, code, rank)
                alterations = [_two_elements if rank == 1 else None, None, other if rank > 0 else None]
                messages = [_message(code, rank, i, alter) for i, alter in enumerate(alterations, 1)]
                outcomes = to_the_end(*(transport.exchange(message, i) for i, (message, _) in enumerate(messages, 1)))
                buckets = torch.stack([message.bucket for message, _ in messages])
                apart = [(message.bucket - truth).abs().max().nan_to_num(-1.0).item() for message, truth in messages]
                results.append(everybodys((outcomes, buckets.view(torch.int32).tolist(), apart)))
                if name == "allgather":
                    assert transport._under_way == len(transport._unsent) == 0
        report((name, results))


@pytest.mark.parametrize("code", [RepetitionCode(3, 1), CyclicCode(4, 1)], ids=repr)
def test_slices_make_no_difference(code):
    exact = isinstance(code, RepetitionCode)
    for name, results in run_local(_sliced, code.workers, code):
        for everybody in results:
            assert all(of_rank == everybody[0] for of_rank in everybody), name
            (bad, good, failed), _, apart = everybody[0]
            assert max(apart[:2]) < (1e-30 if exact else 1e-5), name
            assert apart[2] == -1, name  # not a number
            assert list(bad.suspects) == [1], name
            assert (bad.suspects[1] is None) != exact
            assert not exact or (bad.suspects[1].elements, bad.suspects[1].first) == (2, 20)
            assert (good.suspects, good.failed, bad.failed, failed.failed) == ({}, False, False, True), name
        if exact:
            assert results[0] == results[1], name


# ------------------------------------------------------------------------------------------------- memory


def _peak():
    """Of this process's memory, in MB."""
    return next(int(line.split()[1]) / 1e3 for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))


def _memory(rank, report):
    """How much each rank needs beside a message of 60 MB, of which rank 1 alters every element."""
    torch.set_num_threads(1)
    code, megabytes = RepetitionCode(3, 1), 60
    for name in TRANSPORTS:
        transport = transport_of(name, code, rank)
        values = torch.ones(megabytes * 250_000) + (rank == 1)
        small = torch.ones(10)
        to_the_end(transport.exchange(Message(small, small, (10,)), 0))  # what is needed once
        before = _peak()
        [outcome] = to_the_end(transport.exchange(Message(values, values, (values.numel(),)), 1))
        report((name, everybodys((_peak() - before, values.min().item(), values.max().item(), outcome))))


STATUS = Path("/proc/self/status")


@pytest.mark.skipif(not STATUS.exists(), reason="needs Linux's count of memory")
def test_an_attack_on_a_large_bucket_takes_little_memory():
    for name, everybody in run_local(_memory, 3):
        for more, smallest, largest, outcome in everybody:
            assert smallest == largest == 1
            assert outcome.suspects == {1: Difference(15_000_000, 0, 1.0)}
            assert more < 60 + 25, (name, more)


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
    for code in (RepetitionCode(3, 1), RepetitionCode(3, 0), CyclicCode(3, 1)):
        for name in TRANSPORTS:
            model = DistributedDataParallel(_WithEmpty())
            guard = draco_ext.protect(model, code, transport=name)
            for step in guard.steps([torch.full((1, 3), float(part)) for part in code.assignment(rank)] * 2):
                for x in step:
                    model(x).backward()
            gradients = [p.grad.tolist() for p in model.parameters()]
            report((code, name, everybodys((gradients, guard.step, guard.report().suspects))))


def test_a_bucket_without_elements():
    for code, name, everybody in run_local(_empty, 3):
        for (empty, gradient), steps, suspects in everybody:
            assert gradient[0] == pytest.approx([(code.parts - 1) / 2] * 3, rel=1e-6), (code, name)
            assert (empty, steps, suspects) == ([], 2, {})
