"""Statistics of gradients that give reason to audit a step. They detect few faults, but bound the damage."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from statistics import median

Statistics = Sequence[tuple[float, ...]]  # of one rank, by bucket; see `opinions.Row`

WINDOW = 20  # steps whose spread the current one is compared with
FACTOR = 4.0  # times the largest deviation in the window
LEAST_LOG = 0.7  # deviations of norms below a factor of two are never conspicuous
LEAST_ZEROS = 0.05  # nor are so many more or fewer zeros, as a part of the bucket


class Triggers:
    """A comparison of each rank's statistics with the other ranks', and with the spread of recent steps.

    All ranks have the same gathered statistics, so they come to the same answer.

    Args:
        workers: the number of workers.
    """

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._window: deque[list[float]] = deque(maxlen=WINDOW)  # by step: the largest deviation of each kind

    def judge(self, rows: Sequence[Statistics], lengths: Sequence[int]) -> dict[int, str]:
        """Return what is conspicuous, by worker; nothing before the window is full, except values that are not finite.

        Args:
            rows: by worker.
            lengths: the number of elements of each bucket.
        """
        found: dict[int, str] = {}
        deviations = self._deviations(rows, lengths)
        for kind, by_worker in enumerate(deviations):
            for worker, deviation in enumerate(by_worker):
                if deviation == math.inf:
                    found.setdefault(worker, "values that are not finite")
                elif self._is_full(len(deviations)):
                    least = LEAST_ZEROS if kind % 3 == 2 else LEAST_LOG
                    bound = max(least, FACTOR * max(step[kind] for step in self._window))
                    if deviation > bound:
                        found.setdefault(worker, f"{_NAMES[kind % 3]} of bucket {kind // 3}")
        return found

    def observe(self, rows: Sequence[Statistics], lengths: Sequence[int]) -> None:
        """Add a step whose gradients were accepted to the window."""
        deviations = self._deviations(rows, lengths)
        if self._window and len(self._window[0]) != len(deviations):
            self._window.clear()
        self._window.append([max((d for d in kind if d < math.inf), default=0.0) for kind in deviations])

    def _is_full(self, kinds: int) -> bool:
        return len(self._window) == WINDOW and len(self._window[0]) == kinds

    def _deviations(self, rows: Sequence[Statistics], lengths: Sequence[int]) -> list[list[float]]:
        """Return how far each worker is from the median, for each bucket's norm, largest value and zeros.

        Inf stands for values that are not finite on at most half of the ranks: overflow of a loss scale, which hits
        all, is no fault of one.
        """
        deviations = []
        for bucket, length in enumerate(lengths):
            of_ranks = [row[bucket] for row in rows]
            nonfinite = [values[2] > 0 for values in of_ranks]
            few = sum(nonfinite) > 0 and 2 * sum(nonfinite) <= len(rows)
            for kind in range(3):
                values = [
                    zeros / length if kind == 2 else _log(largest) if kind == 1 else _log(squares) / 2
                    for squares, largest, _, zeros in of_ranks
                ]
                middle = median(values)
                deviations.append(
                    [
                        math.inf if few and bad else 0.0 if bad else abs(value - middle)
                        for value, bad in zip(values, nonfinite, strict=True)
                    ]
                )
        return deviations


_NAMES = ("the norm", "the largest value", "the number of zeros")


def _log(value: float) -> float:
    """Return the logarithm; of 0 that of the smallest number, so that a gradient of zeros is far from others."""
    return math.log(max(value, 5e-324)) if value < math.inf else 710.0
