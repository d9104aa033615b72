"""`Audit` together with what training scripts do: each run has the bits of plain DDP's run without faults.

Every run is that of the same loop, once over plain mini-batches and then over `AuditGuard.steps`.
"""

import collections
import contextlib
import dataclasses
import hashlib
import io
import itertools
import logging
import random
import re

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

import draco_ext
from draco_ext import Audit
from draco_ext.testing.local import run_local

STEPS = 4
BAD = 1
BUCKETS = {"bucket_cap_mb": 0.005}


# ------------------------------------------------------------------------------------------------------ faults


class Fault:
    """A fault of one rank's hardware: in gradients, or in what `Probe` lets through.

    Args:
        change: f(value) -> wrong value.
        when: f(step, number of the pass in the step from 0, kind of pass) -> whether it is wrong there.
        parameters: the numbers of the parameters whose gradients are wrong; None: all.
        forward: whether activations are wrong instead of gradients.
    """

    def __init__(self, change, when=lambda step, number, kind: True, parameters=None, forward=False):
        self.change, self.when, self.parameters, self.is_forward = change, when, parameters, forward
        self.step, self.number, self.kind = 0, -1, None
        self.seen = 0

    def begin_pass(self, step, own):
        self.number = self.number + 1 if step == self.step else 0
        self.step, self.kind, self.seen = step, "own" if own else "other", 0

    def gradient(self, step, gradient, kind):
        self.seen += 1
        hit = self.parameters is None or self.seen - 1 in self.parameters
        wrong = not self.is_forward and hit and self.when(step, self.number, kind)
        return self.change(gradient) if wrong else gradient

    def activation(self, x):
        wrong = self.is_forward and self.kind is not None and self.when(self.step, self.number, self.kind)
        return self.change(x) if wrong else x


class Probe(nn.Module):
    """The identity on a rank without a fault."""

    fault = None  # of this rank in the current run

    def forward(self, x):
        return x if Probe.fault is None or not self.training else Probe.fault.activation(x)


def times_minus_three(g):
    return -3 * g


def flip_one_bit(g):
    g = g.clone(memory_format=torch.contiguous_format)
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[g.element_size()]
    g.view(-1).view(integer)[g.numel() // 2] ^= 1
    return g


# ------------------------------------------------------------------------------------------------------ a run


@dataclasses.dataclass(frozen=True)
class Case:
    """What is composed with an audit.

    Attributes:
        net: () -> module, the same on all ranks.
        data: (rank, epoch) -> loader.
        loss: (model, mini-batch) -> loss; or passes it backward itself and returns None.
        optimizer: parameters -> optimizer.
        ddp: options of DistributedDataParallel.
        accumulate: see `steps`.
        options: further ones of `protect`.
        scaler: options of a GradScaler.
        clip: the largest norm of gradients.
        compiled: "inside" or "outside" of DistributedDataParallel.
        backend: of torch.compile.
        between: called with the model and the step's number after each step.
    """

    net: object
    data: object
    loss: object = None
    optimizer: object = lambda parameters: torch.optim.AdamW(parameters, 1e-2)
    ddp: dict = dataclasses.field(default_factory=dict)
    accumulate: int = 1
    options: dict = dataclasses.field(default_factory=dict)
    scaler: dict = None
    clip: float = None
    compiled: str = None
    backend: str = "aot_eager"
    between: object = lambda model, step: None


def plain_steps(model, loader, accumulate):
    """What `AuditGuard.steps` yields, without an audit."""

    def mini_batches(group):
        for i, mini_batch in enumerate(group):
            with model.no_sync() if i < len(group) - 1 else contextlib.nullcontext():
                yield mini_batch

    iterator = iter(loader)
    while group := list(itertools.islice(iterator, accumulate)):
        yield mini_batches(group)


def seed_all(rank):
    torch.manual_seed(100 + rank)
    np.random.seed(rank)
    random.seed(rank)


def run(rank, case, audit=None, fault=None):
    """Train; return digests of the parameters, buffers and optimizer state of all ranks, and this rank's report."""
    if case.compiled:
        torch._dynamo.reset()
    torch.manual_seed(5)
    net = case.net()
    wrapped = torch.compile(net, backend=case.backend) if case.compiled == "inside" else net
    model = DistributedDataParallel(wrapped, **case.ddp)
    optimizer = case.optimizer(list(model.parameters()))
    guard = None
    Probe.fault = fault
    if audit is not None:
        adversary = None if fault is None else fault.gradient
        options = case.options(rank) if callable(case.options) else case.options
        guard = draco_ext.protect(model, audit, adversary=adversary, **options)
    called = torch.compile(model, backend=case.backend) if case.compiled == "outside" else model
    scaler = None if case.scaler is None else torch.amp.GradScaler("cpu", **case.scaler)
    seed_all(rank)
    loader = case.data(rank)
    steps = plain_steps(model, loader, case.accumulate) if guard is None else guard.steps(loader, case.accumulate)
    passes = 0
    for number, step in enumerate(steps):
        optimizer.zero_grad()
        for mini_batch in step:
            passes += 1
            if fault is not None:
                fault.begin_pass(number, step.own)
            loss = case.loss(called, mini_batch)
            if loss is not None:
                (loss if scaler is None else scaler.scale(loss)).backward()
        if scaler is not None:
            if case.clip is not None:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), case.clip)
            scaler.step(optimizer)
            scaler.update()
        else:
            if case.clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), case.clip)
            optimizer.step()
        case.between(called, number)
    Probe.fault = None
    report = None if guard is None else guard.report().audit
    state = [*model.module.parameters()], [*model.module.buffers()], optimizer.state_dict()["state"]
    extra = None if scaler is None else scaler.get_scale()
    return Result(gather([*map(bits, state), extra, torch.rand(1).item()]), report, passes)


