"""Methods that learn in spite of bad workers, side by side on scikit-learn's digits; codes and `Audit` among them.

The workers are simulated in one process: each message is computed, corrupted, and given to the rule, the code's
`decode`, or the policy of `Audit`. So bytes and compute are counted, and no time but the rule's is measured.
"""

from __future__ import annotations

import abc
import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy

from draco_ext.baselines import (
    AGGREGATORS,
    AccumulatedLoss,
    PDMMClient,
    WorkerMomentum,
    gradient_steps,
    mean,
    pdmm_server,
)
from draco_ext.cli.bench.report import Row
from draco_ext.cli.digits import TRAIN_SAMPLES, Digits, make_net
from draco_ext.codes import Audit, Code, CyclicCode, RepetitionCode, decode
from draco_ext.testing.attacks import ATTACKS, Attack
from draco_ext.training.audit.convictions import Convictions
from draco_ext.training.audit.triggers import Statistics, Triggers

# A forward pass costs a third of a forward and a backward pass.
FORWARD = 1 / 3
CLASSES = 10


@dataclass(frozen=True)
class Settings:
    """The size of the comparison.

    Attributes:
        workers: n.
        adversaries: s, which are bad.
        samples: the number of samples of a worker's mini-batch; a step has workers * samples.
        steps: the number of steps.
        begin: the step from which on the bad workers are bad.
        learning_rate: of SGD.
        momentum: of SGD, or of the workers.
        penalty: PDMM's c.
        client_rate: the learning rate of clients that send models, which have no momentum.
        rate: the chance that `Audit` audits a step.
    """

    workers: int = 15
    adversaries: int = 3
    samples: int = 6
    steps: int = 120
    begin: int = 25
    learning_rate: float = 0.05
    momentum: float = 0.9
    penalty: float = 1.0
    client_rate: float = 0.3
    rate: float = 0.1


FULL = Settings()
QUICK = Settings(steps=30, begin=23)
SEEDS = (0, 1, 2)

NONE = "none"
LABEL_FLIPS = "label flips"


@dataclass(frozen=True)
class AddedNoise(Attack):
    """Gaussian noise added to a message, as in arXiv 2503.10792; the deviation is not the paper's."""

    std: float = 0.3

    def _corrupt(self, message: Tensor, generator: torch.Generator, honest: Tensor | None) -> Tensor:
        return message.add_(torch.randn(message.shape, generator=generator), alpha=self.std)


# What bad workers do to what they send. Label flips change the data that they load instead.
ATTACKED_BY: dict[str, Attack | None] = {
    NONE: None,
    "bit flips": ATTACKS["multi-bit-flip"],
    "sign flips": ATTACKS["sign-flip"],
    "Gaussian noise": AddedNoise(),
    LABEL_FLIPS: None,
    "a little is enough": ATTACKS["little-is-enough"],
}


