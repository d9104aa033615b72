"""Which samples every step and rank uses, and which worker a rank is."""

import contextlib
import functools
import itertools
import socket
from datetime import timedelta

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import draco_ext
from draco_ext import CyclicCode, RedundantBatchSampler, RepetitionCode
from draco_ext.testing.local import run_local
from draco_ext.training.placement import announce_host, arrange, pair_prices, place_ranks, read_names
from draco_ext.training.sampler import GlobalBatches, announce_guard, step_taken

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


def in_steps(mini_batches, parts):
    return list(zip(*[iter(mini_batches)] * parts, strict=True))


class Loop:
    """What a guard does to samplers, without ranks: takes the steps of a loader, or of a sampler itself."""

    def __init__(self, code):
        self.code = code
        announce_guard(self, code)

    def seed_mini_batch(self):
        pass

    def steps(self, loader, parts=1, accumulate=1):
        mini_batches = iter(loader)
        while step := list(itertools.islice(mini_batches, parts * accumulate)):
            yield step
            step_taken(self, self.code, accumulate)


@pytest.mark.parametrize("code", CODES, ids=repr)
@pytest.mark.parametrize("taken", [0, 1, 4, 5, 7])
def test_resumes_in_another_process(code, taken):
    sampler, fresh = (RedundantBatchSampler(1000, code, batch_size=168, rank=1, seed=4) for _ in range(2))
    parts, loop = len(code.assignment(1)), Loop(code)
    stream = (step for _ in range(2) for step in loop.steps(sampler, parts))
    for _ in zip(range(taken), stream, strict=False):
        pass
    if taken:  # the generator stands before its last step is taken
        step_taken(loop, code, 1)
    state = sampler.state_dict()
    assert state == {"samples": 1000, "batch_size": 168, "parts": code.parts, "seed": 4, "step": taken}
    fresh.load_state_dict(state)
    assert list(fresh) == list(itertools.chain(*itertools.islice(stream, 5 - taken % 5)))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("code", [CODES[0], CODES[3]], ids=repr)
def test_moves_with_the_steps_of_the_guard(code, workers):
    """Not with what it is asked for: looking costs nothing, and every epoch is whole, whoever reads ahead."""
    parts = len(code.assignment(0))
    dataset = TensorDataset(torch.arange(140))
    alone = RedundantBatchSampler(140, code, batch_size=14, rank=0)
    epochs = [in_steps(alone, parts) for _ in range(3)]
    sampler = RedundantBatchSampler(140, code, batch_size=14, rank=0)
    loader = DataLoader(dataset, batch_sampler=sampler, num_workers=workers)
    loop = Loop(code)

    def run(most=None):
        """The steps of a pass, or at most so many; in the middle another mini-batch is looked at."""
        seen = []
        for step in loop.steps(loader, parts):
            assert not seen or sampler.step == before + len(seen)
            if len(seen) == 2:
                next(iter(loader))
            seen.append(tuple(x.tolist() for (x,) in step))
            if len(seen) == most:
                step_taken(loop, code, 1)
                break
        return seen

    before = 0
    assert len(list(loader)) == 10 * parts  # a whole pass that nobody trains on
    kept = iter(loader)
    next(kept)
    assert sampler.step == 0
    assert run() == epochs[0]
    assert sampler.step == before + 10
    before = 10
    assert run(most=4) == epochs[1][:4]
    assert sampler.state_dict()["step"] == 14
    fresh = RedundantBatchSampler(140, code, batch_size=14, rank=0)
    fresh.load_state_dict(sampler.state_dict())
    assert in_steps(fresh, parts) == epochs[1][4:]
    next(iter(loader))
    assert sampler.step == 14
    before = 20
    assert run() == epochs[2]
    assert sampler.step == 30


def test_gradient_accumulation_and_two_samplers():
    code = CODES[0]
    one, other = (RedundantBatchSampler(120, code, batch_size=10, rank=0, seed=seed) for seed in range(2))
    loop = Loop(code)
    steps = loop.steps(one, accumulate=3)
    next(steps)
    next(steps)
    assert (one.step, other.step) == (3, 0)
    del steps  # in the middle of a step
    both = loop.steps(zip(one, other, strict=True))
    next(both)
    step_taken(loop, RepetitionCode(8, 1), 1)  # of another code
    assert (one.step, other.step) == (3, 0)
    next(both)
    assert (one.step, other.step) == (13, 1)  # the one began its next epoch


