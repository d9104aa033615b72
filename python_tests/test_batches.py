"""Which samples every step and rank uses, and which worker a rank is."""

import itertools

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from draco_ext import CyclicCode, RedundantBatchSampler, RepetitionCode
from draco_ext.distributed.batches import GlobalBatches
from draco_ext.distributed.placement import ranks_per_host, worker_of

CODES = [RepetitionCode(6, 1), RepetitionCode(8, 1), RepetitionCode(3, 0), CyclicCode(7, 2), CyclicCode(4, 0)]


def samplers(code, batch_size=56 * 3, samples=1000, **options):
    return [RedundantBatchSampler(samples, code, batch_size=batch_size, rank=j, **options) for j in range(code.workers)]


def steps_of(sampler, code):
    """Of the next epoch, a dict of parts for every step."""
    parts = code.assignment(sampler.worker)
    batches = list(sampler)
    assert len(batches) == len(sampler)
    return [dict(zip(parts, step, strict=True)) for step in zip(*[iter(batches)] * len(parts), strict=True)]


def test_batches_depend_on_nothing_but_seed_and_step():
    batches = GlobalBatches(100, 30, seed=1)
    first = [batches.indices(step) for step in range(7)]
    again = GlobalBatches(100, 30, seed=1)
    for step in (6, 0, 3, 2):
        assert torch.equal(again.indices(step), first[step])
    # An epoch repeats no sample; the next one is in another order.
    assert len(torch.cat(first[:3]).unique()) == 90
    assert not torch.equal(first[0], first[3])
    assert not torch.equal(first[0], GlobalBatches(100, 30, seed=2).indices(0))


