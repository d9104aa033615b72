"""The trainings that ``draco train`` compares, and the ranks that run them."""

from __future__ import annotations

import hashlib
import itertools
import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parameters_to_vector
from torch.utils.data import DataLoader

from draco_ext.cli.averages import Averaging
from draco_ext.cli.digits import TRAIN_SAMPLES, Digits, make_net
from draco_ext.cli.faults import Corruption, bad_workers
from draco_ext.codes import Code, CyclicCode, RepetitionCode
from draco_ext.protocol.groups import gather
from draco_ext.reporting.ledger import Finding
from draco_ext.reporting.report import Seconds
from draco_ext.testing.local import all_ranks, own_device, run_ranks
from draco_ext.training.api import protect
from draco_ext.training.guard import Guard
from draco_ext.training.sampler import RedundantBatchSampler

CODES = {"repetition": RepetitionCode, "cyclic": CyclicCode}
LABELS = {
    "mean": "plain averaging",
    "coordinate-median": "coordinate median",
    "trimmed-mean": "trimmed mean",
    "krum": "Krum",
    "multi-krum": "multi-Krum",
    "geometric-median": "geometric median",
    "geometric-median-gram": "geometric median (Gram)",
    "repetition": "repetition code",
    "cyclic": "cyclic code",
}
# The number of points of the accuracy curve.
EVALUATIONS = 60


class Learning(NamedTuple):
    """The settings that determine whether the net learns well; with these defaults accuracy is judged, too."""

    steps: int = 100
    batch_size: int = 90
    learning_rate: float = 0.05
    momentum: float = 0.9


LEARNING = Learning()


@dataclass(frozen=True)
class Config:
    """The configuration of a comparison."""

    rules: tuple[str, ...]
    transport: str
    workers: int
    adversaries: int
    attack: str
    bad: str
    steps: int
    batch_size: int
    learning_rate: float
    momentum: float
    seed: int


@dataclass(frozen=True)
class Training:
    """A training of the comparison: a rule, with or without adversaries."""

    rule: str
    attacked: bool

    @property
    def label(self) -> str:
        """A readable name."""
        return LABELS.get(self.rule, self.rule)


@dataclass
class Outcome:
    """The outcome of one training. Times are in seconds, curves are over the steps.

    Attributes:
        training: the training.
        parts: the number of parts of a batch.
        compute_factor: the number of samples that a worker computes, in multiples of plain averaging's.
        message_bytes: the bytes that a worker sends per step.
        parameters: the final parameters.
        losses: the mean training loss over the good workers.
        seconds: the seconds of every step, by kind: compute, encode, communicate, decode.
        suspects: the workers that the rule named in each step; None if it cannot name any.
        failed: the steps whose decode failed.
        bad: the bad workers of each step.
        changes: the workers whose message differed from the honest one in any bit, in each step, with the norm of the
            difference relative to the message.
        evaluations: (step, accuracy, loss) on the test samples.
        distance: the distance of the final parameters from those of ``distance_from``, relative to their norm.
        distance_from: the training without adversaries with which this one is compared: that of the same code if this
            one is attacked, else plain averaging.
    """

    training: Training
    parts: int
    compute_factor: float
    message_bytes: int
    parameters: np.ndarray
    losses: list[float]
    seconds: dict[str, list[float]]
    suspects: list[tuple[int, ...] | None]
    failed: list[int]
    bad: list[tuple[int, ...]]
    changes: list[dict[int, float]]
    evaluations: list[tuple[int, float, float]]
    distance: float | None = None
    distance_from: Training | None = field(default=None)

    @property
    def accuracy(self) -> float:
        """The final test accuracy."""
        return self.evaluations[-1][1]

    @property
    def named(self) -> dict[int, int]:
        """The number of steps in which each worker was named; empty if the rule names nobody."""
        counts = Counter(worker for suspects in self.suspects for worker in suspects or ())
        return dict(sorted(counts.items()))

    @property
    def parameters_sha256(self) -> str:
        """The digest of the final parameters' bits."""
        return hashlib.sha256(self.parameters.tobytes()).hexdigest()

    def mean_seconds(self, kind: str) -> float:
        """Return the mean seconds per step of one kind."""
        return float(np.mean(self.seconds[kind]))


