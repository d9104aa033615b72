"""The trainings that ``draco train`` compares, and the ranks that run them."""

from __future__ import annotations

import hashlib
import itertools
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parameters_to_vector
from torch.utils.data import DataLoader

from draco_ext.baselines import WorkerMomentum
from draco_ext.cli.averages import Averaging
from draco_ext.cli.digits import TRAIN_SAMPLES, Digits, make_net
from draco_ext.cli.faults import Corruption, Fault, bad_workers
from draco_ext.codes import Audit, Code, CyclicCode, RepetitionCode
from draco_ext.protocol.groups import gather
from draco_ext.reporting.ledger import Finding
from draco_ext.reporting.report import AuditReport, Seconds
from draco_ext.testing.local import all_ranks, own_device, run_ranks
from draco_ext.training.api import protect
from draco_ext.training.audit.guard import AuditGuard, AuditStep
from draco_ext.training.guard import Guard
from draco_ext.training.sampler import RedundantBatchSampler

CODES = {"repetition": RepetitionCode, "cyclic": CyclicCode}
AUDIT = "audit"
PROTECTED = (*CODES, AUDIT)  # the rules of `protect`
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
    AUDIT: "Audit",
}
AUDIT_RATE = 0.1
# The coins of an audit are drawn with the seed plus this. With it, a fault of the run with the default seed and rate is
# found after 8 wrong updates, where 9 are to be expected.
COIN = 3
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
    audit_rate: float = AUDIT_RATE
    worker_momentum: float = 0.0

    def sgd_momentum(self, rule: str) -> float:
        """Return the momentum of a training's optimizer.

        Ranks that recompute a part in an audit do not have its owner's momentum. So it stays in the optimizer there,
        where it does the same, since the rule is a plain mean.
        """
        return self.worker_momentum if self.worker_momentum and rule == AUDIT else self.momentum

    @property
    def audit(self) -> Audit:
        """The audit, which corrects one worker."""
        return Audit(self.workers, 1, self.audit_rate)

    def bad_workers(self, training: Training, step: int) -> tuple[int, ...]:
        """Return the bad workers of a training's step; an audit has one, always the same, from `Fault.BEGIN` on."""
        if not training.attacked:
            return ()
        if training.rule == AUDIT:
            if step < Fault.BEGIN:
                return ()
            return bad_workers("fixed", self.workers, 1, 0, self.seed)
        return bad_workers(self.bad, self.workers, self.adversaries, step, self.seed)


@dataclass(frozen=True)
class Training:
    """A training of the comparison: a rule, with or without adversaries."""

    rule: str
    attacked: bool

    @property
    def label(self) -> str:
        """A readable name."""
        return LABELS.get(self.rule, self.rule)


@dataclass(frozen=True)
class Audited:
    """The findings and the cost of an audit in one training.

    Attributes:
        rate: the chance that a step is audited.
        first: the first step from `Fault.BEGIN` on on which the coin fell; None if it fell on none.
        passes: the passes of every step, where plain averaging has one.
        report: the findings.
    """

    rate: float
    first: int | None
    passes: list[float]
    report: AuditReport

    @property
    def found(self) -> int | None:
        """The first step in which a fault was found; None if none was."""
        return min((dispute.step for dispute in self.report.disputes), default=None)

    @property
    def wrong_updates(self) -> int | None:
        """The number of wrong updates before the fault was found; None if it was not."""
        return None if self.found is None else self.found - Fault.BEGIN

    @property
    def passes_around(self) -> tuple[float, float] | None:
        """The mean passes of a step before and after the fault was found; None if there are no steps before or after.

        The first steps, which are audited at any rate, are left out.
        """
        if self.found is None:
            return None
        before, after = self.passes[Fault.BEGIN : self.found], self.passes[self.found + 1 :]
        return (float(np.mean(before)), float(np.mean(after))) if before and after else None


@dataclass
class Outcome:
    """The outcome of one training. Times are in seconds, curves are over the steps.

    Attributes:
        training: the training.
        parts: the number of parts of a batch.
        compute_factor: the number of samples that a worker computes, in multiples of plain averaging's; with an audit
            on average over the steps.
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
        audit: what an audit did; None with other rules.
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
    audit: Audited | None = None

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

    The first is plain averaging without adversaries, with which the others are compared. Then follow every code and the
    audit without and with adversaries, and every other rule with adversaries, if there are any.
    """
    trainings = [Training("mean", attacked=False)]
    for rule in config.rules:
        if rule in PROTECTED or not config.adversaries:
            trainings.append(Training(rule, attacked=False))
        if config.adversaries:
            trainings.append(Training(rule, attacked=True))
    return list(dict.fromkeys(trainings))