Result = collections.namedtuple("Result", "bits report passes")


def bits(value):
    """A digest of nested tensors and numbers."""
    found = hashlib.sha256()
    for leaf in pytree.tree_leaves(value):
        array = (
            leaf.detach().contiguous().view(-1).view(torch.uint8).numpy()
            if torch.is_tensor(leaf)
            else repr(leaf).encode()
        )
        found.update(bytes(array))
    return found.hexdigest()[:16]


def gather(value):
    rows = [None] * dist.get_world_size()
    dist.all_gather_object(rows, value)
    return rows


# ------------------------------------------------------------------------------------------------------ networks


class Mlp(nn.Module):
    """With odd numbers of elements, BatchNorm, dropout."""

    def __init__(self, dtype=torch.float32, norm=True):
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(20, 31), Probe(), nn.BatchNorm1d(31) if norm else nn.Identity(), nn.ReLU(), nn.Dropout(0.2)
        )
        self.head = nn.Linear(31, 7)

    def forward(self, x):
        return self.head(self.body(x))


class Mixed(nn.Module):
    """Several dtypes, a frozen parameter, and one weight that is used twice."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(20, 20)
        self.middle = nn.Linear(20, 19).to(torch.bfloat16)
        self.last = nn.Linear(19, 7).double()
        self.frozen = nn.Parameter(torch.randn(20), requires_grad=False)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.second = nn.Linear(20, 20)
        self.second.weight = self.first.weight

    def forward(self, x):
        x = self.second(torch.tanh(self.first(x) + self.frozen)) * self.scale
        return self.last(torch.relu(self.middle(x.bfloat16())).double()).float()


class Branches(nn.Module):
    """Branches that a rank takes or leaves, by its data."""

    def __init__(self, image=False):
        super().__init__()
        self.image = image
        if image:
            self.stem = nn.Conv2d(3, 5, 3, padding=1)
            self.branches = nn.ModuleList(nn.Conv2d(5, 5, 3, padding=1) for _ in range(3))
        else:
            self.stem = nn.Linear(20, 5)
            self.branches = nn.ModuleList(nn.Linear(5, 5) for _ in range(3))
        self.probe = Probe()
        self.head = nn.Linear(5, 7)
        if image:
            self.to(memory_format=torch.channels_last)

    def forward(self, x, which):
        x = torch.relu(self.stem(x))
        for i in which.tolist():
            x = x + self.branches[i](self.probe(x))
        return self.head(x.mean((2, 3)) if self.image else x)


class Conv(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), Probe(), nn.ReLU(), nn.Conv2d(5, 6, 3))
        self.head = nn.Linear(6, 7)
        self.to(memory_format=torch.channels_last)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


class Drawing(nn.Module):
    """Draws from all global generators, keeps averages in a buffer that enters the loss, checkpoints activations."""

    def __init__(self, reentrant=False):
        super().__init__()
        self.reentrant = reentrant
        self.first, self.second = nn.Linear(20, 20), nn.Sequential(nn.Linear(20, 20), nn.Dropout(0.3), Probe())
        self.head = nn.Linear(20, 7)
        self.register_buffer("average", torch.zeros(20))
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x):
        x = self.first(x) * random.uniform(0.9, 1.1) + float(np.random.normal()) * 0.1 + torch.randn(20) * 0.1
        x = checkpoint(self.second, x, use_reentrant=self.reentrant)
        if self.training:
            with torch.no_grad():
                self.average = 0.9 * self.average + 0.1 * x.detach().mean(0)
                self.calls += 1
        return self.head(torch.tanh(x - self.average))


class Tokens(nn.Module):
    """For mini-batches of any number of tokens."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = nn.Parameter(self.embed.weight.detach().clone())
        self.embed.weight = self.head.weight

    def forward(self, tokens, offsets):
        return self.head(functional.embedding_bag(tokens, self.embed.weight, offsets))


