"""Evidence over steps: a rank that many decodes leave out is probably bad, even if no single decode names it."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import TypedDict

LEAST_DECODES = 20  # with fewer decodes no rank is probable
MOST_DECODES = 1000  # at this number all counts are halved, so that old decodes count less
QUANTILE = 3.09  # the quantile of the normal distribution at 99.9%


class EvidenceState(TypedDict):
    """The type of `Evidence.state_dict`."""

    decodes: float
    alone: dict[int, float]


class Evidence:
    """A count, for each rank, of the decodes that left out only this rank without naming it.

    A decode leaves out a rank with errors near the noise. It does not name the rank, since another one could have
    caused the same errors. By chance, other ranks would be left out each time; a bad rank is left out again and again.
    Only decodes that leave out a single rank count for it, since collusion usually leaves out several. This is not a
    proof: ranks that collude closely around an honest rank can cause it to be left out; see docs/guarantee.md.
    """

    def __init__(self) -> None:
        self._decodes = 0.0  # decodes that left out a rank without naming it
        self._alone: dict[int, float] = {}

    def add(self, left_out: Collection[int], suspects: Collection[int]) -> None:
        """Count a decode that did not fail, given the ranks that it left out (suspects included) and the suspects."""
        unnamed = set(left_out) - set(suspects)
        if not unnamed:
            return
        if self._decodes >= MOST_DECODES:
            self._decodes /= 2
            self._alone = {rank: count / 2 for rank, count in self._alone.items()}
        self._decodes += 1
        if len(unnamed) == 1:
            [rank] = unnamed
            self._alone[rank] = self._alone.get(rank, 0.0) + 1

    @property
    def probable(self) -> dict[int, float]:
        """The rank that is probably bad, if there is one, with a confidence.

        The confidence is the lower end of Wilson's interval, at 99.9%, for a share: of the decodes that left out a rank
        without naming it, those that left out only this rank. If it is above 1/2, no other rank explains as many.
        """
        if self._decodes < LEAST_DECODES:
            return {}
        bounds = {rank: wilson(count, self._decodes) for rank, count in dict(self._alone).items()}
        return {rank: bound for rank, bound in bounds.items() if bound > 0.5}

    def state_dict(self) -> EvidenceState:
        """Return the state for a checkpoint."""
        return EvidenceState(decodes=self._decodes, alone=dict(self._alone))

    def load_state_dict(self, state: EvidenceState) -> None:
        """Restore the state that `state_dict` returned."""
        self._decodes, self._alone = state["decodes"], dict(state["alone"])


def wilson(count: float, of: float) -> float:
    """Return the lower end of the score interval of a share. Source: E. B. Wilson, JASA 22, 1927."""
    share, spread = count / of, QUANTILE**2 / of
    return (share + spread / 2 - math.sqrt(spread * share * (1 - share) + spread**2 / 4)) / (1 + spread)
