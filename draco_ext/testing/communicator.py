"""Workers as threads of one process, to test the protocol without processes or a network."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from draco_ext.protocol.communicator import Addressed, Communicator, Connection, Pending
from draco_ext.reporting.report import Seconds

T = TypeVar("T")


class _Network:
    """The data that the workers of one group share: what was sent in collectives, and from one worker to another.

    Attributes:
        sent: what each worker has sent in a collective, by the number of the collective and worker.
        mail: what one worker has sent to another, by source, destination and number.
    """

    def __init__(self, workers: int, timeout: float) -> None:
        self.workers = workers
        self.timeout = timeout
        self.changed = threading.Condition()
        self.failed = False
        self.sent: dict[int, dict[int, Any]] = defaultdict(dict)
        self.mail: dict[tuple[int, int, int], Tensor] = {}
        self.splits: dict[tuple[int, int], _Network] = {}  # by number of the collective and part

    def post(self, number: int, worker: int, value: Any) -> None:
        with self.changed:
            self.sent[number][worker] = value
            self.changed.notify_all()

    def wait(self, number: int, workers: Sequence[int]) -> list[Any]:
        """Wait for the workers' values with this number and return them."""
        with self.changed:
            there = self.changed.wait_for(
                lambda: self.failed or all(j in self.sent[number] for j in workers), self.timeout
            )
            absent = [j for j in workers if j not in self.sent[number]]
            if absent or not there:
                raise RuntimeError(f"rank {absent[0]} has died, hangs, or sends something of another length")
            return [self.sent[number][j] for j in workers]

    def put(self, source: int, to: int, number: int, values: Tensor) -> None:
        with self.changed:
            self.mail[source, to, number] = values
            self.changed.notify_all()

    def take(self, source: int, to: int, number: int, timeout: float | None) -> Tensor:
        """Wait for what one worker sends to another with this number and return it."""
        place = source, to, number
        with self.changed:
            self.changed.wait_for(lambda: self.failed or place in self.mail, timeout)
            if place not in self.mail:
                raise RuntimeError(f"rank {source} has died, hangs, or sends something of another length")
            return self.mail.pop(place)

    def fail(self) -> None:
        with self.changed:
            self.failed = True
            self.changed.notify_all()
        for part in self.splits.values():
            part.fail()