# -------------------------------------------------------------------------------------------------- mini-batches


def generator(rank):
    return torch.Generator().manual_seed(100 + rank)


def pairs(rank, mini_batches=STEPS, shape=(20,)):
    g = generator(rank)
    for _ in range(mini_batches):
        yield torch.randn(8, *shape, generator=g), torch.randint(0, 7, (8,), generator=g)


def accumulated(rank):
    return pairs(rank, 3 * STEPS)


def images(rank):
    for x, y in pairs(rank, shape=(3, 8, 8)):
        yield x.contiguous(memory_format=torch.channels_last), y


class Drawn(Dataset):
    """Samples with augmentation that is drawn in the process that loads them."""

    def __len__(self):
        return 8 * 3 * STEPS

    def __getitem__(self, i):
        g = torch.Generator().manual_seed(i)
        return torch.randn(20, generator=g) + torch.randn(20) * random.uniform(0, 0.1), i % 7


class Stream(IterableDataset):
    def __init__(self, rank):
        self.rank = rank

    def __iter__(self):
        for x, y in pairs(self.rank):
            yield from zip(x, y, strict=True)


def sampled(rank):
    data = Drawn()
    sampler = DistributedSampler(data, 3, rank, seed=3)
    # Forked, as under torchrun: a forkserver, which ranks come from here, would have every worker import torch.
    return DataLoader(data, batch_size=8, sampler=sampler, num_workers=2, multiprocessing_context="fork")


def streamed(rank):
    return DataLoader(Stream(rank), batch_size=8)


Pair = collections.namedtuple("Pair", "x y")


@dataclasses.dataclass
class Batch:
    x: torch.Tensor
    y: torch.Tensor
    name: str


pytree.register_dataclass(Batch, serialized_type_name="draco_ext.tests.Batch") if False else None


class Encoding(collections.UserDict):
    """A mapping that pytree does not know, with attributes, as tokenizers return it."""

    def __getattr__(self, name):
        try:
            return self.data[name]
        except KeyError:
            raise AttributeError(name) from None


def odd_things(rank):
    """Mini-batches of all dtypes, arrays and strings in containers."""
    for i, (x, y) in enumerate(pairs(rank)):
        yield {
            "x": x.double(),
            "mask": x > 0,
            "small": (x * 10).to(torch.int8),
            "complex": torch.complex(x, x + 1).conj(),
            "half": [x.bfloat16(), x.half(), x.to(torch.float8_e4m3fn)],
            "array": x.numpy(),
            "words": (["a", "b", None, 1.5, True, 3], "text"),
            "scalar": np.float32(i),
            "empty": torch.empty(0, 3),
            "none": torch.tensor(2.0),
            "y": y,
            "turned": x.t(),
        }


