"""Mistakes in set-up are named in the first step; `Guard.self_test` names what is not bit-reproducible."""

import contextlib
import itertools
import logging
import os
import random
import socket
import subprocess
import sys
from collections import UserDict, deque
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.distributed as dist
from click.testing import CliRunner
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import draco_ext
from draco_ext import CyclicCode, RepetitionCode
from draco_ext.cli import commands, doctor
from draco_ext.testing.local import run_local
from draco_ext.training import inputs
from draco_ext.training.reproducibility import SelfTest, fingerprint


class Net(nn.Module):
    """With dropout and buffers; the gradient of `first` or `second` can be made to differ."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.first, self.norm, self.second = nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)
        self.unstable, self.scale, self.calls = False, 1.0, 0

    def forward(self, x):
        self.calls += 1
        hidden = nn.functional.dropout(self.norm(self.first(x)), 0.5) * (random.random() + np.random.rand())
        return self.second(hidden) * (self.calls if self.unstable else self.scale)


def _self_test(rank, report):
    torch.set_num_threads(1)
    model = DistributedDataParallel(Net(), broadcast_buffers=False)
    guard = draco_ext.protect(model, RepetitionCode(3, 1))
    net = model.module
    batch = (torch.randn(8, 4), torch.zeros(8))  # other numbers on each rank: rank 0's count
    before = [torch.random.get_rng_state(), *(b.clone() for b in net.buffers())]
    states = random.getstate(), np.random.get_state()[1].tolist()
    report(guard.self_test(batch))
    after = [torch.random.get_rng_state(), *net.buffers()]
    report(
        all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        and states == (random.getstate(), np.random.get_state()[1].tolist())
    )
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
    own = torch.Generator().manual_seed(rank)  # one that no guard knows

    def drawing(code, steps):
        model = DistributedDataParallel(nn.Linear(4, 2))
        guard = draco_ext.protect(model, code)
        try:
            for parts in guard.steps([ones] * len(code.assignment(rank))) if steps else [[ones]]:
                for part in parts:
                    model(part + torch.randn(2, 4, generator=own)).sum().backward()
        except ValueError as error:
            report(str(error))

    drawing(code, steps=True)
    drawing(RepetitionCode(3, 1), steps=True)
    drawing(RepetitionCode(3, 1), steps=False)
    model = DistributedDataParallel(nn.Linear(4, 2)).eval()
    draco_ext.protect(model, code)
    try:
        model(ones).sum().backward()
    except RuntimeError as error:
        report(str(error))


def test_other_mini_batches_are_named():
    several, one, evaluating, disjoint, cyclic, cyclic_one, cyclic_several, *drawn, plain, no_steps = run_local(
        _other_batches, 3
    )
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
    assert len(drawn) == 2
    for error in drawn:
        assert "the mini-batches are the same, but what was made of them is not: draw random numbers" in error
    assert "loader must give" in plain  # which of the two it is, is not known
    assert "draw random numbers between mini-batch and forward pass from the global generators" in plain


def _one_in_each_group(rank, report):
    """Ranks 1 and 4 have other data; each group of three can bear one."""
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append((record.levelno, record.getMessage()))
    logging.getLogger("draco_ext").addHandler(handler)
    logging.getLogger("draco_ext").setLevel(logging.DEBUG)
    model = DistributedDataParallel(nn.Linear(4, 2))
    guard = draco_ext.protect(model, RepetitionCode(6, 1))
    model(torch.ones(2, 4) * (rank // 3) + (rank in (1, 4))).sum().backward()
    everybody = [None] * 6
    dist.all_gather_object(everybody, (lines, sorted(guard.report().suspects), model.module.bias.grad.tolist()))
    report(everybody)


def test_a_rank_in_each_group_does_not_stop_all():
    [everybody] = run_local(_one_in_each_group, 6)
    for rank, (lines, suspects, gradient) in enumerate(everybody):
        assert suspects == [1, 4]
        assert gradient == [2, 2]
        assert [line.split(" on ")[0] for _, line in lines] == ["rank 1", "rank 4", "rank 1", "rank 4"]
        assert {level for level, _ in lines} == {logging.WARNING if rank == 0 else logging.DEBUG}


def test_the_first_suspected_rank_does_not_speak_for_all():
    [everybody] = run_local(_rank_0_is_bad, 3)
    assert [len(lines) for lines in everybody] == [0, 1, 0]


def _rank_0_is_bad(rank, report):
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("draco_ext").addHandler(handler)
    model = DistributedDataParallel(nn.Linear(4, 2))
    draco_ext.protect(model, RepetitionCode(3, 1), adversary=(lambda step, z: -z) if rank == 0 else None)
    model(torch.ones(2, 4)).sum().backward()
    everybody = [None] * 3
    dist.all_gather_object(everybody, lines)
    report(everybody)


def test_comparing_inputs_asks_for_each_assignment_once(monkeypatch):
    code, asked = CyclicCode(255, 2), []
    assignment = CyclicCode.assignment
    monkeypatch.setattr(CyclicCode, "assignment", lambda self, worker: asked.append(worker) or assignment(self, worker))
    rows = torch.tensor([assignment(code, worker) for worker in range(255)])[:, :, None, None].expand(255, 5, 2, 2)
    assert inputs.compare_inputs(rows, code, range(255)) == []
    assert len(asked) == 255


@dataclass
class Sample:
    values: object


class Graph:
    """As of a library: tensors in attributes, and a path that is this host's."""

    def __init__(self, values, path):
        self.values, self.path, self.self = values, path, self