def test_two_guards_in_a_loop():
    """Two models in a loop, as of a GAN: a mini-batch counts once, also where workers have read ahead."""
    code = CODES[0]
    sampler = RedundantBatchSampler(60, code, batch_size=10, rank=0)
    loops = [Loop(code), Loop(code)]
    positions = []
    for epoch in range(2):
        mini_batches = iter(sampler)
        ahead = list(itertools.islice(mini_batches, 3))
        for _ in range(6):
            ahead.extend(itertools.islice(mini_batches, 1))  # the last ones are asked for nothing more
            for loop in loops:
                step_taken(loop, code, 1)
            positions.append(sampler.step)
        assert sampler.step == 6 * (epoch + 1)
    assert positions == list(range(1, 13))


def _peeks_and_breaks(rank, report):
    """Six ranks on two hosts by name, one of which looks at mini-batches."""
    torch.set_num_threads(1)
    socket.gethostname = lambda: "alpha" if rank < 4 else "beta"
    code = RepetitionCode(6, 1)
    make_sampler = functools.partial(RedundantBatchSampler, 60, code, batch_size=12, rank=rank)
    if rank % 2 == 0:  # before protect, and even used before
        sampler = make_sampler()
    else:
        announce_host(code)
    if rank == 0:
        next(iter(sampler))
    model = DistributedDataParallel(torch.nn.Linear(1, 1))
    guard = draco_ext.protect(model, code)
    if rank % 2:
        sampler = make_sampler()
    loader = DataLoader(TensorDataset(torch.arange(60.0)[:, None]), batch_sampler=sampler)
    seen, kept = [], []
    for most in (3, 5, 5):
        for i, (x,) in enumerate(loader):
            if rank == 0:
                kept.append(iter(loader))
                next(kept[-1])
            with model.no_sync() if i == 0 else contextlib.nullcontext():
                model(x).sum().backward()
            seen += x.flatten().tolist()
            if i + 1 == most:
                break
        seen.append(sampler.step)
    everybody = [None] * 6
    torch.distributed.all_gather_object(everybody, (sampler.workers, guard.worker, seen))
    report((everybody, guard.report().suspects))
    model = DistributedDataParallel(torch.nn.Linear(1, 1))
    draco_ext.protect(model, code)
    for [i, *_] in make_sampler(ranks_per_host=6):
        with pytest.raises(ValueError, match="ranks_per_host must be the same for protect and RedundantBatchSampler"):
            model(torch.tensor([[float(i)]]))
        break


def test_all_ranks_agree_whoever_looks():
    [(everybody, suspects)] = run_local(_peeks_and_breaks, 6)
    assert suspects == {}
    code = RepetitionCode(6, 1)
    placed = arrange(code, ("alpha",) * 4 + ("beta",) * 2)
    alone = RedundantBatchSampler(60, code, batch_size=12, rank=0, ranks_per_host=[4, 2])
    epochs = [[*alone] for _ in range(3)]
    for rank, (workers, worker, seen) in enumerate(everybody):
        assert workers == placed
        assert worker == placed[rank]
        assert [seen[18], seen[18 + 31], seen[-1]] == [3, 10, 15]
    assert everybody[0][2][:18] == [float(i) for batch in epochs[0][:3] for i in batch]
    assert everybody[0][2][19:49] == [float(i) for batch in epochs[1] for i in batch]


def test_set_epoch():
    sampler = RedundantBatchSampler(50, CODES[0], batch_size=10, rank=0)
    epochs = [list(sampler) for _ in range(3)]
    next(iter(sampler))
    assert sampler.step == 15
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
        (ValueError, r"ranks_per_host must add up to the 6 workers, got \[4, 1\]", {"ranks_per_host": [4, 1]}),
        (ValueError, "ranks_per_host must be from 1 to 6, got 0", {"ranks_per_host": [6, 0]}),
        (TypeError, "ranks_per_host must be an int, got str", {"ranks_per_host": "4+2"}),
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


def hosts_of(sizes):
    return tuple(str(host) for host, size in enumerate(sizes) for _ in range(size))