def odd_loss(model, batch):
    assert batch["words"] == (["a", "b", None, 1.5, True, 3], "text")
    assert batch["empty"].shape == (0, 3)
    x = batch["x"].float() * batch["mask"] + batch["small"] * 0.01 + batch["complex"].imag.float()
    x = x + batch["half"][0].float() + batch["half"][1].float() + batch["half"][2].float()
    x = x + torch.from_numpy(batch["array"]) + float(batch["scalar"]) + batch["none"] + batch["turned"].t()
    return functional.cross_entropy(model(x), batch["y"])


def packed(rank):
    g = generator(rank)
    for step in range(STEPS):
        lengths = torch.randint(1, 5, (3 + (step + rank) % 3,), generator=g)
        tokens = torch.randint(0, 11, (int(lengths.sum()),), generator=g)
        yield Pair(tokens, torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)[:-1]]))


def chosen(rank, image=False):
    """Which branches each rank takes: some are taken by one rank, some by none."""
    shape = (3, 6, 6) if image else (20,)
    for step, (x, y) in enumerate(pairs(rank, shape=shape)):
        x = x.contiguous(memory_format=torch.channels_last) if image else x
        yield x, torch.tensor([0, 1, 2][: (rank + step) % 3]), y


# ---------------------------------------------------------------------------------------------------------- losses


def loss(model, batch):
    x, y = batch
    return functional.cross_entropy(model(x), y)


def loss_augmented(model, batch):
    """Augmentation after the mini-batch is yielded, in place."""
    x, y = batch
    x += torch.randn(x.shape) * random.uniform(0, 0.5) + float(np.random.normal()) * 0.1
    return functional.cross_entropy(model(x), y)


def loss_in_chunks(model, batch):
    """The user's own accumulation within a mini-batch."""
    x, y = batch
    with model.no_sync():
        for i in range(0, 6, 3):
            functional.cross_entropy(model(x[i : i + 3]), y[i : i + 3]).backward()
    functional.cross_entropy(model(x[6:]), y[6:]).backward()


def loss_of_mapping(model, batch):
    assert isinstance(batch, Encoding)
    target = batch.pop("y")
    return functional.cross_entropy(model(batch.x), target)


def autocast_loss(dtype):
    def autocasted(model, batch):
        with torch.autocast("cpu", dtype):
            return loss(model, batch)

    return autocasted


def loss_of_chosen(model, batch):
    x, which, y = batch
    return functional.cross_entropy(model(x, which), y)


def loss_of_tokens(model, batch):
    return functional.cross_entropy(model(batch.x, batch.y), torch.arange(len(batch.y)))


def loss_of_pair(model, batch):
    assert type(batch) is Pair
    return loss(model, batch)


def encodings(rank):
    for x, y in pairs(rank):
        yield Encoding(x=x, y=y)


def named(rank):
    return itertools.starmap(Pair, pairs(rank))


def regenerate(step, part):
    return list(pairs(part))[step]


def regenerate_all(step, part):
    return list(accumulated(part))[3 * step : 3 * step + 3]


class Unsendable:
    def __init__(self, x, y):
        self.x, self.y = x, y


def unsendable(rank):
    return itertools.starmap(Unsendable, pairs(rank))


def regenerate_unsendable(step, part):
    return Unsendable(*list(pairs(part))[step])


def loss_of_unsendable(model, batch):
    return functional.cross_entropy(model(batch.x), batch.y)


def sgd(parameters):
    return torch.optim.SGD(parameters, 0.05, momentum=0.9, weight_decay=0.01)


def chosen_twice(rank):
    return itertools.chain(chosen(rank), chosen(rank + 1))


def evaluate(model, step):
    model.eval()
    with torch.no_grad():
        model(torch.ones(2, 20))
    model.train()


