"""The model of `draco plan` against the bytes that real processes send, in a network that they have for themselves."""

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
from draco_ext import RepetitionCode
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
    aside = dist.new_group()
    model = DistributedDataParallel(Scales())
    steps = [range(1)] * 6
    if protection is not None:
        transport, code = protection
        guard = draco_ext.protect(model, code, transport=transport)
        steps = guard.steps(range(6 * len(code.assignment(guard.worker))))
    counted = []
    for step in steps:
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


def main():
    """Count in all cases; called in a network of its own."""
    with socket.socket() as any_socket:
        up = struct.pack("16sH14s", b"lo", 1, b"")
        fcntl.ioctl(any_socket, 0x8914, up)  # SIOCSIFFLAGS
    counted = {}
    for name, protection in CASES.items():
        workers = 6 if protection is None else protection[1].workers
        (counted[name],) = run_local(_rank, workers, protection)
    print(json.dumps(counted))


@pytest.mark.skipif(not can_be_private(), reason="processes cannot have a network of their own here")
def test_bytes_of_real_processes():
    """In the best of four steps at least what the model says; at most 2% more, and 400 bytes more for each message."""
    done = subprocess.run([*PRIVATE, sys.executable, __file__], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    counted = json.loads(done.stdout.splitlines()[-1])
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
    main()
