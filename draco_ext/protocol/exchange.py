"""The scheduler of exchanges: it overlaps those of several buffers, in the same order on all ranks."""

from __future__ import annotations

import abc
import enum
import functools
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from draco_ext.protocol.communicator import Addressed, Communicator, Pending
from draco_ext.protocol.messages import ExchangeOutcome
from draco_ext.reporting.report import Seconds

T = TypeVar("T")


class Turn(enum.Enum):
    """A wait for no message: for the begin of the exchange, or, yielded by it, for others to go on first."""

    BEGIN = enum.auto()
    EARLIER_EXCHANGES_FIRST = enum.auto()


@dataclass(frozen=True)
class HostCopy:
    """Values that an exchange needs on the CPU.

    A copy from another device makes the host wait for everything that the device has been given to do. So all exchanges
    of a step share one.
    """

    values: Tensor


class Together(abc.ABC):
    """A few values that an exchange sends to other workers and gets from them.

    Those of all exchanges that go on at the same time go in one collective, which begins before any of them goes on.
    The exchange is sent the pending result.
    """

    communicator: Communicator

    @classmethod
    @abc.abstractmethod
    def begin(cls, communicator: Communicator, requests: Sequence[Any]) -> list[Pending]:
        """Begin what exchanges have asked for; return the pending result of each."""


@dataclass(frozen=True)
class Gather(Together):
    """Values that an exchange needs from every worker: (workers, *values.shape), row j from worker j."""

    communicator: Communicator
    values: Tensor

    @classmethod
    def begin(cls, communicator: Communicator, requests: Sequence[Gather]) -> list[Pending]:
        """See `Together.begin`."""
        tensors = [request.values for request in requests]
        if len(tensors) == 1:
            return [communicator.all_gather(tensors[0])]
        pending = communicator.all_gather(join_bytes(tensors))
        sizes = [tensor.nbytes for tensor in tensors]
        parts = functools.cache(lambda: pending.wait().split_with_sizes(sizes, dim=1))

        def part(i: int) -> Pending:
            like = tensors[i]
            return Pending(lambda: parts()[i].contiguous().view(like.dtype).view(-1, *like.shape))

        return [part(i) for i in range(len(tensors))]


@dataclass(frozen=True)
class Swap(Together):
    """Tensors that go straight to other workers, and others that arrive from them; see `Communicator.exchange`."""

    communicator: Communicator
    leaving: Sequence[Addressed]
    arriving: Sequence[Addressed]

    @classmethod
    def begin(cls, communicator: Communicator, requests: Sequence[Swap]) -> list[Pending]:
        """See `Together.begin`."""
        pending = communicator.exchange(
            [each for request in requests for each in request.leaving],
            [each for request in requests for each in request.arriving],
        )
        wait = functools.cache(pending.wait)
        return [Pending(wait) for _ in requests]


Wait = Pending | Turn | HostCopy | Together
# An exchange is a generator. It yields a collective or a copy and is sent the result; what goes together with that of
# others, and is sent the pending result; or a turn, and is sent None.
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
    waits_for: Wait = Turn.BEGIN

    @property
    def resumes_on_next_bucket(self) -> bool:
        """Return whether it goes on when the next buffer's exchange begins."""
        if self.waits_for is Turn.BEGIN:
            return True
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

    def start(
        self,
        steps: Steps[T],
        *,
        name: str,
        complete: Callable[[T], None],
        background: bool = False,
        with_next: bool = False,
    ) -> None:
        """Start an exchange and resume the earlier ones that go on with the next bucket.

        Args:
            steps: the exchange.
            name: the name that errors give it.
            complete: called with its result.
            background: begin it together with the next exchange, and resume it only when all others are complete, since
                nothing else needs its result.
            with_next: begin it together with the next exchange.
        """
        earlier = [other for other in self._in_flight if other.resumes_on_next_bucket]
        exchange = InFlightExchange(steps, name, complete, background)
        self._in_flight.append(exchange)
        if not (with_next or background):
            self._advance_together([exchange, *earlier])

    def complete_all(self) -> None:
        """Complete all exchanges; no other may be started in this step."""
        while self._in_flight:
            ready = [exchange for exchange in self._in_flight if exchange.resumes_on_next_bucket]
            others = [exchange for exchange in self._in_flight if not isinstance(exchange.waits_for, HostCopy)]
            if not ready and not others:
                self._copy_to_host()
            self._advance_together(ready or others or list(self._in_flight))

    def _advance_together(self, exchanges: Sequence[InFlightExchange]) -> None:
        """Run exchanges until each has ended or waits for something that has begun."""
        for exchange in exchanges:
            self._advance(exchange)
        while waiting := [
            (each, each.waits_for)
            for each in exchanges
            if each in self._in_flight and isinstance(each.waits_for, Together)
        ]:
            first = waiting[0][1]
            alike = [
                (each, request)
                for each, request in waiting
                if type(request) is type(first) and request.communicator is first.communicator
            ]
            results = type(first).begin(first.communicator, [request for _, request in alike])
            for (exchange, _), result in zip(alike, results, strict=True):
                self._advance(exchange, result)

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

    def _advance(self, exchange: InFlightExchange, begun: Pending | None = None) -> None:
        """Run an exchange until it yields or ends; `begun`: what it has asked for, see `Together`."""
        with self._seconds.decoding():
            try:
                waits_for = exchange.waits_for
                exchange.waits_for = exchange.steps.send(begun or _result(waits_for))
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


def _result(waits_for: Wait) -> Tensor | Pending | None:
    """Wait, and return what an exchange is sent."""
    if isinstance(waits_for, Together):
        (pending,) = waits_for.begin(waits_for.communicator, [waits_for])
        return pending
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
