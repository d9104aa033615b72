"""Evidence over steps: who is left out of decodes again and again, although no single decode could name it."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import TypedDict

LEAST_DECODES = 20  # below, nobody is probable
MOST_DECODES = 1000  # then all counts are halved: what is long ago counts less
QUANTILE = 3.09  # of the normal distribution at 99.9%


class EvidenceState(TypedDict):
    """What `Evidence.state_dict` returns."""

    decodes: float
    alone: dict[int, float]


class Evidence:
    """How often each rank was the only one that a decode left out without naming it.

    Errors of one rank near the noise are left out, but in a single decode others could have caused them as well. Chance
    would leave out another one each time, a rank that is bad is left out again. Only decodes with one such rank count
    for it, since colluding ranks as a rule leave out several. This is no proof: ranks that collude closely enough
    around an honest one can have that left out; see docs/guarantee.md.
    """

    def __init__(self) -> None:
        self._decodes = 0.0  # in which anybody was left out and not named
        self._alone: dict[int, float] = {}

    def add(self, left_out: Collection[int], suspects: Collection[int]) -> None:
        """Counts a decode that did not fail: whom it left out, suspects included, and the suspects."""
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
        """The rank that is probably bad, if there is one, with the confidence in it.

        The confidence is the lower end of Wilson's interval, at 99.9%, for the share of decodes with anybody left out
        and not named in which this rank was, alone. Above 1/2, no other rank explains as many.
        """
        if self._decodes < LEAST_DECODES:
            return {}
        bounds = {rank: wilson(count, self._decodes) for rank, count in self._alone.items()}
        return {rank: bound for rank, bound in bounds.items() if bound > 0.5}

    def state_dict(self) -> EvidenceState:
        """What a checkpoint needs."""
        return EvidenceState(decodes=self._decodes, alone=dict(self._alone))

    def load_state_dict(self, state: EvidenceState) -> None:
        """Goes on where `state_dict` stood."""
        self._decodes, self._alone = state["decodes"], dict(state["alone"])


def wilson(count: float, of: float) -> float:
    """Lower end of the score interval of a share. Source: E. B. Wilson, JASA 22, 1927."""
    share, spread = count / of, QUANTILE**2 / of
    return (share + spread / 2 - math.sqrt(spread * share * (1 - share) + spread**2 / 4)) / (1 + spread)
