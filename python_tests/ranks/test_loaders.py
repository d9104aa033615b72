"""Loaders of all kinds that are told which share of the data a rank loads, and the drop-in for DistributedSampler."""

import dataclasses
import hashlib
import itertools
import random

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

import draco_ext
from draco_ext import Audit, CyclicCode, RedundantSampler, RepetitionCode
from draco_ext.testing.local import run_local

RANKS, BAD = 6, 4
SAMPLES = 50  # not a multiple of anything below
EPOCHS = 2


class Noisy(Dataset):
    """Samples with their numbers, and noise that is drawn when they are loaded."""

    def __len__(self):
        return SAMPLES

    def __getitem__(self, index):
        noise = torch.rand(3) + random.random() + np.random.rand()
        return torch.arange(3.0) + index + noise, torch.tensor(index)


class Stream(IterableDataset):
    """A stream of which a rank takes every n-th sample, as `datasets.distributed.split_dataset_by_node` does it."""

    def __init__(self, rank, world_size):
        self.rank, self.world_size = rank, world_size

    def __iter__(self):
        for index in itertools.islice(range(SAMPLES - 2), self.rank, None, self.world_size):
            yield torch.arange(3.0) + index, torch.tensor(index)


# ------------------------------------------------------------------------------------- mini-batches of one share


def own_sampler(replicas, part, epoch, workers=0):
    sampler = DistributedSampler(Noisy(), replicas, part, seed=3)
    sampler.set_epoch(epoch)
    # In ranks that were forked from a server, the default is another server, which imports torch for seconds.
    context = "fork" if workers else None
    return DataLoader(Noisy(), 8, sampler=sampler, num_workers=workers, multiprocessing_context=context)


def sampler_and_workers(replicas, part, epoch):
    return own_sampler(replicas, part, epoch, workers=1)


def stream(replicas, part, epoch):
    return DataLoader(Stream(rank=part, world_size=replicas), 8)


def no_sampler(replicas, part, epoch):
    def get_batch(step, part):
        chosen = (torch.arange(4) * replicas + part + 5 * step) % SAMPLES
        return chosen[:, None] + torch.arange(3.0), chosen

    return (get_batch(step, part) for step in range(3))


def global_generator(replicas, part, epoch):
    """nanoGPT's: random places of a long text."""
    text = torch.arange(500)
    for _ in range(3):
        places = torch.randint(len(text) - 3, (4,)).tolist()
        yield torch.stack([text[i : i + 3] for i in places]).float(), torch.tensor(places)


