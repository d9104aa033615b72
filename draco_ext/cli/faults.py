"""The bad workers of each step, and what they send or compute."""

from __future__ import annotations

import time

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from draco_ext.codes.audit import FIRST_STEPS
from draco_ext.testing import attacks

# The ways to choose the bad workers, and their descriptions.
BAD_CHOICES = {
    "fixed": "the same randomly drawn workers in every step",
    "random": "workers drawn anew in every step",
    "adjacent": "neighbours, the same in every step",
}


def bad_workers(choice: str, workers: int, adversaries: int, step: int, seed: int) -> tuple[int, ...]:
    """Return the bad workers of a step in ascending order; a pure function, so that all ranks agree."""
    generator = np.random.default_rng((seed, step) if choice == "random" else (seed,))
    if choice == "adjacent":
        first = generator.integers(workers)
        chosen = (first + np.arange(adversaries)) % workers
    else:
        chosen = generator.choice(workers, adversaries, replace=False)
    return tuple(sorted(chosen.tolist()))


class Corruption:
    """The corruption of one worker's messages in the steps in which it is bad; in other steps it is honest.

    An omniscient attack is given all honest messages. In reality a bad worker would compute them itself from the data
    and the parameters. Here the ranks gather them, so all ranks must create a `Corruption`.

    Args:
        attack: one of `attacks.ATTACKS`.
        choice: one of `BAD_CHOICES`.
        adversaries: the number of bad workers.
        seed: the seed of the choice and of the attack.
        workers: the worker number of every rank.

    Attributes:
        seconds: the seconds spent on the attack in the current step.
        change: the norm of the change relative to that of the honest message; inf unless finite.
        changed: whether any bit of the message was changed.
    """

    def __init__(self, attack: str, choice: str, adversaries: int, seed: int, workers: list[int]) -> None:
        self.seconds, self.change, self.changed = 0.0, 0.0, False
        self._attack = attacks.ATTACKS[attack]
        self._choice = choice
        self._adversaries = adversaries
        self._seed = seed
        self._workers = workers
        self._worker = workers[dist.get_rank()]

    def __call__(self, step: int, message: Tensor) -> Tensor:
        """Return the message that this worker sends instead."""
        begin = time.perf_counter()
        bad = bad_workers(self._choice, len(self._workers), self._adversaries, step, self._seed)
        honest = None
        if bad and self._attack.omniscient:
            rows = [torch.empty_like(message) for _ in self._workers]
            dist.all_gather(rows, message)
            honest = torch.stack([rows[self._workers.index(j)] for j in range(len(rows)) if j not in bad])
        sent = message
        if self._worker in bad:
            stream = np.random.SeedSequence((self._seed, step, self._worker)).generate_state(1)
            generator = torch.Generator(message.device).manual_seed(int(stream[0]))
            sent = self._attack(message, generator=generator, honest=honest)
        self.changed = sent is not message and not torch.equal(sent.view(torch.uint8), message.view(torch.uint8))
        self.change = _relative_change(message, sent) if self.changed else 0.0
        self.seconds = time.perf_counter() - begin
        return sent


class Fault:
    """A persistent fault of one worker, for an `Audit`.

    From step `BEGIN` on, every gradient that the worker computes, of whatever part, is `FACTOR` times the right one.
    That ruins plain averaging over few workers, but only after some steps. The steps before are audited at any rate.
    Statistics compare a worker with the spread of recent steps, so they do not notice a fault that begins so early.

    Args:
        faulty: whether this worker has the fault.

    Attributes:
        seconds: the seconds spent on an attack in a step, which are none.
        change: the norm of the change relative to that of the right gradient, in the last step.
        changed: whether this worker's gradients were wrong in the last step.
    """

    BEGIN = FIRST_STEPS
    FACTOR = -10.0

    def __init__(self, faulty: bool) -> None:
        self.seconds = 0.0
        self.change = 0.0
        self.changed = False
        self._faulty = faulty

    def __call__(self, step: int, gradient: Tensor, kind: str) -> Tensor:
        """Return the gradient of a parameter that this worker computes, whatever kind of pass it is for."""
        self.changed = self._faulty and step >= self.BEGIN
        self.change = abs(self.FACTOR - 1) if self.changed else 0.0
        return self.FACTOR * gradient if self.changed else gradient


def _relative_change(message: Tensor, sent: Tensor) -> float:
    """Return the norm of the difference over the norm of the message, in double precision; inf unless finite."""
    honest = message.double()
    change = ((sent.double() - honest).norm() / honest.norm()).item()
    return change if change < float("inf") else float("inf")