UNUSED = {"find_unused_parameters": True}
VIEWS = {"gradient_as_bucket_view": True}
LOCAL = {"broadcast_buffers": False}
CASES = {
    "plain": Case(Mlp, pairs, loss),
    "SGD, clipping, own buffers": Case(Mlp, pairs, loss, sgd, BUCKETS | LOCAL, clip=0.5),
    "autocast": Case(Mlp, pairs, autocast_loss(torch.bfloat16), sgd, clip=0.1),
    "GradScaler, clipping": Case(Mlp, pairs, autocast_loss(torch.float16), scaler={"init_scale": 2.0**10}, clip=0.1),
    "GradScaler, overflow": Case(
        Mlp, pairs, autocast_loss(torch.float16), scaler={"init_scale": 2.0**40, "backoff_factor": 2.0**-15}
    ),
    "evaluation": Case(Mlp, pairs, loss, between=evaluate),
    "evaluation, own buffers": Case(Mlp, pairs, loss, ddp=LOCAL, between=evaluate),
    "channels_last": Case(Conv, images, loss, ddp=BUCKETS),
    "channels_last, unused": Case(
        lambda: Branches(image=True), lambda rank: chosen(rank, image=True), loss_of_chosen, ddp=UNUSED | BUCKETS
    ),
    "unused": Case(Branches, chosen, loss_of_chosen, ddp=UNUSED | BUCKETS),
    "unused, views, SGD": Case(Branches, chosen, loss_of_chosen, sgd, UNUSED | BUCKETS | VIEWS),
    "views": Case(Mlp, pairs, loss, ddp=BUCKETS | VIEWS),
    "dtypes, tied, frozen": Case(Mixed, pairs, loss, ddp=BUCKETS),
    "accumulate": Case(Mlp, accumulated, loss, ddp=BUCKETS, accumulate=3),
    "accumulate, views, own buffers": Case(Mlp, accumulated, loss, ddp=BUCKETS | VIEWS | LOCAL, accumulate=3),
    "accumulate, unused": Case(
        Branches,
        chosen_twice,
        loss_of_chosen,
        ddp=BUCKETS | UNUSED,
        accumulate=2,
    ),
    "chunks": Case(Mlp, pairs, loss_in_chunks, ddp=BUCKETS),
    "chunks, accumulate": Case(Mlp, accumulated, loss_in_chunks, ddp=BUCKETS, accumulate=3),
    "draws, checkpointing": Case(Drawing, pairs, loss_augmented),
    "draws, checkpointing, own buffers": Case(lambda: Drawing(True), pairs, loss_augmented, ddp=LOCAL),
    "sampler, workers": Case(Mlp, sampled, loss),
    "stream": Case(Mlp, streamed, loss),
    "namedtuples": Case(Mlp, named, loss_of_pair),
    "mappings": Case(Mlp, encodings, loss_of_mapping),
    "any dtype": Case(Mlp, odd_things, odd_loss),
    "tokens, tied": Case(Tokens, packed, loss_of_tokens),
    "batch_of": Case(Mlp, unsendable, loss_of_unsendable, options={"batch_of": regenerate_unsendable}),
    "batch_of, accumulate": Case(Mlp, accumulated, loss, accumulate=3, options={"batch_of": regenerate_all}),
    "batch_of, in place": Case(Mlp, pairs, loss_augmented, options={"batch_of": regenerate}),
    "compiled inside": Case(lambda: Mlp(norm=False), pairs, loss, compiled="inside"),
    "compiled outside": Case(lambda: Mlp(norm=False), pairs, loss, compiled="outside"),
    "no state check": Case(Mlp, pairs, loss, options={"check_state_every": None}),
}

AUDIT = Audit(3, 1, 1.0)
FAULTS = {
    "clean": lambda: None,
    "gradient": lambda: Fault(times_minus_three),
    "once": lambda: Fault(flip_one_bit, lambda step, number, kind: step == 2 and number == 1),
    "forward": lambda: Fault(lambda x: x * 1.5 + 0.25, forward=True),
}


def faults_of(name, long):
    """The faults that a case is run with: all, or two of them; the next case then has the other two."""
    number = list(CASES).index(name)
    return [fault for i, fault in enumerate(FAULTS) if long or (i + number) % 2 == 0]


def _compose(rank, report, names, long):
    torch.set_num_threads(1)
    logging.getLogger("draco_ext").setLevel(logging.ERROR)
    for name in names:
        report((name, "plain", run(rank, CASES[name])))
        for fault in faults_of(name, long):
            report((name, fault, run(rank, CASES[name], AUDIT, FAULTS[fault]() if rank == BAD else None)))


# What a fault in the network's activations cannot reach: networks without a `Probe`.
WITHOUT_PROBE = {"dtypes, tied, frozen", "tokens, tied"}
GROUPS = [list(CASES)[i : i + 8] for i in range(0, len(CASES), 8)]


