"""The second stage of a decoder: a robust mean of the winners of all votes, some of which may be those of colluders."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from draco_ext import _checks, ops

BEYOND = ("fail", "median", "trimmed-mean")

# Columns processed at once on a CPU: enough to use its threads, few enough to stay in its cache.
_TILE = 65536


def check_beyond(beyond: object, trim: object, parts: int) -> int:
    """Return how many parts may be corrupted, given the second stage's arguments and the number of parts.

    Raises:
        TypeError: trim is not an int.
        ValueError: beyond is not one of `BEYOND`, has too few parts for a second stage, or does not go with trim.
    """
    if not isinstance(beyond, str) or beyond not in BEYOND:
        got = repr(beyond) if isinstance(beyond, str) else type(beyond).__name__
        raise ValueError(f"beyond must be {', '.join(map(repr, BEYOND[:-1]))} or {BEYOND[-1]!r}, got {got}")
    if beyond != "trimmed-mean" and trim is not None:
        raise ValueError(f"trim must be left out with beyond={beyond!r}, got {trim!r}")
    if beyond == "fail":
        return 0
    most = (parts - 1) // 2
    if most == 0:
        raise ValueError(f"beyond must be 'fail' with fewer than 3 parts, got {beyond!r} with {parts}")
    if beyond == "median":
        if parts >= ops.MOST_GROUP_MEMBERS:
            raise ValueError(f"beyond='median' takes at most {ops.MOST_GROUP_MEMBERS - 1} parts, got {parts}")
        return most
    return max(1, parts // 4) if trim is None else _checks.check_int("trim", trim, 1, most)


def robust_mean(winners: Tensor, lost: Tensor, trim: int | None, *, factor: float, out: Tensor) -> Tensor:
    """Write a robust mean of the rows into `out`, coordinate by coordinate; it never waits for the device.

    With `e` lost and `c` arbitrary rows each element is between those of the other rows, for the median while
    `2c + e < G`, and for the trimmed mean while `c + e <= trim`.

    Args:
        winners: (G + 1, d), of which the last row is for the median's own use; G rows are enough for a trimmed mean.
        lost: (G,) bool, the rows to leave out.
        trim: how many values are left out at each end of a coordinate; None: the median.
        factor: the result is multiplied by it.
        out: (d,), contiguous.

    Returns:
        out; NaN everywhere if more than (G - 1) // 2 rows are lost, or than are trimmed.
    """
    if trim is None:
        _median(winners, lost, out)
    else:
        _trimmed_mean(winners[: lost.size(0)], lost, trim, out)
    return out if factor == 1 else out.mul_(factor)


def _median(winners: Tensor, lost: Tensor, out: Tensor) -> None:
    """Write the median, which tolerant votes make.

    A vote gives the lower one of the middle two values, and the upper one if infinity is one value more. NaN everywhere
    also if more rows than may be corrupted are not finite.
    """
    count, is_failed = winners.size(0) - 1, lost.sum() > (winners.size(0) - 2) // 2
    # Values are as good as the median at any finite distance, so only infinite ones and NaN can make a vote fail. A
    # vote without any row fails, too, and takes no time.
    tolerance = torch.finfo(winners.dtype if winners.dtype.itemsize > 2 else torch.float32).max
    winners[count].fill_(torch.inf)

    def vote(missing: Tensor, infinity: bool, target: Tensor) -> Tensor:
        rows = torch.cat([lost, lost.new_full((1,), not infinity)]) | missing
        return ops.majority_vote(winners, (count + 1,), count // 2, missing=rows, atol=tolerance, out=target)[0]

    is_even = (count - lost.sum()) % 2 == 0
    low = vote(is_failed, False, out)
    high = vote(is_failed | ~is_even, True, torch.empty_like(out))
    tiles = (low.split(_TILE), high.split(_TILE)) if out.is_cpu else ((low,), (high,))
    for lower, upper in zip(*tiles, strict=True):
        # Halves do not overflow. Where both are equal, they may be rounded.
        middle = lower.float() if lower.itemsize == 2 else lower
        middle = (middle * 0.5).add_(upper.to(middle.dtype) * 0.5)
        lower.copy_(torch.where((lower != upper) & is_even, middle.to(lower.dtype), lower))


def _trimmed_mean(winners: Tensor, lost: Tensor, trim: int, out: Tensor) -> None:
    """Write the trimmed mean, by a network of row-wise minima and maxima.

    A lost row stands for half a row at either end: where their number is odd, the mean of the two ways to put the last
    one at an end is taken. NaN counts as infinity, so that it does not spread.
    """
    count = winners.size(0)
    # By whether the number of lost rows is even or odd: the ranks that count, the first and last by half if odd.
    even, odd = (trim, count - trim - 1), (trim - 1, count - trim - 1)
    number = lost.cumsum(0)
    computed = winners.dtype if winners.dtype.itemsize > 2 else torch.float32
    filler = torch.where(number % 2 == 1, torch.inf, -torch.inf).to(computed)
    is_odd = number[-1] % 2 == 1
    # Added to the result: NaN if it failed, and otherwise 0, since which of 0 and -0 is smaller depends on the machine.
    zero = torch.where(number[-1] > trim, torch.nan, 0.0).to(computed)
    network = _selection(count, range(odd[0], even[1] + 1))
    tiles = (winners.split(_TILE, dim=1), out.split(_TILE)) if winners.is_cpu else ((winners,), (out,))
    for tile, target in zip(*tiles, strict=True):
        values = tile.to(computed).nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
        rows = list(torch.where(lost[:, None], filler[:, None], values))
        for i, j, smaller, larger in network:
            low = torch.minimum(rows[i], rows[j]) if smaller else rows[i]
            rows[j] = torch.maximum(rows[i], rows[j]) if larger else rows[j]
            rows[i] = low
        mean = torch.where(is_odd, _mean(rows, odd, by_half=True), _mean(rows, even, by_half=False))
        target.copy_(mean.add_(zero))


def _mean(ranked: Sequence[Tensor], ranks: tuple[int, int], *, by_half: bool) -> Tensor:
    """Return the mean of the values from one rank to another, the first and the last by half if so."""
    first, last = ranks
    weights = [0.5 if by_half and rank in ranks else 1.0 for rank in range(first, last + 1)]
    total = ranked[first] * weights[0]
    for rank, weight in zip(range(first + 1, last + 1), weights[1:], strict=True):
        total = total + ranked[rank] * weight
    # Rounding and overflow must not lead out of the range.
    return (total * (1 / sum(weights))).clamp(ranked[first], ranked[last])


def sorting_network(count: int) -> Iterator[tuple[int, int]]:
    """Yield the comparators (i, j), i < j, that sort this many values: Batcher's merge exchange.

    Source: Knuth, The Art of Computer Programming, volume 3, section 5.2.2, algorithm M.
    """
    top = (1 << (count - 1).bit_length()) >> 1
    p = top
    while p > 0:
        q, r, distance = top, 0, p
        while True:
            yield from ((i, i + distance) for i in range(count - distance) if i & p == r)
            if q == p:
                break
            distance, q, r = q - p, q // 2, p
        p //= 2


def _selection(count: int, ranks: Sequence[int]) -> list[tuple[int, int, bool, bool]]:
    """Return the comparators that are needed for these ranks alone, and which of their two results are."""
    needed, kept = set(ranks), []
    for i, j in reversed(list(sorting_network(count))):
        smaller, larger = i in needed, j in needed
        if smaller or larger:
            kept.append((i, j, smaller, larger))
            needed |= {i, j}
    return kept[::-1]