def _nested(*sizes):
    return torch.nested.nested_tensor([torch.ones(size, 2) for size in sizes], layout=torch.jagged)


DATA = [
    None,
    1,
    1.0,
    "1",
    b"1",
    torch.ones(2),
    torch.ones(2, 1),
    torch.ones(2, dtype=torch.float64),
    torch.ones(2, dtype=torch.complex64).conj(),
    torch.tensor([1j, 1]).conj(),
    torch.empty(0),
    torch.eye(4).to_sparse(),
    torch.ones(4, 4).to_sparse(),
    torch.eye(4).to_sparse_csr(),
    2 * torch.eye(4).to_sparse_csr(),
    torch.ones(4, 4).to_sparse_csc(),
    torch.eye(4).to_sparse_bsr((2, 2)),
    _nested(2, 1),
    _nested(1, 2),
    np.ones(2),
    np.float32(3),
    np.array(["a", 1], dtype=object),
    np.array(["b", 1], dtype=object),
    {"a": torch.ones(3)},
    {"b": torch.ones(3)},
    UserDict(a=torch.ones(4)),
    [torch.ones(3)],
    deque([torch.ones(3)]),
    {"x", "y"},
    Sample("x"),
    Sample("y"),
    Sample([torch.zeros(2)]),
    Graph(torch.ones(2), "here"),
    Graph(torch.zeros(2), "here"),
]


@pytest.mark.filterwarnings("ignore:Sparse")
def test_fingerprints_tell_all_data_apart():
    prints = [tuple(fingerprint(value).tolist()) for value in DATA]
    for (i, one), (j, other) in itertools.combinations(enumerate(prints), 2):
        assert one != other, (DATA[i], DATA[j])
    assert [tuple(fingerprint([value]).tolist()) for value in DATA] != prints
    for value, expected in zip(DATA, prints, strict=True):
        assert tuple(fingerprint(value).tolist()) == expected
    assert torch.equal(fingerprint(Graph(torch.ones(2), "there")), fingerprint(Graph(torch.ones(2), "here")))
    assert torch.equal(fingerprint(torch.ones(3, 2).T), fingerprint(torch.ones(2, 3)))


def _draws():
    return [torch.rand(()).item(), random.random(), float(np.random.rand())]


def _seeded(rank, report):
    """A script that seeds every rank differently, and draws noise in its loop."""
    torch.set_num_threads(1)
    gathered = [None] * 6
    for code, bad in ((RepetitionCode(6, 1), None), (RepetitionCode(6, 1), 1), (CyclicCode(6, 1), None)):
        torch.manual_seed(7 + rank)
        random.seed(7 + rank)
        np.random.seed(7 + rank)
        model = DistributedDataParallel(Net(), broadcast_buffers=False)
        model.module.first.weight.data.fill_(0.1)
        guard = draco_ext.protect(model, code, adversary=(lambda step, z: -z) if rank == bad else None)
        draws = {(-1, code.assignment(guard.worker)[0]): _draws()}
        ones = [torch.ones(4, 4)] * 3 * len(code.assignment(guard.worker))

        def take(step, part, x, model=model, draws=draws):
            draws[step, part] = _draws()
            (model(x + torch.randn(x.shape)).sum() * random.random()).backward()

        if isinstance(code, RepetitionCode):
            for step, x in enumerate(ones):
                if step == 2:  # as from a checkpoint
                    state = guard.state_dict()
                    torch.manual_seed(rank)
                    guard.load_state_dict(state)
                model.zero_grad()
                take(step, code.assignment(guard.worker)[0], x)
        else:
            for step, parts in enumerate(guard.steps(ones)):
                model.zero_grad()
                for part, x in zip(code.assignment(guard.worker), parts, strict=True):
                    take(step, part, x)
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()]).tolist()
        dist.all_gather_object(gathered, (draws, sorted(guard.report().suspects), gradient))
        report(list(gathered))


