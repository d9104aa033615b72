"""Mistakes in set-up are named in the first step; `Guard.self_test` names what is not bit-reproducible."""

import logging
import os
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import draco_ext
from draco_ext import CyclicCode, RepetitionCode
from draco_ext.cli import commands, doctor
from draco_ext.distributed.local import run_local
from draco_ext.distributed.reproducibility import SelfTest


class Net(nn.Module):
    """With dropout and buffers; the gradient of `first` or `second` can be made to differ."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.first, self.norm, self.second = nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)
        self.unstable, self.scale, self.calls = False, 1.0, 0

    def forward(self, x):
        self.calls += 1
        hidden = nn.functional.dropout(self.norm(self.first(x)), 0.5)
        return self.second(hidden) * (self.calls if self.unstable else self.scale)


def _self_test(rank, report):
    torch.set_num_threads(1)
    model = DistributedDataParallel(Net(), broadcast_buffers=False)
    guard = draco_ext.protect(model, RepetitionCode(3, 1))
    net = model.module
    batch = (torch.randn(8, 4), torch.zeros(8))  # other numbers on each rank: rank 0's count
    before = [torch.random.get_rng_state(), *(b.clone() for b in net.buffers())]
    report(guard.self_test(batch))
    after = [torch.random.get_rng_state(), *net.buffers()]
    report(all(torch.equal(a, b) for a, b in zip(before, after, strict=True)))
    report(all(p.grad is None for p in net.parameters()))
    net.unstable = rank == 1
    report(guard.self_test(batch))
    net.unstable, net.scale = False, 2.0 if rank == 2 else 1.0
    report(guard.self_test(batch))
    report(guard.self_test(batch, lambda module, batch: module.first(batch[0]).sum()))
    net.scale = 1.0
    with torch.no_grad():
        net.second.bias += rank == 0
    report(guard.self_test(batch))
    for other in (
        torch.zeros(8 + (rank == 1), 4),
        torch.zeros(8, 4, dtype=torch.float64 if rank == 0 else torch.float32),
    ):
        try:
            guard.self_test(other)
        except ValueError as error:
            report(str(error))


def test_self_test():
    fine, untouched, no_gradients, unstable, minority, custom, parameters, shapes, dtypes = run_local(_self_test, 3)
    assert fine.reproducible, fine
    assert untouched
    assert no_gradients
    assert (unstable.reproducible, unstable.parameter, unstable.ranks) == (False, "first.weight", (1,))
    assert "use_deterministic_algorithms" in unstable.advice
    assert (minority.reproducible, minority.parameter, minority.ranks) == (False, "first.weight", (2,))
    assert "same number of threads" in minority.advice
    assert custom.reproducible
    assert (parameters.parameter, parameters.ranks) == ("(the parameters themselves)", (0,))
    assert shapes == "batch must have the same shapes and dtypes on all ranks, got others on ranks [1]"
    assert dtypes == "batch must have the same shapes and dtypes on all ranks, got others on ranks [0]"


def _other_batches(rank, report):
    torch.set_num_threads(1)
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("draco_ext").addHandler(handler)

    def step(code, x, training=True):
        model = DistributedDataParallel(nn.Linear(4, 2)).train(training)
        guard = draco_ext.protect(model, code)
        error = None
        try:
            for parts in guard.steps(x):
                for part in parts:
                    model(part).square().sum().backward()
        except ValueError as caught:
            error = str(caught)
        said, lines[:] = list(lines), []
        report((error, said, sorted(guard.report().suspects)))

    ones = torch.ones(2, 4)
    step(RepetitionCode(3, 1), [ones * rank])  # as from a DistributedSampler
    step(RepetitionCode(3, 1), [ones * (rank == 2)])  # one rank with another seed
    step(RepetitionCode(3, 1), [ones * rank], training=False)  # as for fine-tuning with frozen statistics
    step(RepetitionCode(3, 0), [ones * rank])  # every rank has a part of its own
    code = CyclicCode(3, 1)
    step(code, [ones * part for part in code.assignment(rank)])
    step(code, [ones * (part + 5 * (rank == 1)) for part in code.assignment(rank)])
    step(code, [ones * (part + 5 * rank) for part in code.assignment(rank)])
    model = DistributedDataParallel(nn.Linear(4, 2)).eval()
    draco_ext.protect(model, code)
    try:
        model(ones).sum().backward()
    except RuntimeError as error:
        report(str(error))


def test_other_mini_batches_are_named():
    several, one, evaluating, disjoint, cyclic, cyclic_one, cyclic_several, no_steps = run_local(_other_batches, 3)
    assert "loader must give ranks that share a part the same mini-batches" in several[0]
    assert "got others of part 0 on ranks [1, 2]" in several[0]
    assert evaluating[0] == several[0]
    assert "loop over guard.steps(loader)" in no_steps
    assert one[0] is None
    assert one[1][0].startswith("rank 2 on ")
    assert "has other inputs of part 0 than others: loader must give" in one[1][0]
    assert one[2] == [2]
    assert disjoint == cyclic == (None, [], [])
    assert cyclic_one[0] is None
    assert cyclic_one[2] == [1]
    assert "got others of part 0 on ranks [1, 2]" in cyclic_several[0]


@pytest.mark.slow
def test_doctor_under_torchrun():
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "draco_ext.cli", "doctor"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    run = subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("gradients are bit-reproducible, on each rank and across ranks") == 1
    assert len([line for line in run.stdout.splitlines() if torch.__version__ in line]) == 2


def test_doctor_says_what_is_wrong(monkeypatch):
    facts = [doctor.Facts("here", "a processor", "avx2", "2.13.0", threads, "3.11") for threads in (1, 1, 2)]
    result = SelfTest(False, "0.weight", (2,), "use the same number of threads")
    monkeypatch.setattr(doctor, "diagnose", lambda workers: doctor.Diagnosis(facts, result))
    run = CliRunner().invoke(commands.draco, ["doctor"])
    assert run.exit_code == 1
    assert "the gradient of 0.weight is not bit-reproducible on ranks [2]: use the same number of threads" in run.output
