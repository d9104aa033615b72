"""Workers as threads of one process, to test the protocol without processes or a network."""

from __future__ import annotations

import queue
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from draco_ext.protocol.communicator import Communicator, Connection, Pending
from draco_ext.reporting.report import Seconds

T = TypeVar("T")


class _Network:
    """The data that the workers of one group share: collectives by their number, and a queue for every pair."""

    def __init__(self, workers: int, timeout: float) -> None:
        self.workers = workers
        self.timeout = timeout
        self.changed = threading.Condition()
        self.failed = False
        self.sent: dict[int, dict[int, Any]] = defaultdict(dict)  # by number of the collective and worker
        self.queues: dict[tuple[int, int], queue.Queue[Tensor]] = defaultdict(queue.Queue)
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
        self.connect(worker).send(values)

    def receive(self, values: Tensor, worker: int) -> None:
        """See `Communicator.receive`."""
        begin = time.perf_counter()
        _FakeConnection(self._network, self.worker, worker, self._network.timeout).receive(values)
        self.seconds.communicate += time.perf_counter() - begin

    def send_receive(self, values: Tensor, to: int, received: Tensor, source: int) -> Pending:
        """See `Communicator.send_receive`."""
        self.send(values, to)

        def wait() -> Tensor:
            self.receive(received, source)
            return received

        return Pending(wait)

    def connect(self, worker: int) -> Connection:
        """See `Communicator.connect`."""
        return _FakeConnection(self._network, self.worker, worker, None)

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
    def __init__(self, network: _Network, own: int, other: int, timeout: float | None) -> None:
        self._network = network
        self._own = own
        self._other = other
        self._timeout = timeout

    def send(self, values: Tensor) -> None:
        self._network.queues[self._own, self._other].put(values.clone())

    def receive(self, values: Tensor) -> None:
        arriving = self._network.queues[self._other, self._own]
        until = None if self._timeout is None else time.monotonic() + self._timeout
        while not self._network.failed and (until is None or time.monotonic() < until):
            try:
                other = arriving.get(timeout=0.05)
            except queue.Empty:
                continue
            _check_length(values, other)
            values.copy_(other)
            return
        raise RuntimeError(f"rank {self._other} has died or hangs")


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