def code_for(rule: str, workers: int, adversaries: int) -> Code:
    """Return the code of this name; for others, a code in which each worker computes a part of its own."""
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
        audited = training.rule == AUDIT
        self._config, self._training, self._data = config, training, data
        self._code = code_for(training.rule, n, s)
        self._net = make_net(config.seed).to(data.train.tensors[0].device)
        self._model = DistributedDataParallel(self._net)
        self._optimizer = torch.optim.SGD(
            self._net.parameters(), lr=config.learning_rate, momentum=config.sgd_momentum(training.rule)
        )
        batches = RedundantBatchSampler(
            TRAIN_SAMPLES, self._code, batch_size=config.batch_size, rank=rank, seed=config.seed
        )
        self._workers = list(range(n)) if audited else list(batches.workers)
        loader = DataLoader(data.train, batch_sampler=batches)
        bad = s if training.attacked else 0
        self._corruption: Corruption | Fault = (
            Fault(rank in config.bad_workers(training, Fault.BEGIN))
            if audited
            else Corruption(config.attack, config.bad, bad, config.seed, self._workers)
        )
        self._findings: list[Finding] = []
        self._guard: Guard | AuditGuard | None = None
        self._steps: Iterator[Iterator[Any]]
        if training.rule in PROTECTED:
            guard = protect(
                self._model,
                config.audit if audited else self._code,
                transport="allreduce" if audited else config.transport,
                on_failure="skip",
                callback=self._findings.append,
                adversary=self._corruption if bad else None,
                seed=config.seed + COIN if audited else 0,
            )
            self._guard = guard
            self._steps = (step for _ in itertools.count() for step in guard.steps(loader))
        else:
            assert isinstance(self._corruption, Corruption)
            self._average = Averaging(training.rule, s, self._corruption)
            self._model.register_comm_hook(None, self._average.hook)
            self._steps = (iter([batch]) for _ in itertools.count() for batch in loader)
        self._mini_batch = 0  # of the step, counted from 0
        if config.worker_momentum and not audited:
            self._keep_momentum(WorkerMomentum(config.worker_momentum))
        self._work: list[Work] = []
        self._passes = [0.0]  # of an audit, before the first step and after each
        self._every = max(1, config.steps // EVALUATIONS)
        self._evaluations: list[tuple[int, float, float]] = []
        self._evaluate()

    def _keep_momentum(self, momentum: WorkerMomentum) -> None:
        """Replace each gradient that this rank computes by its momentum: one for each parameter and part.

        A rank has the same parts in each step, in the same order. DistributedDataParallel copies gradients into its
        buckets behind these hooks.
        """
        for name, parameter in self._net.named_parameters():
            parameter.register_hook(lambda gradient, name=name: momentum(gradient, key=(self._mini_batch, name)))

    def step(self) -> None:
        """Run one step, without an update if decoding fails."""
        before = self._seconds()
        begin = time.perf_counter()
        losses = []
        self._optimizer.zero_grad()
        step = next(self._steps)
        for self._mini_batch, (images, labels) in enumerate(step):
            loss = cross_entropy(self._model(images), labels)
            loss.backward()
            if not isinstance(step, AuditStep) or step.own:
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
        if isinstance(self._guard, AuditGuard):
            audit = self._guard.report().audit
            assert audit is not None
            self._passes.append(audit.passes)
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
        bad = [config.bad_workers(training, step) for step in range(config.steps)]
        suspects: list[tuple[int, ...] | None] = [None] * config.steps
        failed = []
        if self._guard is not None:
            failed = list(self._guard.report().failed_steps)
            found = [
                {f.worker for f in self._findings if f.step == step and not f.missing} for step in range(config.steps)
            ]
            suspects = [tuple(sorted(workers)) for workers in found]
        audit = self._audited()
        return Outcome(
            training=training,
            parts=code.parts,
            compute_factor=_compute_factor(code) if audit is None else float(np.mean(audit.passes)),
            message_bytes=code.message_length(parameters.numel()) * parameters.element_size(),
            parameters=parameters.cpu().numpy(),
            losses=_losses(work, bad),
            seconds=_split_seconds(work),
            suspects=suspects,
            failed=failed,
            bad=bad,
            changes=_changes(work),
            evaluations=self._evaluations,
            audit=audit,
        )

    def _audited(self) -> Audited | None:
        """Return what an audit did so far; None with another rule."""
        report = None if self._guard is None else self._guard.report().audit
        if report is None:
            return None
        config = self._config
        audited = (t for t in range(Fault.BEGIN, config.steps) if config.audit.is_audited(config.seed + COIN, t))
        return Audited(config.audit_rate, next(audited, None), np.diff(self._passes).tolist(), report)


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
