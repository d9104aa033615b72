"""Transports by themselves, over gloo, without a model: their exchanges one after the other."""

import time

import torch
import torch.distributed as dist

from draco_ext import RepetitionCode
from draco_ext.distributed.guard import TRANSPORTS, _make_transport
from draco_ext.distributed.local import run_local
from draco_ext.distributed.transports import Message, Peers


def transport_of(name, code, rank, deadline=60.0, **tolerance):
    peers = Peers(dist.group.WORLD, code, rank, tuple(range(code.workers)))
    return _make_transport(name, peers, deadline=deadline, **tolerance)


def to_the_end(exchange):
    """What an exchange returns, all that it waits for having been waited for."""
    value = None
    while True:
        try:
            pending = exchange.send(value)
        except StopIteration as stop:
            return stop.value
        value = None if pending is None else pending.wait()


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
            outcome = to_the_end(transport.exchange(Message(values, values.clone(), (5,)), step))
            record = torch.tensor([2**62 + rank, -step])
            rows, missing = to_the_end(transport.gather_record(record))
            gathered.append((outcome.failed, rows.tolist(), missing))
        report((name, everybodys(gathered)))
    transport = transport_of("server", RepetitionCode(3, 1), rank, deadline=0.5)
    gathered = []
    for step in range(2):
        if (rank, step) == (2, 0):
            time.sleep(1.5)
        rows, missing = to_the_end(transport.gather_record(torch.tensor([7, rank])))
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
