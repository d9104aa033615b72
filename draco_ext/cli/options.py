"""Types of options that several commands share."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from typing import Any

import click


class Count(click.IntRange):
    """The type of whole numbers in a range, which may also be written as 25e6."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the number, or raise an error that click prints in one line."""
        number: Any = _whole(value) if isinstance(value, str) else value  # click refuses text
        return super().convert(number, param, ctx)


class Quantity(click.FloatRange):
    """The type of positive quantities that are written with a unit, as 20us or 100Gbit/s.

    Args:
        name: the name that help and errors give it.
        units: by unit, the factor of a number that is written with it; an empty one if it may be left out.
    """

    def __init__(self, name: str, units: Mapping[str, float]) -> None:
        super().__init__(min=0, min_open=True)
        self.name = name
        self._units = units

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the quantity in the unit whose factor is 1, or raise an error that click prints in one line."""
        number = value if isinstance(value, float) else self._number(str(value))
        if not 0 < number < math.inf:
            units = ", ".join(unit for unit in self._units if unit)
            self.fail(f"{value!r} is not a positive number with one of the units {units}", param, ctx)
        return number

    def _number(self, text: str) -> float:
        match = re.fullmatch(r"([0-9.]+(?:e[+-]?[0-9]+)?)\s*([A-Za-z/]*)", text.strip())
        if match is None or match[2] not in self._units:
            return math.nan
        try:
            return float(match[1]) * self._units[match[2]]
        except ValueError:
            return math.nan


SECONDS = Quantity("time", {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9})
BYTES_PER_SECOND = Quantity(
    "rate", {"GB/s": 1e9, "MB/s": 1e6, "TB/s": 1e12, "Gbit/s": 1e9 / 8, "Mbit/s": 1e6 / 8, "B/s": 1.0}
)


def _whole(text: str) -> int | str:
    """Return the number that a text represents, or the text if it is not a whole number below 1e18."""
    try:
        number = Decimal(text)
    except InvalidOperation:
        return text
    small = number.is_finite() and number.adjusted() < 18  # 1e999999999 would take all memory
    return int(number) if small and number == int(number) else text