@pytest.mark.parametrize(
    "names",
    [pytest.param(names, marks=pytest.mark.long if i % 2 else ()) for i, names in enumerate(GROUPS)],
    ids=lambda names: f"{names[0]} to {names[-1]}",
)
def test_bits_are_those_of_plain_ddp(names, long):
    """With and without a fault of one rank: parameters, buffers, optimizer, loss scale and the next random number."""
    results = {(name, fault): result for name, fault, result in run_local(_compose, AUDIT.workers, names, long)}
    for name in names:
        plain = results[name, "plain"]
        for fault in faults_of(name, long):
            bits, report, passes = results[name, fault]
            assert bits == plain.bits, (name, fault)
            seen = fault != "clean" and not (fault == "forward" and name in WITHOUT_PROBE)
            assert {dispute.rank for dispute in report.disputes} == ({BAD} if seen else set()), (name, fault)
            assert report.audited == STEPS
            assert passes > plain.passes


# ------------------------------------------------------------------------------------------------ wrong use


def _wrong_use(rank, report):
    torch.set_num_threads(1)
    logging.getLogger("draco_ext").setLevel(logging.ERROR)
    functions = (
        optimizer_in_the_loop,
        pass_outside_the_loop,
        step_left_early,
        nothing_passed_backward,
        loader_that_cannot_be_sent,
        ranks_at_other_steps,
        collective_in_forward,
    )
    for function in functions:
        model = DistributedDataParallel(Mlp() if function is not collective_in_forward else Collective())
        guard = draco_ext.protect(model, AUDIT)
        before = bits(list(model.parameters()))
        try:
            function(rank, model, guard)
            error = None
        except Exception as caught:
            error = f"{type(caught).__name__}: {caught}"
        report((function.__name__, gather(error), gather(bits(list(model.parameters())) == before)))


class Collective(nn.Linear):
    """A layer that communicates, as SyncBatchNorm does."""

    def __init__(self):
        super().__init__(20, 7)

    def forward(self, x):
        x = super().forward(x)
        dist.all_reduce(x.detach().clone())
        return x


def optimizer_in_the_loop(rank, model, guard):
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in guard.steps(pairs(rank)):
        for mini_batch in step:
            loss(model, mini_batch).backward()
            optimizer.step()


def pass_outside_the_loop(rank, model, guard):
    loss(model, next(pairs(rank))).backward()


def step_left_early(rank, model, guard):
    for step in guard.steps(pairs(rank)):
        loss(model, next(step)).backward()


def nothing_passed_backward(rank, model, guard):
    for step in guard.steps(pairs(rank)):
        for mini_batch in step:
            loss(model, mini_batch)


def loader_that_cannot_be_sent(rank, model, guard):
    next(guard.steps(unsendable(rank)))


def ranks_at_other_steps(rank, model, guard):
    guard.load_state_dict({**guard.state_dict(check=False), "step": rank})
    next(guard.steps(pairs(rank)))


def collective_in_forward(rank, model, guard):
    for step in guard.steps(pairs(rank)):
        for mini_batch in step:
            loss(model, mini_batch).backward()


WRONG_USE = {
    "optimizer_in_the_loop": "RuntimeError: .*optimizer must step after the loop over a step of guard.steps",
    "pass_outside_the_loop": "RuntimeError: an Audit needs the loop",
    "step_left_early": "RuntimeError: step 0 is not complete",
    "nothing_passed_backward": "RuntimeError: step 0 is not complete",
    "loader_that_cannot_be_sent": "TypeError: loader must yield tensors.*got Unsendable.*batch_of",
    "ranks_at_other_steps": "ValueError: all ranks must be at the same step, got {0: 0, 1: 1, 2: 2}",
    "collective_in_forward": "RuntimeError: a collective in the forward pass cannot be protected",
}


def test_wrong_use_is_refused_before_anything_changes():
    results = {name: rest for name, *rest in run_local(_wrong_use, AUDIT.workers)}
    assert results.keys() == WRONG_USE.keys()
    for name, (errors, unchanged) in results.items():
        assert all(re.match(WRONG_USE[name], error or "") for error in errors), (name, errors)
        assert all(unchanged), name


