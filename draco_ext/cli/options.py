"""Types of options that several commands share."""

from __future__ import annotations

from decimal import Decimal, InvalidOperation
from typing import Any

import click


class Count(click.IntRange):
    """The type of whole numbers in a range, which may also be written as 25e6."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the number, or raise an error that click prints in one line."""
        number: Any = _whole(value) if isinstance(value, str) else value  # click refuses text
        return super().convert(number, param, ctx)


def _whole(text: str) -> int | str:
    """Return the number that a text represents, or the text if it is not a whole number below 1e18."""
    try:
        number = Decimal(text)
    except InvalidOperation:
        return text
    small = number.is_finite() and number.adjusted() < 18  # 1e999999999 would take all memory
    return int(number) if small and number == int(number) else text