def token_packed(replicas, part, epoch):
    """Documents of all lengths, joined and cut into blocks of 3 tokens; each share has its own documents."""
    lengths = [5, 7, 6, 4, 9, 8, 5, 8, 6, 8, 7, 9]
    documents = torch.arange(sum(lengths)).split(lengths)[part::replicas]
    blocks = torch.cat(documents).unfold(0, 3, 3)[: 24 // replicas]
    return ((block.float(), block[:, 0]) for block in blocks.split(2))


LOADERS = [own_sampler, sampler_and_workers, stream, no_sampler, global_generator, token_packed]
# With an Audit ranks load what they would load in plain DDP.
CASES = [(loader, code) for loader in LOADERS for code in ("repetition", "cyclic")] + [(own_sampler, "audit")]
LESS_OFTEN = CASES[3:12:4] + CASES[4:12:4]  # one code for each loader but the first; these in the long layer
CODES = {
    "repetition": RepetitionCode(RANKS, 1),
    "cyclic": CyclicCode(RANKS, 1),
    "audit": Audit(RANKS, 1, rate=1.0),
}


def redundant_sampler(code, rank):
    """The drop-in in a loop of its own, whose ranks also draw numbers alone."""
    dataset = Noisy()
    sampler = RedundantSampler(dataset, code, seed=3)
    loader = DataLoader(dataset, 8, sampler=sampler)
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        for i, batch in enumerate(loader):
            yield batch
            if rank == 0 and i % 2:
                torch.rand(3), random.random(), np.random.rand()  # as in an evaluation


def in_turn(loaders):
    """One mini-batch of each loader after the other."""
    return map(next, itertools.cycle(map(iter, loaders)))


# ------------------------------------------------------------------------------------------------------ training


def train(rank, code, loader, adversary=None):
    """Train; return the parameters' digest and the report, and the samples of each step, by part."""
    torch.manual_seed(0), random.seed(0), np.random.seed(0)  # an audit seeds nothing
    model = DistributedDataParallel(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Dropout(0.2), nn.Linear(4, 1)))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    guard = draco_ext.protect(model, code, adversary=adversary if rank == BAD else None)
    seen = []

    def learn(x, numbers):
        ((model(x).squeeze() - numbers) ** 2).mean().backward()
        seen.append(numbers.tolist())

    if loader is redundant_sampler:
        for x, numbers in redundant_sampler(code, rank):
            optimizer.zero_grad()
            learn(x, numbers)
            optimizer.step()
    else:
        for epoch in range(EPOCHS):
            if rank == 0:
                torch.rand(3), random.random(), np.random.rand()
            loaders = [loader(guard.data_replicas, part, epoch) for part in guard.data_ranks]
            for step in guard.steps(loaders[0] if len(loaders) == 1 else in_turn(loaders)):
                for x, numbers in step:
                    learn(x, numbers)
                optimizer.step()
    digest = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()
    everybody = [None] * RANKS
    dist.all_gather_object(everybody, (digest, guard.data_ranks, seen))
    return Trained([one[0] for one in everybody], dict(enumerate(one[1:] for one in everybody)), guard.report())


@dataclasses.dataclass
class Trained:
    digests: list
    seen: dict
    report: draco_ext.Report


def times_minus_two(step, value, kind=None):
    return -2 * value


def _train_all(rank, report, cases):
    torch.set_num_threads(1)
    for loader, code in cases:
        report((loader.__name__, code, [train(rank, CODES[code], loader, a) for a in (None, times_minus_two)]))


@pytest.fixture(scope="module")
def trained(request):
    long = request.config.getoption("--long")
    cases = [case for case in CASES if long or case not in LESS_OFTEN] + [(redundant_sampler, "repetition")]
    return {(loader, code): runs for loader, code, runs in run_local(_train_all, RANKS, cases)}


NAMES = [
    pytest.param(loader.__name__, code, marks=[pytest.mark.long] if (loader, code) in LESS_OFTEN else [])
    for loader, code in CASES
]


@pytest.mark.parametrize(("loader", "code"), [*NAMES, ("redundant_sampler", "repetition")])
def test_a_liar_changes_nothing(trained, loader, code):
    honest, lied_to = trained[loader, code]
    assert honest.report.suspects == {}
    assert not honest.report.failed_steps
    assert lied_to.report.suspects.keys() == {BAD}
    assert not lied_to.report.failed_steps
    assert lied_to.report.steps == honest.report.steps >= EPOCHS
    assert len(set(honest.digests)) == 1
    assert len(set(lied_to.digests)) == 1
    if code != "cyclic":  # which rounds
        assert honest.digests == lied_to.digests


