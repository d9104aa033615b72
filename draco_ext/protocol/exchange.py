"""The one scheduler of exchanges: overlaps those of several buffers, in an order that is the same on all ranks."""

from __future__ import annotations

import enum
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from draco_ext.protocol.communicator import Pending
from draco_ext.protocol.messages import ExchangeOutcome
from draco_ext.reporting.report import Seconds

T = TypeVar("T")


class Turn(enum.Enum):
    """What an exchange yields to let others go on although it waits for nothing."""

    EARLIER_EXCHANGES_FIRST = enum.auto()


# An exchange yields the collective whose result it needs next, and is sent that; or a turn, and is sent None.
Steps = Generator[Pending | Turn, Any, T]
Exchange = Steps[ExchangeOutcome]
# Everybody's rows, and the workers whose row is missing.
RecordExchange = Steps[tuple[Tensor, tuple[int, ...]]]


@dataclass
class InFlightExchange:
    """A pending exchange and what its result is given to."""

    steps: Steps[Any]
    name: str
    complete: Callable[[Any], None]
    background: bool
    waits_for: Pending | Turn = Turn.EARLIER_EXCHANGES_FIRST

    @property
    def resumes_on_next_bucket(self) -> bool:
        """Whether it goes on when the next buffer's exchange begins."""
        if self.background:
            return False
        return not isinstance(self.waits_for, Pending) or self.waits_for.resume_on_next_bucket


class ExchangeScheduler:
    """Runs the exchanges of a step, each a generator, as cooperative tasks on the calling thread.

    Every rank starts the same exchanges in the same order, so that collectives meet: nothing here depends on what has
    arrived. What an exchange waits for runs while the next buffer's gradients are being computed.

    Args:
        seconds: where the time is counted.
    """

    def __init__(self, seconds: Seconds) -> None:
        self._seconds = seconds
        self._in_flight: list[InFlightExchange] = []

    def start(self, steps: Steps[T], *, name: str, complete: Callable[[T], None], background: bool = False) -> None:
        """Start an exchange, and let those started before go on, as far as they want to.

        Args:
            steps: the exchange.
            name: what an error says of it.
            complete: called with its result.
            background: no other exchange and no gradient needs its result: it goes on when all others are done.
        """
        earlier = [] if background else [other for other in self._in_flight if other.resumes_on_next_bucket]
        exchange = InFlightExchange(steps, name, complete, background)
        self._in_flight.append(exchange)
        for each in (exchange, *earlier):
            self._advance(each)

    def complete_all(self) -> None:
        """Bring all exchanges to their end, now that no other will be started in this step."""
        while self._in_flight:
            ready = [exchange for exchange in self._in_flight if exchange.resumes_on_next_bucket]
            for exchange in ready or list(self._in_flight):
                self._advance(exchange)

    def close(self) -> None:
        """Give up all exchanges that are not at their end, in a step that is aborted."""
        exchanges, self._in_flight = self._in_flight, []
        for exchange in exchanges:
            exchange.steps.close()

    def _advance(self, exchange: InFlightExchange) -> None:
        """Run an exchange to the next thing that it waits for, or to its end."""
        with self._seconds.decoding():
            try:
                waits_for = exchange.waits_for
                value = waits_for.wait() if isinstance(waits_for, Pending) else None
                exchange.waits_for = exchange.steps.send(value)
            except StopIteration as stop:
                self._in_flight.remove(exchange)
                exchange.complete(stop.value)
            except RuntimeError as error:
                raise RuntimeError(f"{exchange.name}: {error}") from error


def run_alone(steps: Steps[T]) -> T:
    """Run an exchange to its end with nothing else under way, and return its result."""
    value = None
    while True:
        try:
            waits_for = steps.send(value)
        except StopIteration as stop:
            result: T = stop.value
            return result
        value = waits_for.wait() if isinstance(waits_for, Pending) else None