@pytest.mark.parametrize("parts", [1, 3, 7, 30])
def test_parts_make_up_the_batch(parts):
    batches = GlobalBatches(100, 30, seed=1)
    cut = [batches.part(2, part, parts) for part in range(parts)]
    assert torch.equal(torch.cat(cut), batches.indices(2))
    assert {len(part) for part in cut} <= {30 // parts, -(-30 // parts)}


@pytest.mark.parametrize("batch_size", [0, 101])
def test_batches_of_impossible_size(batch_size):
    with pytest.raises(ValueError, match=f"batch_size must be from 1 to 100, got {batch_size}"):
        GlobalBatches(100, batch_size, seed=0)


@pytest.mark.parametrize("code", CODES, ids=repr)
@pytest.mark.parametrize("hosts", [1, 2, 3])
def test_ranks_that_share_a_part_get_the_same(code, hosts):
    if code.workers % hosts:
        pytest.skip("hosts of different size")
    ranks = samplers(code, ranks_per_host=code.workers // hosts)
    assert sorted(rank.worker for rank in ranks) == list(range(code.workers))
    seen = []
    for _ in range(2):  # epochs
        for parts_of_ranks in zip(*(steps_of(rank, code) for rank in ranks), strict=True):
            batch = {}
            for parts in parts_of_ranks:
                for part, indices in parts.items():
                    assert batch.setdefault(part, indices) == indices
            assert set(batch) == set(range(code.parts))
            assert {len(indices) for indices in batch.values()} == {168 // code.parts}
            whole = list(itertools.chain(*batch.values()))
            assert len(set(whole)) == 168
            seen.append(whole)
    epochs = [list(itertools.chain(*seen[:5])), list(itertools.chain(*seen[5:]))]
    assert [len(set(epoch)) for epoch in epochs] == [5 * 168] * 2
    assert epochs[0] != epochs[1]
    assert set(epochs[0]) | set(epochs[1]) <= set(range(1000))


def test_seeds_differ():
    first, second = (list(RedundantBatchSampler(50, CODES[0], batch_size=10, rank=0, seed=seed)) for seed in (0, 1))
    assert first != second


@pytest.mark.parametrize("code", CODES, ids=repr)
@pytest.mark.parametrize("taken", [0, 1, 4, 5, 7])
def test_resumes_in_another_process(code, taken):
    sampler, fresh = (RedundantBatchSampler(1000, code, batch_size=168, rank=1, seed=4) for _ in range(2))
    each = len(code.assignment(1))
    stream = (batch for _ in range(2) for batch in sampler)
    for _ in range(taken * each):
        next(stream)
    state = sampler.state_dict()
    assert state == {"samples": 1000, "batch_size": 168, "parts": code.parts, "seed": 4, "step": taken}
    fresh.load_state_dict(state)
    assert list(fresh) == list(itertools.islice(stream, (5 - taken % 5) * each))
    assert fresh.step == 5 * (taken // 5 + 1)


def test_set_epoch():
    sampler = RedundantBatchSampler(50, CODES[0], batch_size=10, rank=0)
    epochs = [list(sampler) for _ in range(3)]
    sampler.set_epoch(1)
    assert list(sampler) == epochs[1]
    assert list(sampler) == epochs[2]


@pytest.mark.parametrize("workers", [0, 2])
def test_in_a_data_loader(workers):
    dataset = TensorDataset(torch.arange(60))
    code = CyclicCode(5, 1)
    batches = RedundantBatchSampler(len(dataset), code, batch_size=20, rank=2)
    same = RedundantBatchSampler(len(dataset), code, batch_size=20, rank=2)
    loader = DataLoader(dataset, batch_sampler=batches, num_workers=workers)
    assert len(loader) == 9
    for _ in range(2):
        assert [x.tolist() for (x,) in loader] == list(same)


def test_wrong_arguments():
    code = RepetitionCode(6, 1)
    good = {"batch_size": 10, "rank": 0}
    for error, message, wrong in [
        (ValueError, "batch_size must be a multiple of the code's 2 parts, got 11", {"batch_size": 11}),
        (ValueError, "batch_size must be from 1 to 50, got 52", {"batch_size": 52}),
        (TypeError, "batch_size must be an int, got float", {"batch_size": 10.0}),
        (ValueError, "rank must be from 0 to 5, got 6", {"rank": 6}),
        (TypeError, "rank must be an int, got NoneType", {"rank": None}),
        (ValueError, "seed must be at least 0, got -1", {"seed": -1}),
        (ValueError, "ranks_per_host must divide the 6 workers, got 4", {"ranks_per_host": 4}),
        (ValueError, "ranks_per_host must be from 1 to 6, got 0", {"ranks_per_host": 0}),
    ]:
        with pytest.raises(error, match=message):
            RedundantBatchSampler(50, code, **{**good, **wrong})
    with pytest.raises(TypeError, match="code must be a RepetitionCode or CyclicCode, got int"):
        RedundantBatchSampler(50, 6, **good)
    sampler = RedundantBatchSampler(50, code, **good)
    for name, value in (("seed", 1), ("samples", 51), ("batch_size", 12), ("parts", 6)):
        with pytest.raises(ValueError, match=f"state must be of a sampler with {name}=.*, got {name}={value}"):
            sampler.load_state_dict({**sampler.state_dict(), name: value})
    with pytest.raises(ValueError, match="epoch must be at least 0, got -1"):
        sampler.set_epoch(-1)


@pytest.mark.parametrize("hosts", [2, 3, 4, 6])
@pytest.mark.parametrize("s", [1, 2])
@pytest.mark.parametrize("kind", [RepetitionCode, CyclicCode])
def test_holders_of_a_part_are_spread_over_hosts(kind, s, hosts):
    for per_host in range(1, 9):
        n = hosts * per_host
        if n < 2 * s + 1:
            continue
        code = kind(n, s)
        on_host = [rank // per_host for rank in sorted(range(n), key=lambda r: worker_of(r, code, per_host))]
        for part in range(code.parts):
            holders = [on_host[j] for j in range(n) if part in code.assignment(j)]
            most = max(holders.count(host) for host in range(hosts))
            assert most <= -(-len(holders) // hosts) + (kind is CyclicCode), (n, s, hosts, part)


def test_what_torchrun_says(monkeypatch):
    code = RepetitionCode(6, 1)

    def told(**environment):
        for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return ranks_per_host(code)

    assert told() == 6
    assert told(WORLD_SIZE="6", LOCAL_WORLD_SIZE="6") == 6
    assert told(WORLD_SIZE="6", LOCAL_WORLD_SIZE="3") == 3
    assert RedundantBatchSampler(50, code, batch_size=10, rank=1).worker == 2
    assert told(WORLD_SIZE="6", LOCAL_WORLD_SIZE="4") == 6  # hosts of different size
    assert told(WORLD_SIZE="8", LOCAL_WORLD_SIZE="4") == 6  # another job
    assert told(WORLD_SIZE="six", LOCAL_WORLD_SIZE="3") == 6
