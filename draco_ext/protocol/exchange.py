"""The scheduler of exchanges: it overlaps those of several buffers, in the same order on all ranks."""

from __future__ import annotations

import enum
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from draco_ext.protocol.communicator import Pending
from draco_ext.protocol.messages import ExchangeOutcome
from draco_ext.reporting.report import Seconds

T = TypeVar("T")


class Turn(enum.Enum):
    """A value that an exchange yields to let others go on although it waits for nothing."""

    EARLIER_EXCHANGES_FIRST = enum.auto()


@dataclass(frozen=True)
class HostCopy:
    """Values that an exchange needs on the CPU.

    A copy from another device makes the host wait for everything that the device has been given to do. So all exchanges
    of a step share one.
    """

    values: Tensor


Wait = Pending | Turn | HostCopy
# An exchange is a generator. It yields a collective or a copy and is sent the result, or a turn and is sent None.
Steps = Generator[Wait, Any, T]
Exchange = Steps[ExchangeOutcome]
# Its result: the rows of all workers, and the workers whose row is missing.
RecordExchange = Steps[tuple[Tensor, tuple[int, ...]]]


@dataclass
class InFlightExchange:
    """A pending exchange and the function that is called with its result."""

    steps: Steps[Any]
    name: str
    complete: Callable[[Any], None]
    background: bool
    waits_for: Wait = Turn.EARLIER_EXCHANGES_FIRST

    @property
    def resumes_on_next_bucket(self) -> bool:
        """Return whether it goes on when the next buffer's exchange begins."""
        if self.background or isinstance(self.waits_for, HostCopy):
            return False
        return not isinstance(self.waits_for, Pending) or self.waits_for.resume_on_next_bucket


class ExchangeScheduler:
    """A scheduler that runs the exchanges of a step, which are generators, as cooperative tasks on the calling thread.

    Every rank starts the same exchanges in the same order, and the schedule does not depend on what has arrived. So
    all ranks call collectives in the same order. Collectives run while the next buffer's gradients are being computed.

    Args:
        seconds: counts the time spent.

    Attributes:
        host_copies: how often the host has waited for copies from the device.
    """

    def __init__(self, seconds: Seconds) -> None:
        self.host_copies = 0
        self._seconds = seconds
        self._in_flight: list[InFlightExchange] = []

    def start(self, steps: Steps[T], *, name: str, complete: Callable[[T], None], background: bool = False) -> None:
        """Start an exchange and resume the earlier ones that go on with the next bucket.

        Args:
            steps: the exchange.
            name: the name that errors give it.
            complete: called with its result.
            background: resume it only when all other exchanges are complete, since nothing else needs its result.
        """
        earlier = [] if background else [other for other in self._in_flight if other.resumes_on_next_bucket]
        exchange = InFlightExchange(steps, name, complete, background)
        self._in_flight.append(exchange)
        for each in (exchange, *earlier):
            self._advance(each)

    def complete_all(self) -> None:
        """Complete all exchanges; no other may be started in this step."""
        while self._in_flight:
            ready = [exchange for exchange in self._in_flight if exchange.resumes_on_next_bucket]
            others = [exchange for exchange in self._in_flight if not isinstance(exchange.waits_for, HostCopy)]
            if not ready and not others:
                self._copy_to_host()
            for exchange in ready or others or list(self._in_flight):
                self._advance(exchange)

    def _copy_to_host(self) -> None:
        """Copy what exchanges need on the CPU, all at once."""
        copies = [exchange.waits_for.values for exchange in self._in_flight if isinstance(exchange.waits_for, HostCopy)]
        with self._seconds.decoding():
            copied = copy_to_host(copies)
        self.host_copies += 1
        for exchange, values in zip(self._in_flight, copied, strict=True):
            exchange.waits_for = HostCopy(values)

    def close(self) -> None:
        """Close all pending exchanges of an aborted step."""
        exchanges, self._in_flight = self._in_flight, []
        for exchange in exchanges:
            exchange.steps.close()

    def _advance(self, exchange: InFlightExchange) -> None:
        """Run an exchange until it yields or ends."""
        with self._seconds.decoding():
            try:
                waits_for = exchange.waits_for
                exchange.waits_for = exchange.steps.send(_result(waits_for))
            except StopIteration as stop:
                self._in_flight.remove(exchange)
                exchange.complete(stop.value)
            except RuntimeError as error:
                raise RuntimeError(f"{exchange.name}: {error}") from error


def run_alone(steps: Steps[T]) -> T:
    """Run a single exchange to its end and return its result."""
    value = None
    while True:
        try:
            waits_for = steps.send(value)
        except StopIteration as stop:
            result: T = stop.value
            return result
        value = _result(waits_for)


def _result(waits_for: Wait) -> Tensor | None:
    """Wait, and return what an exchange is sent."""
    if isinstance(waits_for, Pending):
        return waits_for.wait()
    return waits_for.values.cpu() if isinstance(waits_for, HostCopy) else None


def copy_to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return tensors on the CPU, from one copy if they are elsewhere."""
    if all(tensor.device.type == "cpu" for tensor in tensors):
        return list(tensors)
    return split_bytes(join_bytes(tensors).cpu(), tensors)


def join_bytes(tensors: Sequence[Tensor]) -> Tensor:
    """Return the bytes of all tensors, one after the other."""
    return torch.cat([tensor.contiguous().flatten().view(torch.uint8) for tensor in tensors])


def split_bytes(values: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Return the tensors whose bytes `join_bytes` has joined; `like`: tensors of the same shapes and dtypes."""
    parts = values.split([tensor.numel() * tensor.element_size() for tensor in like])
    # A clone is aligned for its dtype, which a part need not be.
    return [part.clone().view(tensor.dtype).view(tensor.shape) for part, tensor in zip(parts, like, strict=True)]