@pytest.mark.parametrize("hosts", [2, 3, 4, 6])
@pytest.mark.parametrize("s", [1, 2])
@pytest.mark.parametrize("kind", [RepetitionCode, CyclicCode])
def test_holders_of_a_part_are_spread_over_hosts(kind, s, hosts):
    for per_host in range(1, 9):
        n = hosts * per_host
        if n < 2 * s + 1:
            continue
        code = kind(n, s)
        workers = place_ranks(code, per_host)
        assert workers == place_ranks(code, [per_host] * hosts)
        on_host = [rank // per_host for rank in sorted(range(n), key=workers.__getitem__)]
        for part in range(code.parts):
            holders = [on_host[j] for j in range(n) if part in code.assignment(j)]
            most = max(holders.count(host) for host in range(hosts))
            assert most <= -(-len(holders) // hosts) + (kind is CyclicCode), (n, s, hosts, part)


def partitions(n, largest=None):
    if n == 0:
        yield ()
    for first in range(min(n, largest or n), 0, -1):
        for rest in partitions(n - first, first):
            yield first, *rest


def conflicts(code, hosts, workers):
    """Over pairs of ranks on one host: parts that they share, and how many stand side by side."""
    parts = [set(code.assignment(j)) for j in workers]
    pairs = [(a, b) for a, b in itertools.combinations(range(code.workers), 2) if hosts[a] == hosts[b]]
    beside = sum((workers[a] - workers[b]) % code.workers in (1, code.workers - 1) for a, b in pairs)
    return sum(len(parts[a] & parts[b]) for a, b in pairs), beside


@pytest.mark.parametrize("n", [4, 6, 7])
def test_no_placement_on_the_circle_is_better(n):
    """Against all there are, for hosts of all sizes."""
    for s in range(1, (n - 1) // 2 + 1):
        code = CyclicCode(n, s)
        for sizes in partitions(n):
            hosts = hosts_of(sizes)
            workers = arrange(code, hosts)
            assert sorted(workers) == list(range(n))
            everyone = (conflicts(code, on, range(n)) for on in set(itertools.permutations(hosts)))
            assert conflicts(code, hosts, workers) == min(everyone), f"{code}, hosts of {sizes}"


@pytest.mark.parametrize("sizes", [(4, 2), (2, 4), (5, 1), (3, 2, 1), (1, 1, 9), (7, 7, 3), (8,) * 5 + (3,)])
@pytest.mark.parametrize("s", [1, 2])
def test_hosts_of_different_size(s, sizes):
    n, hosts = sum(sizes), hosts_of(sizes)
    repetition, cyclic = RepetitionCode(n, s), CyclicCode(n, s)
    workers = place_ranks(repetition, sizes)
    assert sorted(workers) == list(range(n))
    for host, size in enumerate(sizes):
        groups = [repetition.assignment(workers[rank])[0] for rank in range(n) if hosts[rank] == str(host)]
        shares = [groups.count(group) for group in range(repetition.parts)]
        assert max(shares) - min(shares) <= 1, f"host {host} of {size} ranks"
    workers = place_ranks(cyclic, sizes)
    assert sorted(workers) == list(range(n))
    # No worse than hosts in a row, in what they share, and apart where there is room.
    shared, beside = conflicts(cyclic, hosts, workers)
    row_shared, row_beside = conflicts(cyclic, hosts, range(n))
    assert shared <= row_shared
    assert beside < row_beside or n <= 6 or max(sizes) > n / 2


def test_ranks_of_a_host_stand_apart():
    code = CyclicCode(64, 5)
    assert conflicts(code, hosts_of([8] * 8), place_ranks(code, 8)) == (192, 2)
    assert conflicts(code, hosts_of([8] * 8), range(64)) == (192, 56)
    prices = pair_prices(code)
    assert prices[1:].sum() < prices[1] + (64 * 10 + 1) * 64**2  # nearness never outweighs a part


def test_hosts_tell_their_names_through_the_store():
    store = torch.distributed.HashStore()
    for rank, host in enumerate(["alpha", "alpha", "beta"]):
        store.set(f"draco_ext/host/{rank}", host)
    assert read_names(store, 3) == ("alpha", "alpha", "beta")
    with pytest.raises(RuntimeError, match=r"ranks \[3, 4\] have not said on which host they are within 0.01 s"):
        read_names(store, 5, timedelta(seconds=0.01))
    store.set("draco_ext/host/1", "al\0pha")
    with pytest.raises(RuntimeError, match="got something else from rank 1"):
        read_names(store, 3)


def test_assignment_makes_no_table_of_all_parts():
    """One of 30000 workers: a table would have 900 million entries."""
    assert CyclicCode(30000, 1).assignment(3) == (3, 10003, 20003)
    for code in (CyclicCode(7, 2), CyclicCode(10, 3), CyclicCode(64, 5), CyclicCode(9, 0)):
        for j in range(code.workers):
            assert code.assignment(j) == tuple((code.supports == j).any(1).nonzero()[0])


def test_what_torchrun_says(monkeypatch):
    code = RepetitionCode(6, 1)

    def told(**environment):
        for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return place_ranks(code)

    one_host = tuple(range(6))
    assert told() == one_host
    assert told(WORLD_SIZE="6", LOCAL_WORLD_SIZE="6") == one_host
    assert told(WORLD_SIZE="6", LOCAL_WORLD_SIZE="3") == place_ranks(code, 3) == (0, 3, 1, 4, 2, 5)
    assert RedundantBatchSampler(50, code, batch_size=10, rank=1).worker == 3
    assert told(WORLD_SIZE="6", LOCAL_WORLD_SIZE="4") == one_host  # hosts of different size
    assert told(WORLD_SIZE="8", LOCAL_WORLD_SIZE="4") == one_host  # another job
    assert told(WORLD_SIZE="six", LOCAL_WORLD_SIZE="3") == one_host
