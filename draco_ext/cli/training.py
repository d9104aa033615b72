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
# Points of the accuracy curve.
EVALUATIONS = 60


class Learning(NamedTuple):
    """Settings that decide whether the net learns well; at these defaults accuracy is judged, too."""

    steps: int = 100
    batch_size: int = 90
    learning_rate: float = 0.05
    momentum: float = 0.9


LEARNING = Learning()


@dataclass(frozen=True)
class Config:
    """Everything that a comparison depends on."""

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
    """One line of the comparison: a rule, with or without adversaries."""

    rule: str
    attacked: bool

    @property
    def label(self) -> str:
        """Its name for people."""
        return LABELS.get(self.rule, self.rule)


@dataclass
class Outcome:
    """What one training came to. Times in seconds, curves over the steps.

    Attributes:
        training: Which.
        parts: Parts that the batch was cut into.
        compute_factor: Samples that a worker computes, in multiples of plain averaging's.
        message_bytes: What a worker sends per step.
        parameters: The final parameters.
        losses: Mean training loss over the good workers.
        seconds: compute, encode, communicate, decode.
        suspects: Whom the rule named; None where it cannot.
        failed: Steps whose decode failed.
        bad: Who was bad.
        changes: Workers that sent something else than they should, be it by one bit, and how far
            off they were, relative to the message.
        evaluations: (step, accuracy, loss) on the test samples.
        distance: Of the final parameters from those of ``distance_from``, relative to their norm.
        distance_from: The training without adversaries that this one is measured against: of the same code if
            attacked, else of plain averaging.
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
        """Final test accuracy."""
        return self.evaluations[-1][1]

    @property
    def named(self) -> dict[int, int]:
        """In how many steps each worker was named; empty if nobody was, or the rule cannot."""
        counts = Counter(worker for suspects in self.suspects for worker in suspects or ())
        return dict(sorted(counts.items()))

    @property
    def parameters_sha256(self) -> str:
        """Digest of the final parameters' bits."""
        return hashlib.sha256(self.parameters.tobytes()).hexdigest()

    def mean_seconds(self, kind: str) -> float:
        """Seconds per step of one kind."""
        return float(np.mean(self.seconds[kind]))


def list_trainings(config: Config) -> list[Training]:
    """The lines of the comparison, in order.

    Plain averaging without adversaries, by which the others are measured, comes first. Then every code with and
    without adversaries, every other rule with them, where there are any.
    """
    trainings = [Training("mean", attacked=False)]
    for rule in config.rules:
        if rule in CODES or not config.adversaries:
            trainings.append(Training(rule, attacked=False))
        if config.adversaries:
            trainings.append(Training(rule, attacked=True))
    return list(dict.fromkeys(trainings))


def code_for(rule: str, workers: int, adversaries: int) -> Code:
    """The code of that name; for an average, what tells each worker to compute a part of its own."""
    return CODES[rule](workers, adversaries) if rule in CODES else RepetitionCode(workers, 0)


def run(config: Config, on_step: Callable[[Training], None]) -> list[Outcome]:
    """Run all trainings one after another, in processes that are started once, or on torchrun's ranks.

    Args:
        config: The comparison.
        on_step: Called after every step with its training.

    Returns:
        What came of them; under torchrun on rank 0, nothing on the others.
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
    """Norm of the difference relative to the reference, 0 only if every bit agrees."""
    if parameters.tobytes() == reference.tobytes():
        return 0.0
    difference = parameters.astype(np.float64) - reference
    return float(np.linalg.norm(difference) / np.linalg.norm(reference.astype(np.float64)))


def _rank(rank: int, report: Callable[[Any], None], config: Config, trainings: list[Training]) -> None:
    """One process, worker and learner."""
    # The ranks share the cores; a thread pool for each would only make them wait for each other.
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
    """One step as a worker saw it. Times in seconds.

    Attributes:
        total: From the first mini-batch to the optimizer's step.
        encode: From gradients to message.
        communicate: Waiting for others.
        decode: From messages to gradient.
        attack: What a bad worker spent on being bad.
        loss: Mean loss over the worker's parts.
        change: How far the sent message was off, relative to the honest one.
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
    """One rank in one training: the loop that a user has, with `protect` or a hook that averages."""

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
        """One step, or none where decoding fails."""
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
        """What this training came to: on rank 0; to be called on all."""
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
    """Samples that the busiest worker computes, in multiples of an n-th of the batch."""
    busiest = max(len(code.assignment(worker)) for worker in range(code.workers))
    return busiest * code.workers / code.parts


def _split_seconds(work: np.ndarray) -> dict[str, list[float]]:
    """Where each step's time went, by the worker that waited least for the others.

    The time that an attacker spends on its attack is left out.
    """
    spent = {name: work[:, :, i] for i, name in enumerate(Work._fields)}
    last = spent["communicate"].argmin(axis=0), np.arange(work.shape[1])
    split = {name: spent[name][last] for name in ("encode", "communicate", "decode")}
    compute = (spent["total"] - spent["attack"])[last] - sum(split.values())
    return {"compute": np.maximum(compute, 0).tolist()} | {name: seconds.tolist() for name, seconds in split.items()}


def _losses(work: np.ndarray, bad: list[tuple[int, ...]]) -> list[float]:
    """Mean loss over the good workers, per step."""
    losses = work[:, :, Work._fields.index("loss")]
    return [float(np.delete(losses[:, step], step_bad).mean()) for step, step_bad in enumerate(bad)]


def _changes(work: np.ndarray) -> list[dict[int, float]]:
    """Who sent a changed message, and by how much it was changed, per step."""
    change = work[:, :, Work._fields.index("change")]
    changed = work[:, :, Work._fields.index("changed")]
    return [{int(j): float(change[j, step]) for j in changed[:, step].nonzero()[0]} for step in range(work.shape[1])]
