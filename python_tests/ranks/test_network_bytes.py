"""The bytes that real processes send, in a network of their own: beside plain DDP's, and against `draco plan`."""

import fcntl
import json
import socket
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import draco_ext
from draco_ext import CyclicCode, RepetitionCode
from draco_ext.cli import network_model
from draco_ext.testing.local import run_local

LENGTHS = (40_000, 3000, 90_000)  # of parameters, which are one bucket
CASES = {
    "plain": None,
    "allreduce, repetition": ("allreduce", RepetitionCode(6, 1)),
    "verified, uneven groups": ("verified", RepetitionCode(7, 1)),
    "server, repetition": ("server", RepetitionCode(6, 1)),
}
PRIVATE = ("unshare", "--map-root-user", "--net")  # a network of its own, whose only device is loopback
HEADERS = 400  # bytes, of TCP, IP and gloo, for a message and its acknowledgement


def can_be_private():
    try:
        return subprocess.run([*PRIVATE, "true"], capture_output=True).returncode == 0
    except OSError:
        return False


class Scales(nn.Module):
    def __init__(self):
        super().__init__()
        self.scales = nn.ParameterList(torch.zeros(length) for length in LENGTHS)

    def forward(self, x):
        return sum(scale.sum() for scale in self.scales) * x.sum()


def sent_so_far():
    """The bytes that the loopback device of this process's network has sent."""
    (line,) = (line for line in Path("/proc/self/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split()[9])


def _rank(rank, report, protection):
    socket.gethostname = lambda: f"host {rank}"  # on one host the server's results go whole
    aside = dist.new_group()
    model = DistributedDataParallel(Scales())
    steps = [range(1)] * 6
    if protection is not None:
        transport, code = protection
        guard = draco_ext.protect(model, code, transport=transport)
        steps = guard.steps(range(6 * len(code.assignment(guard.worker))))
    counted = []
    for step in steps:
        model.zero_grad()  # no optimizer uses them
        dist.barrier(aside)
        begin = sent_so_far()
        dist.barrier(aside)  # nobody sends anything of the step before this one has read
        for _ in step:
            model(torch.ones(1)).backward()
        dist.barrier(aside)
        counted.append(sent_so_far() - begin)
        dist.barrier(aside)
    if rank == 0:
        report(counted[2:])  # DDP makes new buckets after the first step, and parameters are compared in it


def count_cases():
    """The bytes of steps in all cases, by name."""
    counted = {}
    for name, protection in CASES.items():
        workers = 6 if protection is None else protection[1].workers
        (counted[name],) = run_local(_rank, workers, protection)
    return counted


def _bytes(rank, report):
    """Sent by all ranks in three steps, the first ones left out, after which DDP makes new buckets."""
    torch.set_num_threads(1)

    def sent():
        dist.barrier()
        count = sent_so_far()
        dist.barrier()
        return count

    for code in (None, RepetitionCode(6, 0), RepetitionCode(6, 1), RepetitionCode(6, 2), CyclicCode(6, 1)):
        model = DistributedDataParallel(nn.Linear(1000, 1000))
        parts = [0]
        if code is not None:
            guard = draco_ext.protect(model, code)
            parts = code.assignment(rank)
        for i in range(5):
            if i == 2:
                before = sent()
            for step in [parts] if code is None else guard.steps(parts):
                model.zero_grad()
                for _ in step:
                    model(torch.ones(1, 1000)).sum().backward()
        report((repr(code), sent() - before))


def count_codes():
    """The bytes of three steps, by code; of plain DDP under "None"."""
    return dict(run_local(_bytes, 6))


def counted_by(function):
    """Return what a function of this module returns in a network of its own."""
    command = [*PRIVATE, sys.executable, __file__, function.__name__]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


needs_private_network = pytest.mark.skipif(
    not can_be_private(), reason="processes cannot have a network of their own here"
)


@needs_private_network
def test_bytes_on_the_wire():
    of_plain = counted_by(count_codes)
    plain = of_plain.pop("None")
    assert plain > 3 * 10 * 4e6  # 2 (n - 1) d floats
    of_plain = {code: sent / plain for code, sent in of_plain.items()}
    assert of_plain.pop(repr(RepetitionCode(6, 1))) < 0.62  # n + G - 2 instead of 2 n - 2
    assert of_plain.pop(repr(RepetitionCode(6, 2))) < 0.02  # one group
    assert max(of_plain.values()) < 1.02


@pytest.mark.long
@needs_private_network
def test_bytes_of_real_processes():
    """In the best of four steps at least what the model says; at most 2% more, and 400 bytes more for each message."""
    counted = counted_by(count_cases)
    assert counted.keys() == CASES.keys()
    for name, protection in CASES.items():
        lengths = [sum(LENGTHS)]
        if protection is None:
            workers, modelled = 6, network_model.plain(6, lengths, 4)
        else:
            transport, code = protection
            workers = code.workers
            modelled = network_model.traffic(code, transport, lengths, 4) + network_model.record(code, transport)
        messages = workers * (modelled.messages + 10)  # and of barriers
        least = min(counted[name])  # without what TCP has sent again
        assert modelled.sent <= least <= 1.02 * modelled.sent + HEADERS * messages, (name, counted[name])


if __name__ == "__main__":
    with socket.socket() as any_socket:
        up = struct.pack("16sH14s", b"lo", 1, b"")
        fcntl.ioctl(any_socket, 0x8914, up)  # SIOCSIFFLAGS
    print(json.dumps({function.__name__: function for function in (count_cases, count_codes)}[sys.argv[1]]()))