@pytest.mark.parametrize(("loader", "code"), NAMES[:-1])
def test_each_share_is_loaded_by_its_ranks(trained, loader, code):
    honest, _ = trained[loader, code]
    of_part = {}
    for parts, seen in honest.seen.values():
        for i, part in enumerate(parts):
            assert of_part.setdefault(part, seen[i :: len(parts)]) == seen[i :: len(parts)]
    assert sorted(of_part) == list(range(CODES[code].parts))
    assert len({str(seen) for seen in of_part.values()}) == len(of_part)
    if loader == "own_sampler":
        first = [n for seen in of_part.values() for batch in seen[: len(seen) // EPOCHS] for n in batch]
        assert set(first) == set(range(SAMPLES))  # an epoch is whole, with the last incomplete batch


# ------------------------------------------------------------------------------------------------------ the drop-in


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
def test_redundant_sampler_is_a_distributed_sampler_of_parts(drop_last, shuffle):
    code = RepetitionCode(7, 1)
    options = {"shuffle": shuffle, "seed": 5, "drop_last": drop_last}
    for rank in range(7):
        sampler = RedundantSampler(Noisy(), code, rank=rank, **options)
        [part] = code.assignment(rank)
        plain = DistributedSampler(Noisy(), code.parts, part, **options)
        assert len(sampler) == len(plain)
        for epoch in (0, 3):
            sampler.set_epoch(epoch)
            plain.set_epoch(epoch)
            assert list(sampler) == list(plain)
    assert isinstance(sampler, DistributedSampler)


def test_redundant_sampler_places_ranks_on_hosts():
    code = RepetitionCode(6, 1)
    samplers = [RedundantSampler(Noisy(), code, rank=rank, ranks_per_host=3) for rank in range(6)]
    loaded = [tuple(sampler) for sampler in samplers]
    assert loaded[0] == loaded[2] == loaded[4]
    assert loaded[1] == loaded[3] == loaded[5]


def test_redundant_sampler_resumes_within_an_epoch():
    code = RepetitionCode(7, 1)

    def make(dataset=Noisy(), **options):  # noqa: B008
        return RedundantSampler(dataset, code, rank=4, seed=5, **options)

    sampler, fresh = make(), make()
    epochs = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        epochs.append(list(sampler))
    identity = {"samples": SAMPLES, "parts": 2, "shuffle": True, "drop_last": False, "seed": 5}
    assert sampler.state_dict() == {**identity, "epoch": 2, "yielded": 25}
    sampler.set_epoch(1)
    assert sampler.state_dict()["yielded"] == 0
    for _ in zip(range(9), DataLoader(Noisy(), 2, sampler=sampler), strict=False):
        pass
    state = sampler.state_dict()
    assert (state["epoch"], state["yielded"]) == (1, 18)

    fresh.load_state_dict(state)
    assert fresh.state_dict() == state
    assert iter(fresh) is not None  # a loader that was made, and asked for nothing yet
    assert fresh.state_dict() == state
    fresh.load_state_dict(state)
    fresh.set_epoch(1)  # as a script does that resumes
    rest = iter(fresh)
    assert fresh.state_dict() == state
    assert list(rest) == epochs[1][18:]
    assert fresh.state_dict()["yielded"] == 25
    assert list(fresh) == epochs[1]
    fresh.load_state_dict(state)
    fresh.set_epoch(2)  # another epoch is whole
    assert (fresh.state_dict()["epoch"], fresh.state_dict()["yielded"]) == (2, 0)
    assert list(fresh) == epochs[2]
    fresh.load_state_dict(state | {"yielded": 25})  # at the end of the epoch nothing is left
    assert list(fresh) == []

    for other, message in [
        ({"seed": 4}, "state must be of a sampler with seed=5, got seed=4"),
        ({"samples": 51}, "state must be of a sampler with samples=50, got samples=51"),
        ({"shuffle": False}, "state must be of a sampler with shuffle=True, got shuffle=False"),
        ({"parts": 3}, "state must be of a sampler with parts=2, got parts=3"),
        ({"yielded": 26}, r"state\['yielded'\] must be from 0 to 25, got 26"),
        ({"epoch": -1}, r"state\['epoch'\] must be at least 0, got -1"),
    ]:
        with pytest.raises(ValueError, match=message):
            fresh.load_state_dict(state | other)


def test_a_loader_with_workers_reads_ahead():
    """What the guide on checkpoints says of it."""
    sampler = RedundantSampler(Noisy(), RepetitionCode(3, 1), rank=0)
    loader = iter(DataLoader(Noisy(), 4, sampler=sampler, num_workers=2, multiprocessing_context="fork"))
    next(loader)
    assert sampler.state_dict()["yielded"] == 4 * (1 + 2 * 2)  # two mini-batches ahead for each worker


def _resume(rank, report):
    """Break off within an epoch, and go on with all that was made anew."""
    torch.set_num_threads(1)
    code, bits = RepetitionCode(3, 1), []
    for resumes in (False, True):
        state, taken = None, 0
        for _ in range(1 + resumes):
            torch.manual_seed(0)
            net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.2), nn.Linear(4, 1))
            model = DistributedDataParallel(net)
            optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)
            guard = draco_ext.protect(model, code, adversary=times_minus_two if rank == 1 else None)
            sampler = RedundantSampler(Noisy(), code, seed=3)
            loader = DataLoader(Noisy(), 8, sampler=sampler)
            if state is not None:
                guard.load_state_dict(state["guard"])
                net.load_state_dict(state["net"])
                sampler.load_state_dict(state["sampler"])
            for epoch in range(sampler.epoch, 2):
                sampler.set_epoch(epoch)
                for x, numbers in loader:
                    optimizer.zero_grad()
                    ((model(x).squeeze() - numbers) ** 2).mean().backward()
                    optimizer.step()
                    taken += 1
                    if resumes and state is None and taken == 10:  # in the second epoch of seven
                        break
            torch.rand(rank)  # a rank may draw numbers alone
            state = {"guard": guard.state_dict(), "net": net.state_dict(), "sampler": sampler.state_dict()}
        bits.append((taken, [p.tolist() for p in net.parameters()], sorted(guard.report().suspects)))
    report(bits)