def list_trainings(config: Config) -> list[Training]:
    """Return the trainings of the comparison, in order.

    The first is plain averaging without adversaries, with which the others are compared. Then follow every code without
    and with adversaries, and every other rule with adversaries, if there are any.
    """
    trainings = [Training("mean", attacked=False)]
    for rule in config.rules:
        if rule in CODES or not config.adversaries:
            trainings.append(Training(rule, attacked=False))
        if config.adversaries:
            trainings.append(Training(rule, attacked=True))
    return list(dict.fromkeys(trainings))


def code_for(rule: str, workers: int, adversaries: int) -> Code:
    """Return the code of this name; for an average, a code in which each worker computes a part of its own."""
    return CODES[rule](workers, adversaries) if rule in CODES else RepetitionCode(workers, 0)


def run(config: Config, on_step: Callable[[Training], None]) -> list[Outcome]:
    """Run all trainings one after another, on torchrun's ranks or in processes that are started once.

    Args:
        config: the configuration.
        on_step: called after every step with its training.

    Returns:
        The outcomes; under torchrun, on rank 0 only.
    """
    outcomes: list[Outcome] = []

    def take(report: Training | Outcome) -> None:
        if isinstance(report, Outcome):
            outcomes.append(report)
        else:
            on_step(report)

    run_ranks(_rank, config.workers, take, config, list_trainings(config))
    clean = {o.training.rule: o for o in outcomes if not o.training.attacked}
    for outcome in outcomes:
        reference = clean["mean"]
        if outcome.training.attacked:
            reference = clean.get(outcome.training.rule, reference)
        if outcome is not reference:
            outcome.distance = _distance(outcome.parameters, reference.parameters)
            outcome.distance_from = reference.training
    return outcomes


def _distance(parameters: np.ndarray, reference: np.ndarray) -> float:
    """Return the norm of the difference relative to the reference; it is 0 only if all bits agree."""
    if parameters.tobytes() == reference.tobytes():
        return 0.0
    difference = parameters.astype(np.float64) - reference
    return float(np.linalg.norm(difference) / np.linalg.norm(reference.astype(np.float64)))


def _rank(rank: int, report: Callable[[Any], None], config: Config, trainings: list[Training]) -> None:
    """Run the trainings in one process, as one worker."""
    # The ranks share the cores, so thread pools of their own would only slow them down.
    torch.set_num_threads(1)
    logging.getLogger("draco_ext").setLevel(logging.ERROR)  # the report says who was bad
    data = Digits(config.seed, own_device())
    for training in trainings:
        learner = Learner(config, training, data)
        for _ in range(config.steps):
            learner.step()
            if rank == 0:
                report(training)
        outcome = learner.outcome()
        if rank == 0:
            report(outcome)


class Work(NamedTuple):
    """The measurements of a worker in one step. Times are in seconds.

    Attributes:
        total: the time from the first mini-batch to the optimizer's step.
        encode: the time to encode the message.
        communicate: the time of waiting for others.
        decode: the time to decode the messages.
        attack: the time that a bad worker spent on its attack.
        loss: the mean loss over the worker's parts.
        change: the norm of the message's change relative to the honest message.
        changed: 1 if any bit of the message was changed, else 0.
    """

    total: float
    encode: float
    communicate: float
    decode: float
    attack: float
    loss: float
    change: float
    changed: float


