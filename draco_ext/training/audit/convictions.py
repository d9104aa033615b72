"""The convictions of ranks that compute wrong gradients, and their acquittals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# A rank is convicted if it is wrong again when it computes the same part again, or if it was wrong this often.
LOST_DISPUTES = 3
# A convicted rank is acquitted when its own gradients were right in this many comparisons, one after another.
PROBATION = 100


class Convictions:
    """The convicted workers and the evidence against the others; the same on all ranks."""

    def __init__(self) -> None:
        self._right: dict[int, int] = {}  # by convicted worker: how often it was right since it was wrong
        self._lost: dict[int, int] = {}  # by worker: how often it was wrong

    @property
    def convicted(self) -> frozenset[int]:
        """Return the convicted workers."""
        return frozenset(self._right)

    def lose(self, worker: int, *, persistent: bool) -> bool:
        """Add a dispute in which a worker was wrong; return whether it is convicted by that.

        Args:
            worker: the worker.
            persistent: whether it was wrong again when it computed the same part again.
        """
        self._lost[worker] = self._lost.get(worker, 0) + 1
        if worker in self._right:
            self._right[worker] = 0
            return False
        if persistent or self._lost[worker] >= LOST_DISPUTES:
            self._right[worker] = 0
            return True
        return False

    def compare(self, worker: int, *, right: bool) -> bool:
        """Add a comparison of a convicted worker's own gradient; return whether it is acquitted by that."""
        self._right[worker] = self._right[worker] + 1 if right else 0
        if self._right[worker] < PROBATION:
            return False
        del self._right[worker]
        self._lost[worker] = LOST_DISPUTES - 1  # the next wrong gradient convicts it again
        return True

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {"right": dict(self._right), "lost": dict(self._lost)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        self._right = dict(state["right"])
        self._lost = dict(state["lost"])
