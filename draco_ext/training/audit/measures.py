"""Measures of gradients, by which ranks find out whether they have computed the same."""

from __future__ import annotations

import abc
import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from draco_ext import ops

CALIBRATION = 5  # audits without a dispute, from which tolerant ranks learn how much honest gradients differ
MARGIN = 4.0  # the tolerance, in units of the largest difference between honest gradients

# What a measure is once it is gathered; only the measure itself looks into it.
Measured = Any


class Measure(abc.ABC):
    """A measure of a gradient, which is measured in pieces.

    Attributes:
        is_digest: whether the measure is `ops.digest`. It comes with the statistics, so it is taken in every step, and
            not only in those that are audited. Since it is exact, it also covers what else a pass has left.
    """

    is_digest: bool

    @abc.abstractmethod
    def of(self, values: Tensor, key: int) -> Tensor:
        """Return the measure of a piece under a key that all ranks know: int64, on the device of the values."""

    @abc.abstractmethod
    def of_nothing(self, length: int) -> Tensor:
        """Return the measure of a piece of this length without a gradient, on the CPU."""

    @abc.abstractmethod
    def join(self, pieces: Sequence[Tensor], key: int) -> Tensor:
        """Return the measure of a gradient, given those of all its pieces."""

    @abc.abstractmethod
    def length(self, lengths: Sequence[int]) -> int:
        """Return the length of the measure of a gradient whose pieces have these lengths."""

    @abc.abstractmethod
    def read(self, numbers: Tensor) -> Measured:
        """Return a gathered measure in the form that `agree` takes."""

    @abc.abstractmethod
    def agree(self, first: Measured, second: Measured) -> bool:
        """Return whether two measures are of the same gradient."""

    def learn(self, pairs: Sequence[tuple[Measured, Measured]]) -> None:  # noqa: B027 (bits need not learn)
        """Learn from the measures of an audit without a dispute: of each part, by its owner and an auditor."""

    @property
    def sees(self) -> float | None:
        """Return the size from which errors are seen, relative to the gradient; None if it is any error."""
        return None


class Bits(Measure):
    """A digest: gradients are the same if all their bits are."""

    is_digest = True

    def of(self, values: Tensor, key: int) -> Tensor:
        """See `Measure`."""
        return ops.digest(values, key)

    def of_nothing(self, length: int) -> Tensor:
        """See `Measure`."""
        return torch.zeros(2, dtype=torch.int64)

    def join(self, pieces: Sequence[Tensor], key: int) -> Tensor:
        """See `Measure`."""
        return ops.digest(torch.cat(list(pieces)).view(torch.uint8), key)

    def length(self, lengths: Sequence[int]) -> int:
        """See `Measure`."""
        return 2

    def read(self, numbers: Tensor) -> Measured:
        """See `Measure`."""
        return tuple(numbers.tolist())

    def agree(self, first: Measured, second: Measured) -> bool:
        """See `Measure`."""
        return bool(first == second)


class Projections(Measure):
    """Random projections of tiles: gradients are the same if theirs differ by little.

    The tolerance is relative to the norm of a tile, or, where that is larger, to the tile's share in the whole
    gradient's norm, since a gradient that nearly vanishes is all rounding. It begins at the bound that is given. After
    some audits without a dispute it is `MARGIN` times the largest difference in them, or the bound if that is less.

    Args:
        atol: an absolute tolerance, as the root mean square over a tile's elements.
        rtol: the bound of the relative tolerance.

    Attributes:
        tolerance: the relative tolerance.
    """

    is_digest = False

    def __init__(self, atol: float, rtol: float) -> None:
        self.tolerance = rtol
        self._atol = atol
        self._audits = 0
        self._largest = 0.0

    def of(self, values: Tensor, key: int) -> Tensor:
        """See `Measure`: for each tile the norm of as many ones, its norm, and projections, as bits of float64."""
        length = values.numel()
        values = values if values.dtype in ops.CYCLIC_DTYPES else values.float()
        projections, norms = ops.cyclic_project(pad(values, (0, length % 2)).unsqueeze(0), key)
        ones = torch.full_like(norms[0], math.sqrt(ops.TILE))
        if length % ops.TILE:
            ones[-1] = math.sqrt(length % ops.TILE)
        ones *= _unit(values.dtype)
        numbers = torch.view_as_real(projections[0]).flatten(1)
        rows = torch.cat([ones[:, None], norms[0][:, None], numbers], 1)
        return pad(rows, (0, _COLUMNS - rows.size(1))).flatten().view(torch.int64)

    def of_nothing(self, length: int) -> Tensor:
        """See `Measure`."""
        return torch.zeros(_COLUMNS * math.ceil(length / ops.TILE), dtype=torch.int64)

    def join(self, pieces: Sequence[Tensor], key: int) -> Tensor:
        """See `Measure`."""
        return torch.cat(list(pieces))

    def length(self, lengths: Sequence[int]) -> int:
        """See `Measure`."""
        return sum(_COLUMNS * math.ceil(length / ops.TILE) for length in lengths)

    def read(self, numbers: Tensor) -> Measured:
        """See `Measure`."""
        return numbers.contiguous().view(torch.float64).view(-1, _COLUMNS)

    def agree(self, first: Measured, second: Measured) -> bool:
        """See `Measure`; gradients agree where both are not finite."""
        return self._difference(first, second) <= self.tolerance

    def learn(self, pairs: Sequence[tuple[Measured, Measured]]) -> None:
        """See `Measure`."""
        if self._audits == CALIBRATION:
            return
        self._largest = max([self._largest, *(self._difference(first, second) for first, second in pairs)])
        self._audits += 1
        if self._audits == CALIBRATION:
            self.tolerance = min(self.tolerance, max(MARGIN * self._largest, _LEAST))

    @property
    def sees(self) -> float | None:
        """See `Measure`: errors in one tile of this size are seen in an audit with a probability of 99%."""
        return _SEEN * self.tolerance

    def _difference(self, first: Tensor, second: Tensor) -> float:
        """Return the largest difference between tiles, relative to what `tolerance` is relative to."""
        finite = first.isfinite().all(1), second.isfinite().all(1)
        if not torch.equal(*finite):
            return math.inf
        first, second = first[finite[0]], second[finite[0]]
        if not first.numel():
            return 0.0
        ones, norms = first[:, 0], torch.maximum(first[:, 1], second[:, 1])
        share = norms.norm() * ones / ones.norm()
        projected = first[:, 2:] - second[:, 2:]
        count = (first[:, 2:] != 0).sum(1).clamp(min=2) / 2  # of complex projections
        differences = projected.norm(dim=1) / count.sqrt() - self._atol * ones
        relative = differences.clamp(min=0) / torch.maximum(norms, share)
        return float(relative.nan_to_num(0.0).max())  # 0 / 0 is no difference


@functools.cache
def _unit(dtype: torch.dtype) -> float:
    """Return the factor by which `ops.cyclic_project` scales norms of this dtype, to a few percent."""
    return float(ops.cyclic_project(torch.ones(1, 2**12, dtype=dtype), 0)[1]) / 2**6


# Of a tile: norm of ones, norm, and real and imaginary parts of up to 4 projections.
_COLUMNS = 2 + 2 * 4
_LEAST = 1e-12  # a tolerance below this would be that of ranks that are equal in bits
_SEEN = 10.0
