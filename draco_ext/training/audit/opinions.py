"""The ranks' opinions about parts in a step: pure functions of the gathered rows, with equal results on all ranks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from draco_ext.training.audit.measures import Measured

Agree = Callable[[Measured, Measured], bool]
STATISTICS = 4


@dataclass(frozen=True)
class Row:
    """The opinions of one rank after its own pass.

    Attributes:
        computed: the measure of the gradient of its part.
        contributed: the measure of what it has put into the sum: the same, or a gradient that another rank sent it.
        audited: the measure of what others audit of its part: all, or the gradient of the first mini-batch.
        audits: the measures of what it has computed of others' parts, for each shift.
        doubts: whether somebody has called `AuditGuard.doubt` on it.
        statistics: for each bucket the sum of squares, the largest absolute value, and the numbers of values that are
            not finite and that are zero.
    """

    computed: Measured
    contributed: Measured
    audited: Measured
    audits: tuple[Measured, ...]
    doubts: bool
    statistics: tuple[tuple[float, ...], ...]


def read_row(
    numbers: Tensor, lengths: Sequence[int], buckets: int, read: Callable[[Tensor], Measured]
) -> tuple[Row, Tensor]:
    """Return a gathered row, and the numbers behind it.

    Args:
        numbers: int64; statistics are the bits of float64.
        lengths: the lengths of the measures: computed, contributed, audited, and of each audit.
        buckets: how many buckets there are statistics of.
        read: reads a measure.
    """
    *measures, doubts, statistics, rest = numbers.split(
        [*lengths, 1, STATISTICS * buckets, len(numbers) - sum(lengths) - 1 - STATISTICS * buckets]
    )
    computed, contributed, audited, *audits = map(read, measures)
    values = statistics.contiguous().view(torch.float64).view(-1, STATISTICS).tolist()
    return Row(computed, contributed, audited, tuple(audits), bool(doubts), tuple(map(tuple, values))), rest


def opinions_of_others(rows: Sequence[Row], shifts: Sequence[int], part: int) -> dict[int, Measured]:
    """Return by auditor the measures that auditors have computed of a part."""
    n = len(rows)
    return {(part - shift) % n: rows[(part - shift) % n].audits[i] for i, shift in enumerate(shifts)}


def disputed_parts(
    rows: Sequence[Row], shifts: Sequence[int], agree: Agree, *, convicted: Collection[int], dropped: Collection[int]
) -> list[int]:
    """Return the parts about which ranks that are not convicted disagree.

    The owner's opinion is what it has contributed: of a convicted rank, what another one has computed for it.

    Args:
        rows: by worker.
        shifts: who has audited whom; worker j part j + shift.
        agree: compares two measures.
        convicted: workers whose audits do not count.
        dropped: workers whose parts are not in the sum.
    """
    disputed = []
    for part, row in enumerate(rows):
        if part in dropped:
            continue
        others = opinions_of_others(rows, shifts, part)
        right = row.contributed if part in convicted else row.audited
        if not all(agree(measure, right) for j, measure in others.items() if j not in convicted):
            disputed.append(part)
    return disputed


def settle(
    opinions: Mapping[int, Measured], agree: Agree, *, convicted: Collection[int], least: int
) -> Measured | None:
    """Return a measure with which `least` workers agree, itself included; None if none or two different ones are such.

    Args:
        opinions: by worker.
        agree: compares two measures.
        convicted: workers that do not count.
        least: s + 1.
    """
    counted = [measure for j, measure in opinions.items() if j not in convicted]
    votes = [sum(agree(measure, other) for other in counted) for measure in counted]
    winners = [measure for measure, count in zip(counted, votes, strict=True) if count >= least]
    if not winners or not all(agree(winner, winners[0]) for winner in winners):
        return None
    return counted[votes.index(max(votes))]
