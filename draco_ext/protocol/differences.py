"""How far a wrong message was from the right one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Elements of a message that are compared at a time: what is made of them stays in the cache.
CHUNK = 2**16
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Difference:
    """How far a bad worker's message was from what it should have been.

    Attributes:
        elements: how many elements differ in any bit.
        first: the first of them.
        largest: the largest absolute deviation; infinite where it is not finite.
    """

    elements: int
    first: int
    largest: float


def difference(sent: Tensor, right: Tensor) -> Difference:
    """Compare two messages bit by bit."""
    bits = _BITS[sent.element_size()]
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
        if deviation != deviation:  # infinities that are the same make one that is not a number, too
            deviation = deviations.masked_fill_(~differing, 0.0).max().item()
        largest = max(largest, deviation if deviation < float("inf") else float("inf"))
    return Difference(elements, first, largest)


def join(parts: Sequence[tuple[int, Difference | None]]) -> Difference | None:
    """Join the differences of a message's parts, each with the element at which it begins; None if one is unknown."""
    known = [(begin, part) for begin, part in parts if part is not None]
    if len(known) < len(parts):
        return None
    differing = [(begin + part.first, part) for begin, part in known if part.elements]
    if not differing:
        return Difference(0, 0, 0.0)
    elements = sum(part.elements for _, part in differing)
    return Difference(elements, min(first for first, _ in differing), max(part.largest for _, part in differing))


def validate_reported(elements: float, first: float, largest: float, *, length: int) -> Difference | None:
    """Return the difference that a suspect reports of its own message, or None where it cannot be true."""
    if 0 <= first < length and 0 <= elements <= length and largest >= 0:
        return Difference(int(elements), int(first), largest)
    return None