class Static(nn.Linear):
    def __init__(self):
        super().__init__(20, 7)


class Synchronised(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(20, 7), nn.SyncBatchNorm(7))


@pytest.mark.parametrize(
    ("net", "options", "error", "message"),
    [
        (Synchronised, {}, ValueError, "must not be a SyncBatchNorm"),
        (Mlp, {"transport": "server"}, ValueError, "transport must be 'allreduce' with an Audit, got 'server'"),
        (Mlp, {"on_conviction": "ignore"}, ValueError, "on_conviction must be 'substitute' or 'drop' or 'raise'"),
        (Mlp, {"batch_of": 3}, TypeError, r"batch_of must be a function f\(step, part\), got int"),
        (Static, {}, ValueError, "static_graph must be False with an Audit: .* records the graph in its first"),
        (Mlp, {"ranks_per_host": 2}, ValueError, "ranks_per_host must be left out with an Audit"),
    ],
)
def test_arguments(net, options, error, message):
    ((kind, text),) = run_local(_protect, AUDIT.workers, net, options)
    assert kind == error.__name__
    assert re.search(message, text), text


def _protect(rank, report, net, options):
    model = DistributedDataParallel(nn.Linear(2, 2), static_graph=net is Static)
    model.module = net()  # DistributedDataParallel itself refuses SyncBatchNorm on a CPU
    try:
        draco_ext.protect(model, AUDIT, **options)
    except (TypeError, ValueError) as error:
        report((type(error).__name__, str(error)))


# ------------------------------------------------------------------------------------------------ resume


def _resume(rank, report):
    """Train 4 steps with a checkpoint after 2: plain, and under an audit with a rank that is bad from step 1 on."""
    torch.set_num_threads(1)
    logging.getLogger("draco_ext").setLevel(logging.ERROR)
    for audited in (False, True):
        saved = None
        for half in (slice(0, 2), slice(2, 4)):
            torch.manual_seed(5)
            model = DistributedDataParallel(Mlp(), bucket_cap_mb=0.005)
            optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
            fault = Fault(times_minus_three, lambda step, number, kind: step >= 1)
            adversary = fault.gradient if rank == BAD else None
            guard = draco_ext.protect(model, AUDIT, adversary=adversary) if audited else None
            seed_all(rank)
            if saved is not None:
                saved.seek(0)
                state = torch.load(saved, weights_only=True)
                model.load_state_dict(state["model"])
                optimizer.load_state_dict(state["optimizer"])
                if audited:
                    guard.load_state_dict(state["guard"])
                torch.set_rng_state(state["generator"])
            loader = list(pairs(rank, 4))[half]
            for step in guard.steps(loader) if audited else plain_steps(model, loader, 1):
                optimizer.zero_grad()
                for mini_batch in step:
                    loss(model, mini_batch).backward()
                optimizer.step()
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "guard": guard.state_dict() if audited else {},
                "generator": torch.get_rng_state(),
            }
            saved = io.BytesIO()
            torch.save(state, saved)
        found = guard.report().audit if audited else None
        report((gather(bits([*model.parameters(), *model.buffers()])), found))


def test_checkpoint_and_resume_in_the_middle():
    (plain, _), (audited, found) = run_local(_resume, AUDIT.workers)
    assert audited == plain
    assert found.convicted == {BAD: 1}
    assert [(d.step, d.rank) for d in found.disputes] == [(1, BAD)]  # not again after the checkpoint
    assert found.last_clean_audit == {0: 3, 1: 0, 2: 3}
    assert found.audited == 4


# ------------------------------------------------------------------------------------------------ a rank that raises


def _raise(rank, report, own):
    torch.set_num_threads(1)
    model = DistributedDataParallel(Mlp())
    guard = draco_ext.protect(model, AUDIT)
    for step in guard.steps(pairs(rank)):
        for mini_batch in step:
            if rank == BAD and step.own == own:
                raise KeyError("in a pass")
            loss(model, mini_batch).backward()


@pytest.mark.parametrize("own", [True, False])
def test_a_rank_that_raises_ends_the_job(own):
    """In another's pass as in its own: nobody waits for it for ever."""
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match=r"in a pass|has died|closed by peer|reset"):
        list(run_local(_raise, AUDIT.workers, own))