class FakeCommunicator(Communicator):
    """A communicator between threads; made by `run_workers`. Rank and worker are the same number.

    Values are copied when a collective begins, so later changes to them have no effect.
    """

    def __init__(self, network: _Network, worker: int, seconds: Seconds | None = None) -> None:
        self.worker = worker
        self.workers = network.workers
        self.root = 0
        self.seconds = Seconds() if seconds is None else seconds
        self._network = network
        self._number = 0
        # How much was sent to and received from each worker. What is received has its number from the beginning, as a
        # process group matches messages in the order in which they are posted, whenever they are waited for.
        self._sent_to: dict[int, int] = defaultdict(int)
        self._received_from: dict[int, int] = defaultdict(int)

    def all_gather(self, values: Tensor) -> Pending:
        """See `Communicator.all_gather`."""
        return self._collective(values, range(self.workers), torch.stack)

    def all_gather_p2p(self, values: Tensor, rows: Tensor) -> Pending:
        """See `Communicator.all_gather_p2p`."""

        def fill(others: list[Tensor]) -> Tensor:
            for row, other in zip(rows, others, strict=True):
                _check_length(row, other)
                row.copy_(other)
            return rows

        return self._collective(values, range(self.workers), fill)

    def all_reduce(self, values: Tensor, *, resume_on_next_bucket: bool = False) -> Pending:
        """See `Communicator.all_reduce`."""

        def add(others: list[Tensor]) -> Tensor:
            total = others[0].clone()
            for other in others[1:]:
                total += other
            return values.copy_(total)

        return self._collective(values, range(self.workers), add, resume_on_next_bucket=resume_on_next_bucket)

    def broadcast(self, values: Tensor, source: int) -> Pending:
        """See `Communicator.broadcast`."""
        return self._collective(values, [source], lambda others: values.copy_(others[0]), resume_on_next_bucket=False)

    def send(self, values: Tensor, worker: int) -> None:
        """See `Communicator.send`."""
        self.post(values, worker)

    def receive(self, values: Tensor, worker: int) -> None:
        """See `Communicator.receive`."""
        self.exchange([], [(values, worker)]).wait()

    def exchange(self, leaving: Sequence[Addressed], arriving: Sequence[Addressed]) -> Pending:
        """See `Communicator.exchange`."""
        for values, worker in leaving:
            self.post(values, worker)
        expected = [self.expect(values, worker, self._network.timeout) for values, worker in arriving]

        def wait() -> Tensor:
            begin = time.perf_counter()
            for receive in expected:
                receive()
            self.seconds.communicate += time.perf_counter() - begin
            return torch.empty(0)

        return Pending(wait)

    def post(self, values: Tensor, worker: int) -> None:
        """Send a copy of values to one worker."""
        self._sent_to[worker] += 1
        self._network.put(self.worker, worker, self._sent_to[worker], values.clone())

    def expect(self, values: Tensor, worker: int, timeout: float | None) -> Callable[[], None]:
        """Return a function that waits for one worker's values and receives them in place."""
        self._received_from[worker] += 1
        number = self._received_from[worker]

        def receive() -> None:
            other = self._network.take(worker, self.worker, number, timeout)
            _check_length(values, other)
            values.copy_(other)

        return receive

    def connect(self, worker: int) -> Connection:
        """See `Communicator.connect`."""
        return _FakeConnection(self, worker)

    def split(self, parts: Sequence[Sequence[int]], *, extra_timeout: float | None = None) -> Communicator:
        """See `Communicator.split`."""
        number = self._next()
        network = self._network
        place = next(i for i, part in enumerate(parts) if self.worker in part)
        with network.changed:
            if (number, place) not in network.splits:
                timeout = network.timeout + (extra_timeout or 0)
                network.splits[number, place] = _Network(len(parts[place]), timeout)
            own = network.splits[number, place]
        return FakeCommunicator(own, list(parts[place]).index(self.worker), self.seconds)

    def _next(self) -> int:
        self._number += 1
        return self._number

    def _collective(
        self,
        values: Tensor,
        sources: Sequence[int],
        result: Callable[[list[Tensor]], Tensor],
        *,
        resume_on_next_bucket: bool = True,
    ) -> Pending:
        number = self._next()
        self._network.post(number, self.worker, values.clone())

        def wait() -> Tensor:
            begin = time.perf_counter()
            others = self._network.wait(number, sources)
            self.seconds.communicate += time.perf_counter() - begin
            return result(others)

        return Pending(wait, resume_on_next_bucket=resume_on_next_bucket)


class _FakeConnection(Connection):
    def __init__(self, communicator: FakeCommunicator, other: int) -> None:
        self._communicator = communicator
        self._other = other

    def start_send(self, values: Tensor) -> Callable[[], None]:
        self._communicator.post(values, self._other)
        return lambda: None

    def receive(self, values: Tensor) -> None:
        self._communicator.expect(values, self._other, None)()


def _check_length(expected: Tensor, got: Tensor) -> None:
    if expected.shape != got.shape or expected.dtype != got.dtype:
        raise RuntimeError(f"a message has {got.numel()} elements of {got.dtype} instead of {expected.numel()}")


def run_workers(function: Callable[..., T], workers: int, *arguments: Any, timeout: float = 30.0) -> list[T]:
    """Run a function as n workers, which are threads of this process, and return their results.

    The threads share torch's global generators.

    Args:
        function: f(communicator, *arguments).
        workers: the number of workers, n.
        arguments: the further arguments, the same for all workers.
        timeout: seconds after which a worker gives up waiting for another.

    Returns:
        A list with the result of every worker.

    Raises:
        BaseException: the first error that a worker has raised.
    """
    network = _Network(workers, timeout)
    results: list[Any] = [None] * workers
    errors: list[tuple[int, BaseException]] = []

    def run(worker: int) -> None:
        try:
            results[worker] = function(FakeCommunicator(network, worker), *arguments)
        except BaseException as error:
            errors.append((worker, error))
            network.fail()

    threads = [threading.Thread(target=run, args=(worker,), daemon=True) for worker in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    network.fail()  # so that the threads of a server end
    if errors:
        raise errors[0][1]  # the first error, which has caused the others
    return results
