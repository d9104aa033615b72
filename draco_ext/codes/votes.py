"""The base of codes whose workers vote on each part."""

from __future__ import annotations

import abc
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from draco_ext import ops
from draco_ext.codes.base import Code, Decoded
from draco_ext.codes.robust import check_beyond, robust_mean


@dataclass(frozen=True)
class VotingCode(Code):
    """A code whose workers vote on the gradient of each part, with or without a second stage behind the votes.

    A subclass has the fields `beyond` and `trim`, and calls `check_beyond` when it is made.
    """

    dtypes: ClassVar[tuple[torch.dtype, ...]] = ops.VOTE_DTYPES
    exact: ClassVar[bool] = True

    beyond: str = "fail"
    trim: int | None = None

    @property
    def bounded(self) -> bool:
        """Return whether there is a second stage."""
        return self.beyond != "fail"

    @property
    def corruptible(self) -> int:
        """The number of parts that may have more than s bad workers before the gradient is not bounded any more."""
        return check_beyond(self.beyond, self.trim, self.parts)

    @abc.abstractmethod
    def _of_workers(self, flags: Sequence[Tensor]) -> Tensor:
        """Return for each worker whether one of its parts has set its flag.

        Args:
            flags: for each part one (holders,) bool, in the order of `holders`.

        Returns:
            (n,) bool.
        """

    def _decode_by_votes(
        self,
        ballots: Iterable[tuple[Tensor, Tensor | None]],
        out: Tensor,
        *,
        missing: Tensor | None,
        reduction: str,
        atol: float,
        rtol: float,
    ) -> Decoded:
        """Vote on each part by itself, and take the mean of the winners, or that of the second stage.

        Args:
            ballots: for each part the gradients of its workers, (holders, d), and which of these are missing. They are
                not needed any more when the next part is asked for.
            out: (d,), contiguous; receives the gradient.
            missing: see `draco_ext.decode`.
            reduction: see `draco_ext.decode`.
            atol: see `draco_ext.decode`.
            rtol: see `draco_ext.decode`.
        """
        winners = out.new_empty(self.parts + 1, out.size(0))  # one row is the median's
        split, differing, in_split = [], [], []
        for winner, (votes, absent) in zip(winners[:-1], ballots, strict=True):
            size = votes.size(0)
            _, differs, failed = ops.majority_vote(
                votes, (size,), self.adversaries, missing=absent, atol=atol, rtol=rtol, out=winner
            )
            split.append(failed)
            differing.append(differs & ~failed)
            in_split.append(failed.expand(size))
        lost = torch.stack(split)
        if self.bounded:
            trim = None if self.beyond == "median" else self.corruptible
            robust_mean(winners, lost, trim, factor=1 if reduction == "mean" else self.parts, out=out)
        else:  # a part without a majority is NaN, and so is the mean
            ops.majority_vote(winners[:-1], (1,) * self.parts, 0, mean=reduction == "mean", out=out)
        suspects, in_lost = self._of_workers(differing), self._of_workers(in_split)
        left_out = suspects | (in_lost if missing is None else in_lost & ~missing)
        return Decoded(out, suspects, lost.sum() > self.corruptible, left_out, self, bounded=self.bounded)

    def error_bound(self, dtype: torch.dtype, *, length: int | None = None, probability: float = 1e-6) -> float:
        """Return 0: the gradient is bit-identical to the one without bad workers; see `Code.error_bound`.

        With atol and rtol a vote's median is between its honest workers' values instead, however far those are apart.
        With a second stage it is infinite: the distance of a robust mean from the mean has no bound relative to it.
        """
        self._check_bound(dtype, length, probability)
        return math.inf if self.bounded else 0.0

    def noise_amplification(self) -> float:
        """Return 1: a vote passes one worker's bits on."""
        return 1.0
