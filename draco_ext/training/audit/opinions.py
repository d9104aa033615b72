"""The ranks' opinions about parts in a step: pure functions of the gathered rows, with equal results on all ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from draco_ext.training.record import Digest, digests_in


@dataclass(frozen=True)
class Row:
    """The opinions of one rank after its own pass.

    Attributes:
        computed: the digest of the gradient of its part.
        contributed: the digest of what it has put into the sum: the same, or a gradient that another rank sent it.
        audited: the digest of what was audited of its part: of the first micro-batch if the step has several.
        audits: the digest that it has computed of another's part, for each shift.
        doubts: whether somebody has called `Guard.doubt` on it.
        statistics: for each bucket the sum of squares, the largest absolute value, and the numbers of values that are
            not finite and that are zero.
    """

    computed: Digest
    contributed: Digest
    audited: Digest
    audits: tuple[Digest, ...]
    doubts: bool
    statistics: tuple[tuple[float, float, float, float], ...]


def length_of(shifts: int, buckets: int) -> int:
    """Return the length of a row as numbers."""
    return 2 * (3 + shifts) + 1 + 4 * buckets


def read_row(numbers: Tensor, shifts: int) -> Row:
    """Return what a gathered row (len,) int64 says; its statistics are the bits of float64."""
    computed, contributed, audited, *audits = digests_in(numbers[: 2 * (3 + shifts)])
    rest = numbers[2 * (3 + shifts) :]
    statistics = rest[1:].contiguous().view(-1).view(torch.float64).view(-1, 4).tolist()
    return Row(computed, contributed, audited, tuple(audits), bool(rest[0]), tuple(map(tuple, statistics)))


def opinions_of_others(rows: Sequence[Row], shifts: Sequence[int], part: int) -> dict[int, Digest]:
    """Return by auditor the digests that auditors have computed of a part."""
    n = len(rows)
    return {(part - shift) % n: rows[(part - shift) % n].audits[i] for i, shift in enumerate(shifts)}


def disputed_parts(
    rows: Sequence[Row], shifts: Sequence[int], *, convicted: Collection[int], dropped: Collection[int]
) -> list[int]:
    """Return the parts about which ranks that are not convicted disagree.

    The owner's opinion is what it has contributed: of a convicted rank, what another one has computed for it.

    Args:
        rows: by worker.
        shifts: who has audited whom; worker j part j + shift.
        convicted: workers whose audits do not count.
        dropped: workers whose parts are not in the sum.
    """
    disputed = []
    for part, row in enumerate(rows):
        if part in dropped:
            continue
        others = opinions_of_others(rows, shifts, part)
        right = row.contributed if part in convicted else row.audited
        if any(digest != right for j, digest in others.items() if j not in convicted):
            disputed.append(part)
    return disputed


def settle(opinions: Mapping[int, Digest], *, convicted: Collection[int], least: int) -> Digest | None:
    """Return the digest that `least` ranks or more agree on, without convicted ones; None if none or two are such.

    Args:
        opinions: by worker.
        convicted: workers that do not count.
        least: s + 1.
    """
    votes = Counter(digest for j, digest in opinions.items() if j not in convicted)
    winners = [digest for digest, count in votes.items() if count >= least]
    return winners[0] if len(winners) == 1 else None
