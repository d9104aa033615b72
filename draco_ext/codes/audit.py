"""Audit: workers recompute each other's parts in steps that are drawn by chance."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from draco_ext import _checks

# So many steps at the beginning of a training are audited at any rate: a mistake in the loop shows at once, and so does
# a rank that is bad from the beginning. A resumed training goes on at a later step, so it does not do this again.
FIRST_STEPS = 2


@dataclass(frozen=True)
class Audit:
    """Plain data parallelism in which workers sometimes recompute each other's parts.

    Part k belongs to worker k. The first two steps are audited, and of the others those that are drawn by chance. In an
    audited step `adversaries` other workers recompute each part, and a part on which they disagree is put right before
    the optimizer steps. This is reactive redundancy: Gupta and Vaidya, "Randomized Reactive Redundancy for Byzantine
    Fault-Tolerance in Parallelized Learning", arXiv 1912.09528. It is not a `Code`: no message is decoded.

    All methods are functions of their arguments alone, so every rank gets the same answers without communication.

    Args:
        workers: n.
        adversaries: s, how many workers may be wrong in the same step; at least 1, and 2 * s + 1 <= n.
        rate: q, the chance that a later step is audited. With 1 every step is.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: s < 1, n < 2 * s + 1, or a rate that is not above 0 and at most 1.
    """

    workers: int
    adversaries: int
    rate: float

    def __post_init__(self) -> None:
        _checks.check_int("adversaries", self.adversaries, 1)
        _checks.check_workers(self.workers, self.adversaries)
        if not 0 < _check_number("rate", self.rate) <= 1:
            raise ValueError(f"rate must be above 0 and at most 1, got {self.rate}")

    # ------------------------------------------------------------------------------------------ what is audited

    def is_audited(self, seed: int, step: int, passes: int = 1) -> bool:
        """Return whether a step is audited: the first two are, and others with a chance of min(1, rate * passes).

        The coin is a hash of seed and step. It has no period that a fault could have too.

        Args:
            seed: the same on all ranks, at least 0.
            step: counted from 0.
            passes: A, the number of micro-batches whose gradients the step accumulates. The first of them is audited,
                so that the cost per micro-batch does not depend on A. In step 0, and with a rate of 1, all of them are.
        """
        seed, step = _check_draw(seed, step)
        chance = self._chance(passes)
        return step < FIRST_STEPS or _uniform("coin", seed, step) < chance

    def covers_all(self, step: int) -> bool:
        """Return whether an audit of this step covers all micro-batches that it accumulates, and not the first only."""
        return step == 0 or self.rate == 1

    def shifts(
        self, seed: int, step: int, hosts: Sequence[str] | None = None, avoid: Collection[int] = ()
    ) -> tuple[int, ...]:
        """Draw who audits whom in a step.

        With a shift of delta, worker j audits part (j + delta) % n. So worker (k - delta) % n audits part k, every
        worker audits one part per shift, and the s auditors of a part are s different workers that do not own it.

        Better shifts come first; among equally good ones all are equally likely. A shift is better if fewer parts of
        convicted workers get a convicted auditor, which is none unless too few shifts are left. Among shifts that are
        equal in this, one is better if more parts get an auditor on another host than their owner.

        Args:
            seed: the same on all ranks, at least 0.
            step: counted from 0.
            hosts: the host of each worker, in the order of the workers. Default: every worker has a host of its own.
            avoid: the workers that are convicted.

        Returns:
            s different shifts from 1 to n - 1.

        Raises:
            TypeError: an argument has the wrong type.
            ValueError: hosts does not have an entry for each worker; avoid contains a number that is no worker's.
        """
        n = self.workers
        seed, step = _check_draw(seed, step)
        apart = _count_pairs_apart(self._check_hosts(hosts))
        convicted = self._check_avoid(avoid)
        together = [0] * n  # for each shift: the parts of convicted workers that it gives to convicted auditors
        for owner in convicted:
            for auditor in convicted - {owner}:
                together[(owner - auditor) % n] += 1

        def order(shift: int) -> tuple[int, int, int]:
            return together[shift], -apart[shift], _hash("shift", seed, step, shift)

        return tuple(sorted(range(1, n), key=order)[: self.adversaries])

    # ------------------------------------------------------------------------------------------ what to expect

    def expected_wrong_updates(self, trigger_chance: float = 0.0, passes: int = 1) -> float:
        """Return the mean number of wrong updates before a worker that is wrong again and again is found.

        Each wrong step is found with a chance of p = q + (1 - q) * c, independently, and is then put right. The number
        of wrong updates before is geometric with the mean (1 - p) / p, however often the worker is wrong. A worker that
        is found, and wrong again when it computes its part again, is convicted.

        This is for a worker that is right in the first two steps, which are audited. One that is wrong in the first
        step is found there, before any wrong update.

        Args:
            trigger_chance: c, the chance that a wrong step triggers an audit by its statistics.
            passes: A, the number of micro-batches that a step accumulates, all of them wrong. Then q is
                min(1, rate * A).
        """
        found = self._found(trigger_chance, passes)
        return (1 - found) / found

    def wrong_updates_quantile(self, level: float, trigger_chance: float = 0.0, passes: int = 1) -> int:
        """Return the number of wrong updates before a worker is found that is not exceeded with this probability.

        It is the smallest k with P(N <= k) = 1 - (1 - p)^(k + 1) >= level; see `expected_wrong_updates`.

        Args:
            level: above 0 and below 1, for instance 0.99.
            trigger_chance: see `expected_wrong_updates`.
            passes: see `expected_wrong_updates`.
        """
        if not 0 < _check_number("level", level) < 1:
            raise ValueError(f"level must be above 0 and below 1, got {level}")
        found = self._found(trigger_chance, passes)
        if found == 1:
            return 0
        steps = math.log1p(-level) / math.log1p(-found)
        return math.ceil(steps * (1 - 1e-12)) - 1  # the factor: where steps is an integer, but for rounding

    def cost(self, false_triggers: float = 0.001, steps: int | None = None, *, rehearsal: bool = True) -> float:
        """Return the mean number of extra passes per step while no worker is wrong: q * s + 2 * false_triggers.

        An audit costs s passes, and a false trigger an audit pass and the own pass again. A plain step is one pass.

        Args:
            false_triggers: the share of steps in which statistics trigger an audit though nothing is wrong.
            steps: the length of the training, to include its beginning: the first two steps are audited at any rate,
                and the first one makes its own pass twice. Default: any; the beginning does not count.
            rehearsal: whether the first step makes its own pass twice, as under DistributedDataParallel, which puts
                gradients into other buckets after its first one; False for FSDP2.
        """
        often = 2 * _check_chance("false_triggers", false_triggers)
        if steps is None:
            return self.rate * self.adversaries + often
        first = min(FIRST_STEPS, _checks.check_int("steps", steps, 1))
        audited = first + self.rate * (steps - first)
        return (bool(rehearsal) + audited * self.adversaries) / steps + often

    def _chance(self, passes: int) -> float:
        """Return the chance that a step is audited."""
        return min(1.0, self.rate * _checks.check_int("passes", passes, 1))

    def _found(self, trigger_chance: float, passes: int) -> float:
        """Return the chance that a wrong step is found."""
        audited = self._chance(passes)
        return audited + (1 - audited) * _check_chance("trigger_chance", trigger_chance)

    # ------------------------------------------------------------------------------------------ checks

    def _check_hosts(self, hosts: Sequence[str] | None) -> tuple[str, ...]:
        if hosts is None:
            return tuple(map(str, range(self.workers)))
        if isinstance(hosts, str) or not isinstance(hosts, Sequence):
            raise TypeError(f"hosts must be a sequence of str, got {type(hosts).__name__}")
        for host in hosts:
            if not isinstance(host, str):
                raise TypeError(f"hosts must be a sequence of str, got an entry of type {type(host).__name__}")
        if len(hosts) != self.workers:
            raise ValueError(f"hosts must have an entry for each of the {self.workers} workers, got {len(hosts)}")
        return tuple(hosts)

    def _check_avoid(self, avoid: Collection[int]) -> frozenset[int]:
        if not isinstance(avoid, Collection):
            raise TypeError(f"avoid must be a collection of workers, got {type(avoid).__name__}")
        return frozenset(_checks.check_int("avoid's entries", worker, 0, self.workers - 1) for worker in avoid)


def _hash(purpose: str, *numbers: int) -> int:
    """Return 128 bits that depend on all arguments; those of different purposes are independent."""
    text = " ".join((purpose, *map(str, numbers)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "big")


def _uniform(purpose: str, *numbers: int) -> float:
    """Return a number from 0 to below 1."""
    return (_hash(purpose, *numbers) >> (128 - 53)) * 2.0**-53  # as many bits as a float has: 1 is never reached


@functools.lru_cache(maxsize=8)
def _count_pairs_apart(hosts: tuple[str, ...]) -> tuple[int, ...]:
    """Return for each shift how many workers have an auditor on another host; entry 0 is 0."""
    numbers = np.unique(np.array(hosts), return_inverse=True)[1]
    return tuple(int((numbers != np.roll(numbers, shift)).sum()) for shift in range(len(hosts)))


def _check_draw(seed: int, step: int) -> tuple[int, int]:
    return _checks.check_int("seed", seed, 0), _checks.check_int("step", step, 0)


def _check_number(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    return value


def _check_chance(name: str, value: float) -> float:
    if not 0 <= _check_number(name, value) <= 1:
        raise ValueError(f"{name} must be from 0 to 1, got {value}")
    return value
