"""`protect` with a SolonCode over gloo: messages that are shorter than the gradient, through the server alone."""

import pytest
import torch
import torch.distributed as dist
from test_protect import HONEST, Injector, attempt, network, same_everywhere, train
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import draco_ext
from draco_ext import CyclicCode, SolonCode
from draco_ext.testing.local import run_local
from draco_ext.training.api import _check_short_messages

STEPS = 4
INJECTORS = (HONEST, Injector("reversed", (1,), moves=2), Injector("nan", (3,)), Injector("plus one", (0,), every=2))


def _runs(rank, report, code):
    for injector in INJECTORS:
        rows, guard, outcomes = train(rank, code, "server", injector=injector, steps=STEPS)
        report((same_everywhere(rows), rows[0].tolist(), guard.report(), set(outcomes)))
    # The same run with whole messages.
    rows, _, _ = train(rank, CyclicCode(code.workers, 1), "server", steps=STEPS)
    report((same_everywhere(rows), rows[0].tolist(), None, {None}))


def test_bad_ranks_change_nothing():
    code = SolonCode(6, 1, compression=3)
    *results, (_, whole, _, _) = run_local(_runs, code.workers, code)
    clean = torch.tensor(results[0][1])
    for (same, parameters, report, outcomes), injector in zip(results, INJECTORS, strict=True):
        assert same
        assert outcomes == {None}
        assert (torch.tensor(parameters) - clean).norm() / clean.norm() < 1e-5, injector
        found = {suspect.worker: suspect.steps for suspect in report.suspects.values()}
        bad = {j: [step for step in range(STEPS) if injector.at(j, step, code.workers)] for j in range(code.workers)}
        assert found == {j: wrong for j, wrong in bad.items() if wrong}, injector
        assert report.trust.startswith("server")
    # Parts are the same, and dropout is: it is a training of the same batches.
    assert (torch.tensor(whole) - clean).norm() / clean.norm() < 1e-5


def _too_many(rank, report):
    code = SolonCode(4, 1, compression=2)

    def adversary(step, message):
        return torch.full_like(message, float(rank + step)) if rank in (1, 3) and step == 1 else message

    rows, guard, outcomes = train(rank, code, "server", custom=adversary, steps=3)
    report((same_everywhere(rows), outcomes, guard.report().failed_steps, rows.isfinite().all().item()))


def test_too_many_bad_ranks_stop_all():
    [(same, outcomes, failed, finite)] = run_local(_too_many, 4)
    assert same
    assert finite
    assert failed == (1,)
    assert [outcome is None for outcome in outcomes] == [True, False, True]


def test_a_sharded_model_is_refused():
    with pytest.raises(ValueError, match="model must be a DistributedDataParallel for SolonCode"):
        _check_short_messages(nn.Linear(1, 1), SolonCode(4, 1, compression=2), "server")


def _refused(rank, report):
    code = SolonCode(4, 1, compression=2)
    words = []
    for options in ({}, {"transport": "verified"}, {"transport": "allgather"}):
        with pytest.raises(ValueError, match="transport must be 'server' for SolonCode") as refused:
            draco_ext.protect(DistributedDataParallel(network()), code, **options)
        words.append(str(refused.value))
    # A bucket that is smaller than its padding.
    model = DistributedDataParallel(nn.Linear(1, 1, bias=False))
    guard = draco_ext.protect(model, code, transport="server", adversary=(lambda _, z: z + 5) if rank == 2 else None)
    for step in guard.steps([torch.full((1, 1), float(part)) for part in code.assignment(rank)]):
        attempt(lambda step=step: [model(x).sum().backward() for x in step])
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (model.module.weight.grad.item(), sorted(guard.report().suspects)))
    report((words, gathered))


def test_other_transports_are_refused_and_one_element_is_not():
    [(words, gathered)] = run_local(_refused, 4)
    for text, reason in zip(words, ("only one block", "go to all ranks", "go to all ranks"), strict=True):
        assert reason in text
    for gradient, suspects in gathered:
        assert gradient == pytest.approx(1.5, rel=1e-6)
        assert suspects == [2]
