"""The difference between a wrong message and the right one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Number of elements that are compared at a time, small enough that temporary results stay in the cache.
CHUNK = 2**16
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Difference:
    """The difference between a bad worker's message and the right one.

    Attributes:
        elements: the number of elements that differ in any bit.
        first: the index of the first of them.
        largest: the largest absolute deviation; infinity if it is not finite.
    """

    elements: int
    first: int
    largest: float


def difference(sent: Tensor, right: Tensor) -> Difference:
    """Compare two messages bit by bit."""
    bits = BITS[sent.element_size()]
    elements, first, largest = 0, 0, 0.0
    for i, (one, other) in enumerate(zip(sent.split(CHUNK), right.split(CHUNK), strict=True)):
        differing = one.view(bits) != other.view(bits)
        count = int(differing.count_nonzero())
        if count == 0:
            continue
        if elements == 0:
            first = i * CHUNK + int(differing.view(torch.uint8).argmax())
        elements += count
        deviations = (one.double() - other.double()).abs_()
        deviation = deviations.max().item()
        if deviation != deviation:  # equal infinities give NaN, too
            deviation = deviations.masked_fill_(~differing, 0.0).max().item()
        largest = max(largest, deviation if deviation < float("inf") else float("inf"))
    return Difference(elements, first, largest)


def join(parts: Sequence[tuple[int, Difference | None]]) -> Difference | None:
    """Join the differences of a message's parts, given with the index of each part's first element.

    Returns:
        The difference of the whole message, or None if that of a part is unknown.
    """
    known = [(begin, part) for begin, part in parts if part is not None]
    if len(known) < len(parts):
        return None
    differing = [(begin + part.first, part) for begin, part in known if part.elements]
    if not differing:
        return Difference(0, 0, 0.0)
    elements = sum(part.elements for _, part in differing)
    return Difference(elements, min(first for first, _ in differing), max(part.largest for _, part in differing))


def validate_reported(elements: float, first: float, largest: float, *, length: int) -> Difference | None:
    """Return the difference that a suspect reports about its own message, or None if the report cannot be true."""
    if 0 <= first < length and 0 <= elements <= length and largest >= 0:
        return Difference(int(elements), int(first), largest)
    return None