class Learner:
    """One rank in one training: a user's training loop, with `protect` or a hook that averages."""

    def __init__(self, config: Config, training: Training, data: Digits) -> None:
        n, s, rank = config.workers, config.adversaries, dist.get_rank()
        self._config, self._training, self._data = config, training, data
        self._code = code_for(training.rule, n, s)
        self._net = make_net(config.seed).to(data.train.tensors[0].device)
        self._model = DistributedDataParallel(self._net)
        self._optimizer = torch.optim.SGD(self._net.parameters(), lr=config.learning_rate, momentum=config.momentum)
        batches = RedundantBatchSampler(
            TRAIN_SAMPLES, self._code, batch_size=config.batch_size, rank=rank, seed=config.seed
        )
        self._workers = list(batches.workers)
        loader = DataLoader(data.train, batch_sampler=batches)
        bad = s if training.attacked else 0
        self._corruption = Corruption(config.attack, config.bad, bad, config.seed, self._workers)
        self._findings: list[Finding] = []
        self._guard: Guard | None = None
        if training.rule in CODES:
            self._guard = protect(
                self._model,
                self._code,
                transport=config.transport,
                on_failure="skip",
                callback=self._findings.append,
                adversary=self._corruption if bad else None,
            )
            self._steps = (step for _ in itertools.count() for step in self._guard.steps(loader))
        else:
            self._average = Averaging(training.rule, s, self._corruption)
            self._model.register_comm_hook(None, self._average.hook)
            self._steps = (iter([batch]) for _ in itertools.count() for batch in loader)
        self._work: list[Work] = []
        self._every = max(1, config.steps // EVALUATIONS)
        self._evaluations: list[tuple[int, float, float]] = []
        self._evaluate()

    def step(self) -> None:
        """Run one step, without an update if decoding fails."""
        before = self._seconds()
        begin = time.perf_counter()
        losses = []
        self._optimizer.zero_grad()
        for images, labels in next(self._steps):
            loss = cross_entropy(self._model(images), labels)
            loss.backward()
            losses.append(loss.detach())
        self._optimizer.step()
        total = time.perf_counter() - begin
        after = self._seconds()
        self._work.append(
            Work(
                total=total,
                encode=after.encode - before.encode,
                communicate=after.communicate - before.communicate,
                decode=after.decode - before.decode,
                attack=self._corruption.seconds,
                loss=torch.stack(losses).mean().item(),
                change=self._corruption.change,
                changed=self._corruption.changed,
            )
        )
        if len(self._work) % self._every == 0 or len(self._work) == self._config.steps:
            self._evaluate()

    def _seconds(self) -> Seconds:
        return replace(self._average.seconds) if self._guard is None else self._guard.report().seconds

    def _evaluate(self) -> None:
        if dist.get_rank() == 0:
            self._evaluations.append((len(self._work), *self._data.evaluate(self._net)))

    def outcome(self) -> Outcome | None:
        """Return the outcome of this training on rank 0. All ranks must call it."""
        config, training, code = self._config, self._training, self._code
        parameters = parameters_to_vector(self._net.parameters()).detach()
        rows = gather(torch.tensor(self._work, dtype=torch.float64), all_ranks(), parameters.device)
        if dist.get_rank() > 0:
            return None
        work = rows[[self._workers.index(j) for j in range(code.workers)]].numpy()
        bad = [
            bad_workers(config.bad, config.workers, config.adversaries, step, config.seed) if training.attacked else ()
            for step in range(config.steps)
        ]
        suspects: list[tuple[int, ...] | None] = [None] * config.steps
        failed = []
        if self._guard is not None:
            failed = list(self._guard.report().failed_steps)
            found = [
                {f.worker for f in self._findings if f.step == step and not f.missing} for step in range(config.steps)
            ]
            suspects = [tuple(sorted(workers)) for workers in found]
        return Outcome(
            training=training,
            parts=code.parts,
            compute_factor=_compute_factor(code),
            message_bytes=code.message_length(parameters.numel()) * parameters.element_size(),
            parameters=parameters.cpu().numpy(),
            losses=_losses(work, bad),
            seconds=_split_seconds(work),
            suspects=suspects,
            failed=failed,
            bad=bad,
            changes=_changes(work),
            evaluations=self._evaluations,
        )


def _compute_factor(code: Code) -> float:
    """Return the number of samples that the busiest worker computes, in multiples of an n-th of the batch."""
    busiest = max(len(code.assignment(worker)) for worker in range(code.workers))
    return busiest * code.workers / code.parts


def _split_seconds(work: np.ndarray) -> dict[str, list[float]]:
    """Return the times of each step by kind, as seen by the worker that waited least for the others.

    The time that a bad worker spends on its attack is left out.
    """
    spent = {name: work[:, :, i] for i, name in enumerate(Work._fields)}
    last = spent["communicate"].argmin(axis=0), np.arange(work.shape[1])
    split = {name: spent[name][last] for name in ("encode", "communicate", "decode")}
    compute = (spent["total"] - spent["attack"])[last] - sum(split.values())
    return {"compute": np.maximum(compute, 0).tolist()} | {name: seconds.tolist() for name, seconds in split.items()}


def _losses(work: np.ndarray, bad: list[tuple[int, ...]]) -> list[float]:
    """Return the mean loss over the good workers, per step."""
    losses = work[:, :, Work._fields.index("loss")]
    return [float(np.delete(losses[:, step], step_bad).mean()) for step, step_bad in enumerate(bad)]


def _changes(work: np.ndarray) -> list[dict[int, float]]:
    """Return the workers that sent a changed message, with the relative changes, per step."""
    change = work[:, :, Work._fields.index("change")]
    changed = work[:, :, Work._fields.index("changed")]
    return [{int(j): float(change[j, step]) for j in changed[:, step].nonzero()[0]} for step in range(work.shape[1])]