class Net:
    """The net of ``draco train`` as a function of flat parameters, for many models and mini-batches at once."""

    def __init__(self, seed: int) -> None:
        self._net = make_net(seed)
        self._shapes = {name: p.shape for name, p in self._net.named_parameters()}
        self.start = torch.cat([p.detach().flatten() for p in self._net.parameters()])

    def _loss(self, parameters: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(self.outputs(parameters, images), labels)

    def outputs(self, parameters: Tensor, images: Tensor) -> Tensor:
        """Return the outputs of the net with flat parameters."""
        pieces = parameters.split([shape.numel() for shape in self._shapes.values()])
        values = {name: p.view(shape) for (name, shape), p in zip(self._shapes.items(), pieces, strict=True)}
        outputs: Tensor = functional_call(self._net, values, (images,))
        return outputs

    def gradients(self, models: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        """Return the gradient of each mini-batch, at the same model (d,) or at a model each (m, d)."""
        shared = None if models.dim() == 1 else 0
        found: Tensor = vmap(grad(self._loss), in_dims=(shared, 0, 0))(models, images, labels)
        return found

    def losses(self, models: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of each model on each mini-batch: (models, mini-batches)."""
        outputs = vmap(self.outputs, in_dims=(0, None))(models, images.flatten(0, 1)).view(
            len(models), *labels.shape, CLASSES
        )
        one_each = vmap(vmap(cross_entropy), in_dims=(0, None))
        found: Tensor = one_each(outputs, labels)
        return found


@functools.lru_cache(maxsize=4)
def _digits(seed: int) -> Digits:
    return Digits(seed, torch.device("cpu"))


class World:
    """The data, the bad workers and their attack; the same for all methods with the same seed."""

    def __init__(self, settings: Settings, attack: str, seed: int) -> None:
        self.settings = settings
        self.seed = seed
        self.flips = attack == LABEL_FLIPS
        self._attacked = attack != NONE
        self._attack = ATTACKED_BY[attack]
        self.net = Net(seed)
        self._data = _digits(seed)
        draw = torch.Generator().manual_seed(seed)
        n = settings.workers
        self.bad = sorted(torch.randperm(n, generator=draw)[: settings.adversaries].tolist())
        self._shards = torch.randperm(TRAIN_SAMPLES, generator=draw).tensor_split(n)

    def bad_now(self, step: int) -> list[int]:
        """Return the workers that are bad in a step."""
        return self.bad if self._attacked and step >= self.settings.begin else []

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Return the images and labels of a step: for each worker a mini-batch from its share of the data."""
        draw = torch.Generator().manual_seed(self.seed * 100_003 + step)
        rows = [s[torch.randperm(len(s), generator=draw)[: self.settings.samples]] for s in self._shards]
        images, labels = self._data.train.tensors
        drawn = torch.stack(rows)
        return images[drawn], labels[drawn]

    def corrupt(self, step: int, messages: Tensor) -> Tensor:
        """Return what workers send in a step, given their honest messages in the rows."""
        bad = self.bad_now(step)
        if self._attack is None or not bad:
            return messages
        sent = messages.clone()
        honest = messages[[j for j in range(len(messages)) if j not in bad]]
        for j in bad:
            draw = torch.Generator().manual_seed((self.seed * 100_003 + step) * 1009 + j)
            sent[j] = self._attack(messages[j], generator=draw, honest=honest)
        return sent

    def flipped(self, step: int, labels: Tensor) -> Tensor:
        """Return the labels that each worker has for its own mini-batch in a step."""
        bad = self.bad_now(step)
        if not self.flips or not bad:
            return labels
        labels = labels.clone()
        labels[bad] = flip(labels[bad])
        return labels

    def accuracy(self, models: Tensor) -> float:
        """Return the mean test accuracy of models in the rows."""
        images, labels = self._data.test.tensors
        found = [(self.net.outputs(model, images).argmax(1) == labels).float().mean() for model in models]
        return torch.stack(found).mean().item()


def flip(labels: Tensor) -> Tensor:
    """Return the labels that a poisoned data set has: 9 - label."""
    return CLASSES - 1 - labels


class Method(abc.ABC):
    """A method in one training.

    Attributes:
        seconds: the time that its rule took, in all steps.
        bytes: the bytes that a worker has sent, in all steps; the mean over the workers.
        work: the samples that a worker has passed forward and backward, in multiples of its mini-batch, in all steps.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.settings = world.settings
        self.seconds = 0.0
        self.bytes = 0.0
        self.work = 0.0

    @abc.abstractmethod
    def step(self, step: int) -> None:
        """Make one step."""

    @abc.abstractmethod
    def models(self) -> Tensor:
        """Return the models that it has learned, in the rows; of the good workers only, where each has its own."""


class OneModel(Method):
    """A method that averages gradients in some way, with SGD on one model."""

    def __init__(self, world: World, worker_momentum: bool = False) -> None:
        super().__init__(world)
        n, factor = self.settings.workers, self.settings.momentum
        self._model = world.net.start
        self._workers = [WorkerMomentum(factor if worker_momentum else 0.0) for _ in range(n)]
        self._server = WorkerMomentum(0.0 if worker_momentum else factor)

    def step(self, step: int) -> None:
        """Make one step."""
        gradient = self.gradient(step)
        self._model = self._model - self.settings.learning_rate * self._server(gradient)

    def models(self) -> Tensor:
        """Return the model."""
        return self._model[None]

    @abc.abstractmethod
    def gradient(self, step: int) -> Tensor:
        """Return the gradient of a step."""


class Averaged(OneModel):
    """A plain or robust average of the workers' gradients."""

    def __init__(self, world: World, rule: str, worker_momentum: bool = False) -> None:
        super().__init__(world, worker_momentum)
        self._rule = AGGREGATORS[rule]

    def gradient(self, step: int) -> Tensor:
        """Return the average of a step."""
        images, labels = self.world.batch(step)
        gradients = self.world.net.gradients(self._model, images, self.world.flipped(step, labels))
        own = torch.stack([worker(g) for worker, g in zip(self._workers, gradients, strict=True)])
        sent = self.world.corrupt(step, own)
        self.work += 1
        self.bytes += sent[0].nbytes
        begin = time.perf_counter()
        result = self._rule(sent, self.settings.adversaries)
        self.seconds += time.perf_counter() - begin
        return result


class Coded(OneModel):
    """A code: each worker computes several parts, or one that others compute, too.

    A worker with flipped labels has them for all parts that it loads. The other workers with these parts have the right
    ones, so its message is one of the wrong messages that the code corrects.
    """

    def __init__(self, world: World, code: type[Code], worker_momentum: bool = False) -> None:
        super().__init__(world, worker_momentum)
        self._code = code(self.settings.workers, self.settings.adversaries)
        self.failed = 0

    def gradient(self, step: int) -> Tensor:
        """Return the decoded gradient of a step; zeros if decoding failed."""
        code, world = self._code, self.world
        images, labels = (t.flatten(0, 1).unflatten(0, (code.parts, -1)) for t in world.batch(step))
        right = world.net.gradients(self._model, images, labels)
        wrong = world.net.gradients(self._model, images, flip(labels)) if world.flips else right
        bad = world.bad_now(step)
        messages = []
        for j, momentum in enumerate(self._workers):
            parts = code.assignment(j)
            own = [momentum((wrong if j in bad else right)[k], key=k) for k in parts]
            messages.append(code.encode(j, torch.stack(own)))
            self.work += len(parts) / code.parts
        sent = world.corrupt(step, torch.stack(messages))
        self.bytes += sent[0].nbytes
        begin = time.perf_counter()
        decoded = decode(sent, code, length=right.size(1))
        failed = bool(decoded.failed)
        self.seconds += time.perf_counter() - begin
        self.failed += failed
        return torch.zeros_like(right[0]) if failed else decoded.gradient


class Audited(OneModel):
    """`Audit`: workers recompute each other's parts by chance, and in steps whose statistics are conspicuous.

    An attack is a fault here: what a bad worker computes is wrong, of whatever part, and it sends what it has computed.
    Flipped labels come with a part to whoever recomputes it, so nobody disagrees about them.
    """

    def __init__(self, world: World) -> None:
        super().__init__(world)
        n = self.settings.workers
        self._audit = Audit(n, self.settings.adversaries, self.settings.rate)
        self._triggers = Triggers(n)
        self._convictions = Convictions()
        self.wrong_updates = 0

    def gradient(self, step: int) -> Tensor:
        """Return the mean of what workers have computed, put right in steps that are audited."""
        world, audit = self.world, self._audit
        images, labels = world.batch(step)
        right = world.net.gradients(self._model, images, world.flipped(step, labels))
        sent = world.corrupt(step, right)
        begin = time.perf_counter()
        convicted = self._convictions.convicted
        contributed = sent.clone()
        contributed[list(convicted)] = right[list(convicted)]  # by another worker
        lengths = [right.size(1)]
        conspicuous = self._triggers.judge(_statistics(contributed), lengths)
        self.work += 1 + bool(convicted)
        self.bytes += right[0].nbytes * (1 + len(convicted) / audit.workers)
        if conspicuous or audit.is_audited(world.seed, step):
            faulty = {j for j in world.bad if not torch.equal(sent[j], right[j])}
            self.work += audit.adversaries
            self.bytes += audit.adversaries * (images[0].nbytes + labels[0].nbytes)
            self._put_right(step, contributed, right, faulty)
        elif not torch.equal(contributed, right):
            self.wrong_updates += 1
        self._triggers.observe(_statistics(contributed), lengths)
        result = contributed.mean(0)
        self.seconds += time.perf_counter() - begin
        return result

    def _put_right(self, step: int, contributed: Tensor, right: Tensor, faulty: set[int]) -> None:
        """Settle the parts about which a worker and its auditors disagree, and convict who was wrong.

        The opinion of a faulty worker about any part is wrong and its own, so a majority of s + 1 equal ones is right.
        """
        audit, convicted = self._audit, self._convictions.convicted
        shifts = audit.shifts(self.world.seed, step, avoid=convicted)
        lost = set()
        disputed = 0
        for part in range(audit.workers):
            owner_and_auditors = {part, *((part - shift) % audit.workers for shift in shifts)} - convicted
            if wrong := owner_and_auditors & faulty:
                disputed += 1
                lost |= wrong
                contributed[part] = right[part]
        if disputed:
            # Everybody computes each disputed part, and its own again.
            self.work += disputed + 1
            self.bytes += right[0].nbytes * (1 + len(lost) / audit.workers)
        for worker in lost:
            self._convictions.lose(worker, persistent=True)


def _statistics(gradients: Tensor) -> list[Statistics]:
    """Return the statistics of each worker's gradient that triggers compare; the gradient is one bucket."""
    finite = gradients.isfinite()
    values = torch.where(finite, gradients, 0.0).double()
    columns = (values.square().sum(1), values.abs().amax(1), (~finite).sum(1), (gradients == 0).sum(1))
    return [[tuple(row)] for row in torch.stack([c.double() for c in columns], dim=1).tolist()]


class ModelAveraging(Method):
    """Federated averaging: in each round a client makes one step from the server's model, with its own data."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self._server = world.net.start

    def step(self, step: int) -> None:
        """Make one round."""
        images, labels = self.world.batch(step)
        gradients = self.world.net.gradients(self._server, images, self.world.flipped(step, labels))
        sent = self.world.corrupt(step, self._server - self.settings.client_rate * gradients)
        self.work += 1
        self.bytes += sent[0].nbytes
        begin = time.perf_counter()
        self._server = mean(sent)
        self.seconds += time.perf_counter() - begin

    def models(self) -> Tensor:
        """Return the server's model."""
        return self._server[None]


class PDMM(Method):
    """PDMM: in each round a client makes one step from its model of the round before, with its own data."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        start = world.net.start
        self._gradients = torch.empty(0)
        self._server = start
        self._clients = [PDMMClient(start, functools.partial(self._solve, i)) for i in range(self.settings.workers)]

    def _solve(self, client: int, received: Tensor) -> Tensor:
        return gradient_steps(
            lambda point: self._gradients[client],
            received,
            self._clients[client].model,
            penalty=self.settings.penalty,
            learning_rate=self.settings.client_rate,
        )

    def step(self, step: int) -> None:
        """Make one round."""
        images, labels = self.world.batch(step)
        own = torch.stack([client.model for client in self._clients])
        self._gradients = self.world.net.gradients(own, images, self.world.flipped(step, labels))
        sent = self.world.corrupt(step, torch.stack([client.send() for client in self._clients]))
        self.work += 1
        self.bytes += sent[0].nbytes
        begin = time.perf_counter()
        self._server, replies = pdmm_server(sent)
        self.seconds += time.perf_counter() - begin
        for client, reply in zip(self._clients, replies, strict=True):
            client.receive(reply)

    def models(self) -> Tensor:
        """Return the server's model."""
        return self._server[None]


class Agents(Method):
    """Agents without a server, which weigh each other's models by accumulated loss, or learn alone."""

    def __init__(self, world: World, cooperate: bool = True) -> None:
        super().__init__(world)
        n = self.settings.workers
        self._models = world.net.start.repeat(n, 1)
        self._momenta = [WorkerMomentum(self.settings.momentum) for _ in range(n)]
        self._losses = [AccumulatedLoss(n, own=k) for k in range(n)] if cooperate else []

    def step(self, step: int) -> None:
        """Make one step of each agent, and combine the models."""
        images, labels = self.world.batch(step)
        labels = self.world.flipped(step, labels)
        gradients = self.world.net.gradients(self._models, images, labels)
        steps = torch.stack([momentum(g) for momentum, g in zip(self._momenta, gradients, strict=True)])
        own = self._models - self.settings.learning_rate * steps
        self.work += 1
        self._models = own
        if self._losses:
            sent = self.world.corrupt(step, own)
            self.work += FORWARD * len(own)
            self.bytes += (len(own) - 1) * own[0].nbytes
            begin = time.perf_counter()
            losses = self.world.net.losses(sent, images, labels)
            mixed = torch.stack([rule.combine(sent, losses[:, k]) for k, rule in enumerate(self._losses)])
            self._models = mixed
            self.seconds += time.perf_counter() - begin

    def models(self) -> Tensor:
        """Return the good agents' models."""
        return self._models[[k for k in range(len(self._models)) if k not in self.world.bad]]


@dataclass(frozen=True)
class Neighbour:
    """A method of the comparison.

    Attributes:
        name: its name in the table.
        make: returns it in a world.
        guarantee: what is proved of it.
        own: whether it is this library's.
    """

    name: str
    make: Callable[[World], Method]
    guarantee: str
    own: bool = False


_MEDIAN = "geometric-median-gram"
NEIGHBOURS = (
    Neighbour("mean", lambda w: Averaged(w, "mean"), "none: one bad worker moves it anywhere"),
    Neighbour(
        "geometric median",
        lambda w: Averaged(w, _MEDIAN),
        "a bounded distance from the honest mean, if bad workers are fewer than half",
    ),
    Neighbour(
        "geometric median, worker momentum",
        lambda w: Averaged(w, _MEDIAN, worker_momentum=True),
        "the rule's, of messages that vary less",
    ),
    Neighbour(
        "Krum",
        lambda w: Averaged(w, "krum"),
        "an angle to the true gradient, if n >= 2s+3 and gradients vary little",
    ),
    Neighbour(
        "Krum, worker momentum",
        lambda w: Averaged(w, "krum", worker_momentum=True),
        "the rule's, of messages that vary less",
    ),
    Neighbour("averaging of models", ModelAveraging, "none: one bad client moves it anywhere"),
    Neighbour("PDMM", PDMM, "the optimum of convex losses without bad clients; with them none is proved"),
    Neighbour("each agent alone", lambda w: Agents(w, cooperate=False), "nothing is shared"),
    Neighbour(
        "weights by accumulated loss",
        Agents,
        "convex losses: in expectation a regret no worse than alone; no common model",
    ),
    Neighbour(
        "repetition code",
        lambda w: Coded(w, RepetitionCode),
        "the exact gradient in every step, to the last bit; bad workers named",
        own=True,
    ),
    Neighbour(
        "repetition code, worker momentum",
        lambda w: Coded(w, RepetitionCode, worker_momentum=True),
        "the same: momentum at the workers changes nothing",
        own=True,
    ),
    Neighbour(
        "cyclic code",
        lambda w: Coded(w, CyclicCode),
        "the gradient within its error bound in every step; bad workers named",
        own=True,
    ),
    Neighbour(
        "Audit",
        Audited,
        "exact in audited steps, bad workers convicted; before, (1-q)/q wrong updates expected; poisoned data not seen",
        own=True,
    ),
)


def train(neighbour: Neighbour, settings: Settings, attack: str, seed: int) -> tuple[float, Method]:
    """Run one training; return the test accuracy, and the method with what it has counted."""
    # The messages are small: threads would wait for each other.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        method = neighbour.make(World(settings, attack, seed))
        for step in range(settings.steps):
            method.step(step)
        return method.world.accuracy(method.models()), method
    finally:
        torch.set_num_threads(threads)


def run(neighbour: Neighbour, settings: Settings, seeds: Sequence[int]) -> list[Row]:
    """Train by one method under each attack with each seed; return its row.

    The row's `split` has accuracies by attack, as means over the seeds, and by attack and seed. Bytes and work are
    means over attacks and seeds.
    """
    split: dict[str, float | None] = {}
    methods = []
    for attack in ATTACKED_BY:
        found = []
        for seed in seeds:
            accuracy, method = train(neighbour, settings, attack, seed)
            found.append(accuracy)
            methods.append(method)
        split[attack] = sum(found) / len(found)
        split |= {f"{attack}, seed {seed}": accuracy for seed, accuracy in zip(seeds, found, strict=True)}
    each = len(methods) * settings.steps
    return [
        Row(
            "neighbours",
            settings.workers,
            methods[0].world.net.start.numel(),
            neighbour.name,
            sum(m.seconds for m in methods) / each,
            sum(m.work for m in methods) / each,
            round(sum(m.bytes for m in methods) / each),
            own=neighbour.own,
            split=split,
            note=neighbour.guarantee,
        )
    ]