def test_redundant_sampler_resumes_with_the_same_bits():
    """Noise of the data set and dropout included."""
    [(whole, resumed)] = run_local(_resume, 3)
    assert whole == resumed
    assert whole[0] == 14
    assert whole[2] == [1]


def test_redundant_sampler_refuses():
    code = RepetitionCode(6, 1)
    for error, message, arguments in [
        (
            ValueError,
            r"code must have one part for each rank, got Cyclic.*RedundantBatchSampler",
            [CyclicCode(6, 1)],
        ),
        (TypeError, "code must be a RepetitionCode, got Audit", [Audit(6, 1, 0.1)]),
    ]:
        with pytest.raises(error, match=message):
            RedundantSampler(Noisy(), *arguments, rank=0)
    for error, message, options in [
        (ValueError, "rank must be from 0 to 5, got 6", {"rank": 6}),
        (ValueError, "seed must be at least 0, got -1", {"rank": 0, "seed": -1}),
        (ValueError, "ranks_per_host must divide the 6 workers, got 4", {"rank": 0, "ranks_per_host": 4}),
    ]:
        with pytest.raises(error, match=message):
            RedundantSampler(Noisy(), code, **options)
    with pytest.raises(ValueError, match="epoch must be at least 0, got -1"):
        RedundantSampler(Noisy(), code, rank=0).set_epoch(-1)


def _data_ranks(rank, report):
    torch.set_num_threads(1)
    found = {}
    for code in (RepetitionCode(RANKS, 1), CyclicCode(RANKS, 1), Audit(RANKS, 1, 0.1)):
        guard = draco_ext.protect(DistributedDataParallel(nn.Linear(1, 1)), code)
        try:
            one = guard.data_rank
        except RuntimeError as error:
            one = str(error)
        found[type(code).__name__] = (guard.data_replicas, guard.data_ranks, one)
    everybody = [None] * RANKS
    dist.all_gather_object(everybody, found)
    report(everybody)


def test_data_ranks():
    [everybody] = run_local(_data_ranks, RANKS)
    for rank, found in enumerate(everybody):
        assert found["RepetitionCode"] == (2, (rank // 3,), rank // 3)
        assert found["Audit"] == (RANKS, (rank,), rank)
        replicas, ranks, error = found["CyclicCode"]
        assert (replicas, ranks) == (RANKS, CyclicCode(RANKS, 1).assignment(rank))
        assert error.startswith("a rank loads 3 shares of the data with CyclicCode(")
