"""Statistics of gradients that give reason to audit a step. They detect few faults, but bound the damage."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

Statistics = Sequence[tuple[float, ...]]  # of one rank, by bucket; see `opinions.Row`
Array = np.ndarray[Any, np.dtype[np.float64]]

WINDOW = 20  # steps whose spread the current one is compared with
FACTOR = 4.0  # times the largest deviation in the window
LEAST_LOG = 0.7  # deviations of norms below a factor of two are never conspicuous
LEAST_ZEROS = 0.2  # nor are so many more or fewer zeros, as a part of the bucket
_NAMES = ("the norm", "the largest value", "the number of zeros")
_LEAST = (LEAST_LOG, LEAST_LOG, LEAST_ZEROS)


class Triggers:
    """A comparison of each rank's statistics with the other ranks', and with the spread of recent steps.

    All ranks have the same gathered statistics, so they come to the same answer.

    Args:
        workers: the number of workers.
    """

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._window: deque[Array] = deque(maxlen=WINDOW)  # by step: the largest deviation of each kind

    def judge(self, rows: Sequence[Statistics], lengths: Sequence[int]) -> dict[int, str]:
        """Return what is conspicuous, by worker; nothing before the window is full, except values that are not finite.

        Args:
            rows: by worker.
            lengths: the number of elements of each bucket.
        """
        deviations = self._deviations(rows, lengths)
        bounds = np.full(len(deviations), np.inf)
        if len(self._window) == WINDOW and len(self._window[0]) == len(deviations):
            bounds = np.maximum(np.tile(_LEAST, len(lengths)), FACTOR * np.max(self._window, axis=0))
        conspicuous = (deviations > bounds[:, None]) | (deviations == np.inf)
        found = {}
        for worker in np.flatnonzero(conspicuous.any(axis=0)).tolist():
            kind = int(conspicuous[:, worker].argmax())  # the first one
            finite = deviations[kind, worker] < np.inf
            found[worker] = f"{_NAMES[kind % 3]} of bucket {kind // 3}" if finite else "values that are not finite"
        return found

    def observe(self, rows: Sequence[Statistics], lengths: Sequence[int]) -> None:
        """Add a step whose gradients were accepted to the window."""
        deviations = self._deviations(rows, lengths)
        if self._window and len(self._window[0]) != len(deviations):
            self._window.clear()
        self._window.append(np.where(deviations < np.inf, deviations, 0.0).max(axis=1))

    def _deviations(self, rows: Sequence[Statistics], lengths: Sequence[int]) -> Array:
        """Return how far each worker is from the median: a row for each bucket's norm, largest value and zeros.

        Inf stands for values that are not finite on at most half of the ranks: overflow of a loss scale, which hits
        all, is no fault of one.
        """
        statistics = np.array(rows, dtype=np.float64).reshape(self._workers, len(lengths), 4)
        squares, largest, nonfinite, zeros = np.moveaxis(statistics, 2, 0)
        values = np.stack([_log(squares) / 2, _log(largest), zeros / np.maximum(lengths, 1.0)], axis=2)
        bad = nonfinite > 0
        few = bad & (2 * bad.sum(axis=0) <= self._workers)
        deviations: Array = np.where(bad[:, :, None], 0.0, np.abs(values - np.median(values, axis=0)))
        deviations[few] = np.inf
        deviations = deviations.reshape(self._workers, -1).T
        return deviations


def _log(values: Array) -> Array:
    """Return logarithms; of 0 that of the smallest number, so that a gradient of zeros is far from others."""
    finite = values < np.inf
    logarithms: Array = np.where(finite, np.log(np.where(finite, np.maximum(values, 5e-324), 1.0)), 710.0)
    return logarithms