def test_draws_outside_the_model_agree_within_a_part():
    clean, attacked, cyclic = run_local(_seeded, 6)
    for everybody in (clean, attacked, cyclic):
        of_parts = {}
        for draws, suspects, gradient in everybody:
            assert suspects == ([1] if everybody is attacked else [])
            assert gradient == everybody[0][2]
            for key, numbers in draws.items():
                assert of_parts.setdefault(key, numbers) == numbers
        assert len({tuple(numbers) for numbers in of_parts.values()}) == len(of_parts)  # other parts draw others
    assert clean[0][2] == attacked[0][2]
    assert clean[0][0] == attacked[0][0]


def _draws_alone(rank, report):
    """A script whose rank 0 evaluates between epochs, and looks at a mini-batch first."""
    torch.set_num_threads(1)
    model = DistributedDataParallel(torch.nn.Linear(4, 1))
    code = RepetitionCode(3, 1)
    guard = draco_ext.protect(model, code)
    sampler = draco_ext.RedundantBatchSampler(12, code, batch_size=2, rank=rank)
    loader = DataLoader(TensorDataset(torch.ones(12, 4)), batch_sampler=sampler)
    if rank == 0:
        next(iter(loader))
    draws = []
    for _ in range(2):
        iter(sampler)
        draws.append(_draws())  # with which a loader's workers begin
        for i, (x,) in enumerate(loader):
            draws.append(_draws())
            with model.no_sync() if i % 2 == 0 else contextlib.nullcontext():
                model(x + torch.randn(x.shape)).sum().backward()
        if rank == 0:
            _draws()
    gathered = [None] * 3
    dist.all_gather_object(gathered, (draws, sorted(guard.report().suspects)))
    report(gathered)


def test_what_one_rank_draws_alone_accuses_nobody():
    [everybody] = run_local(_draws_alone, 3)
    draws, suspects = everybody[0]
    assert suspects == []
    assert everybody == [everybody[0]] * 3
    of_batches = [tuple(numbers) for i, numbers in enumerate(draws) if i % 7]
    assert len(set(of_batches)) == 12  # accumulated ones, too


def check_doctor(said):
    assert said.count("gradients are bit-reproducible, on each rank and across ranks") == 1
    assert len([line for line in said.splitlines() if torch.__version__ in line]) == 2


def _doctor(rank, port, folder):
    """What torchrun starts, in a process that has imported torch already."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ |= {name: str(number) for name, number in numbers.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    with open(folder / f"{rank}", "w") as out, contextlib.redirect_stdout(out):
        commands.draco(["doctor"], standalone_mode=False)


def test_doctor_on_the_ranks_of_a_job(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.start_processes(_doctor, (port, tmp_path), nprocs=2, start_method="forkserver")
    said = [(tmp_path / f"{rank}").read_text() for rank in range(2)]
    check_doctor(said[0])
    assert said[1] == ""


@pytest.mark.long
def test_doctor_under_torchrun():
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "draco_ext.cli", "doctor"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    run = subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    check_doctor(run.stdout)


def test_doctor_says_what_is_wrong(monkeypatch):
    facts = [doctor.Facts("here", "a processor", "avx2", "2.13.0", threads, "3.11") for threads in (1, 1, 2)]
    result = SelfTest(False, "0.weight", (2,), "use the same number of threads")
    monkeypatch.setattr(doctor, "diagnose", lambda workers: doctor.Diagnosis(facts, result))
    run = CliRunner().invoke(commands.draco, ["doctor"])
    assert run.exit_code == 1
    assert "the gradient of 0.weight is not bit-reproducible on ranks [2]: use the same number of threads" in run.output


def _switched(rank, report):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)))
    guard = draco_ext.protect(model, RepetitionCode(3, 1))
    model.eval()
    model.module.train()  # as Lightning does after a validation
    for _ in range(4):
        torch.rand(rank + 1)  # what ranks draw alone
        model(torch.ones(8, 4)).sum().backward()
    report(guard.report())


def test_a_model_of_which_only_the_module_trains_draws_alike():
    [report] = run_local(_switched, 3)
    assert report.steps == 4
    assert report.suspects == {}
    assert not report.failed_steps
