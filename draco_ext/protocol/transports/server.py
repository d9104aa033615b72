"""The paper's parameter server as a transport: one trusted rank gathers, decodes and returns the result."""

from __future__ import annotations

import itertools
import queue
import threading
import time
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from draco_ext.codes import Code
from draco_ext.protocol.communicator import Communicator, Connection
from draco_ext.protocol.differences import Difference
from draco_ext.protocol.exchange import Exchange, RecordExchange
from draco_ext.protocol.messages import (
    ExchangeOutcome,
    Message,
    finish_slices,
    read_records,
    slices,
    workers_in,
    write_truncation_sentinel,
)
from draco_ext.protocol.transports.base import Transport

# The server drops a rank that is behind by more results than this; each of them keeps a bucket in memory.
MOST_UNCLAIMED = 32

_DECODED, _FAILED, _GIVEN_UP, _TAKEN = range(4)


class ServerTransport(Transport):
    """A transport in which a server receives and decodes all messages, and sends the gradient and the verdict to all.

    The deadline is counted from the moment when the server has its own message. A rank whose message has not arrived by
    then is an erasure for that bucket, and the server does not wait for it again until it has caught up. It still gets
    every result, in order, and so keeps the same parameters. A rank that has died, or that is more than
    `MOST_UNCLAIMED` results behind, is an erasure from then on.

    One message per rank is sent to the server and one back, slice by slice. The server holds the n slices of two turns,
    the slices of every turn with a late rank until its slice has arrived, and the results for such a rank.
    """

    trust = (
        "server: rank 0 is trusted; of all ranks up to s may compute and send anything, or twice as many may be "
        "missing: dead, hung or late."
    )

    is_served = True

    def __init__(
        self, code: Code, communicator: Communicator, *, deadline: float, atol: float = 0.0, rtol: float = 0.0
    ) -> None:
        # Connections of its own with a longer timeout, since only the server decides who is late.
        own = communicator.split([range(communicator.workers)], extra_timeout=deadline)
        super().__init__(code, own, atol=atol, rtol=rtol)
        self.server = communicator.root
        self._deadline = deadline
        self._connections: dict[int, _WorkerConnection] = {}
        self._turns = itertools.count()
        if own.worker == self.server:
            self._arrived: queue.Queue[_Arrival] = queue.Queue()
            others = (j for j in range(code.workers) if j != self.server)
            self._connections = {j: _WorkerConnection(own.connect(j), j, self._arrived) for j in others}
            weakref.finalize(self, _close, list(self._connections.values()))

    def _exchange(self, message: Message, number: int) -> Exchange:
        """Send to the server and wait for its answer, slice by slice."""
        yield from ()  # a generator without a yield: messages and results alternate on a rank's connection
        pieces = slices(message.values)
        exchange = self._serve if self.communicator.worker == self.server else self._ask_for
        return finish_slices(message, [exchange(values, last=values is pieces[-1]) for values in pieces])

    def _serve(self, values: Tensor, *, last: bool) -> ExchangeOutcome:
        """Decode all workers' values on the server; the result replaces its own values."""
        rows, absent = self._collect(values.cpu())
        # Not into the values: the result may wait for a late worker beyond this step.
        gradient = torch.empty_like(values)
        outcome = self._decode_rows(rows.to(values.device), gradient, absent)
        outcome = replace(outcome, missing=tuple(sorted(absent)))
        verdict = _write(outcome, self.code.workers)
        self._answer((verdict,) if outcome.failed else (verdict, gradient.cpu()), absent, complete=last)
        values.copy_(gradient)
        return outcome

    def _ask_for(self, values: Tensor, *, last: bool) -> ExchangeOutcome:
        """Send a rank's values to the server and receive the decoded ones in their place."""
        answer = values.cpu()
        verdict = self._ask(answer, answer)
        values.copy_(answer)
        found, missing, left_out = _read(verdict)
        return ExchangeOutcome(found, bool(verdict[0, 0] == _FAILED), missing, left_out)

    def gather_record(self, record: Tensor) -> RecordExchange:
        """Gather through the server, in turn with the buckets; see `Transport.gather_record`."""
        yield from ()
        if self.communicator.worker == self.server:
            rows, absent = self._collect(record.cpu())
            rows, missing = read_records(rows.clone(), absent)
            verdict = _write(ExchangeOutcome({}, False, missing), self.code.workers)
            self._answer((verdict, rows), absent, complete=False)
            return rows, missing
        rows = torch.empty(self.code.workers, record.numel(), dtype=record.dtype)
        _, missing, _ = _read(self._ask(record, rows))
        return rows, missing

    def send_to_server(self, worker: int, values: Tensor) -> None:
        """Send a worker's values (CPU) to the server, where they replace `values`. Only these two ranks call it.

        If they do not arrive in time, the server's values stay unchanged.
        """
        if self.communicator.worker != self.server:
            self._ask(values, values)
            return
        connection, came = self._connections[worker], torch.empty_like(values)
        turn = _Turn(next(self._turns), {worker: came}, values)
        connection.begin(turn)
        in_time = worker in self._await(turn, {worker} if connection.in_time else set())
        if in_time:
            values.copy_(came)
        connection.end((self._status(_TAKEN),), late=not in_time, complete=False)

    def send_from_server(self, worker: int, values: Tensor) -> None:
        """Send the server's values (CPU) to a worker, where they replace `values`. Only these two ranks call it.

        The server does not wait for the worker.
        """
        ready = torch.zeros(1, dtype=torch.int64)
        if self.communicator.worker != self.server:
            self._ask(ready, values)
            return
        connection = self._connections[worker]
        connection.begin(_Turn(next(self._turns), None, ready))
        connection.end((self._status(_DECODED), values), late=False, complete=False)

    def _status(self, status: int) -> Tensor:
        verdict = _write(ExchangeOutcome({}, False), self.code.workers)
        verdict[0, 0] = status
        return verdict

    def _ask(self, values: Tensor, answer: Tensor) -> Tensor:
        """Send values to the server, receive its answer unless it is a failure, and return the verdict."""
        verdict = torch.empty(self.code.workers + 1, len(_COLUMNS), dtype=torch.float64)
        try:
            self.communicator.send(values.cpu(), self.server)
            self.communicator.receive(verdict, self.server)
            if verdict[0, 0] == _DECODED:
                self.communicator.receive(answer, self.server)
        except RuntimeError as error:
            raise RuntimeError("the server, rank 0, cannot be reached any more") from error
        if verdict[0, 0] == _GIVEN_UP:
            raise RuntimeError(f"this rank was {MOST_UNCLAIMED} buckets behind the others, and was given up")
        return verdict

    def _collect(self, values: Tensor) -> tuple[Tensor, set[int]]:
        """Return all workers' values, row j from worker j, and the late workers, whose rows may still change."""
        begin = time.perf_counter()
        rows = write_truncation_sentinel(values.new_empty(self.code.workers, values.numel()))
        rows[self.server] = values
        turn = _Turn(next(self._turns), rows, values)
        awaited = set()
        for j, connection in self._connections.items():
            connection.begin(turn)
            if connection.in_time:
                awaited.add(j)
        arrived = self._await(turn, awaited)
        turn.rows = None
        self.communicator.seconds.communicate += time.perf_counter() - begin
        return rows, self._connections.keys() - arrived

    def _await(self, turn: _Turn, awaited: set[int]) -> set[int]:
        """Return the awaited workers whose values arrive before the deadline."""
        arrived = set()
        until = time.monotonic() + self._deadline
        while awaited:
            try:
                j, answered = self._arrived.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                break
            if answered is None:
                awaited.discard(j)
            elif answered == turn.number:
                awaited.discard(j)
                arrived.add(j)
        return arrived

    def _answer(self, result: tuple[Tensor, ...], absent: set[int], *, complete: bool) -> None:
        """Send a result, which begins with a verdict, to all workers, including late ones."""
        for j, connection in self._connections.items():
            connection.end(result, late=j in absent, complete=complete)


# Columns of a verdict, the numbers that the server sends about each worker; row 0 holds the status of the bucket.
_COLUMNS = ("suspect", "missing", "known", "elements", "first", "largest", "left out")


def _write(outcome: ExchangeOutcome, workers: int) -> Tensor:
    verdict = torch.zeros(workers + 1, len(_COLUMNS), dtype=torch.float64)
    verdict[0, 0] = _FAILED if outcome.failed else _DECODED
    for j, differs in outcome.suspects.items():
        known = (0, 0, 0, 0) if differs is None else (1, differs.elements, differs.first, differs.largest)
        verdict[1 + j] = torch.tensor([1, 0, *known, 0], dtype=torch.float64)
    for j in outcome.missing:
        verdict[1 + j, 1] = 1
    for j in outcome.left_out:
        verdict[1 + j, -1] = 1
    return verdict


def _read(verdict: Tensor) -> tuple[dict[int, Difference | None], tuple[int, ...], tuple[int, ...]]:
    found: dict[int, Difference | None] = {}
    missing = []
    for j, (suspect, absent, known, elements, first, largest, _) in enumerate(verdict[1:].tolist()):
        if suspect:
            found[j] = Difference(int(elements), int(first), largest) if known else None
        if absent:
            missing.append(j)
    return found, tuple(missing), workers_in(verdict[1:, -1])


_Arrival = tuple[int, int | None]  # worker, and number of the turn whose values have arrived; None: the worker is gone


@dataclass
class _Turn:
    """One round in which workers send values and get a result.

    Attributes:
        number: the number of the turn.
        rows: the rows that receive the workers' values; None once they are decoded, and later values are discarded.
        like: a tensor of the values' length and dtype.
    """

    number: int
    rows: Tensor | dict[int, Tensor] | None
    like: Tensor

    def target(self, worker: int) -> Tensor:
        """Return the tensor into which a worker's values are received."""
        rows = self.rows  # another thread may set it to None at any time
        return torch.empty_like(self.like) if rows is None else rows[worker]


class _WorkerConnection(threading.Thread):
    """The server's end of one worker's connection, which receives messages and sends results in turn.

    It is a thread, since gloo can only wait for a message and cannot tell whether one has arrived.

    Attributes:
        in_time: whether the server waits for the worker.
    """

    def __init__(self, connection: Connection, worker: int, arrived: queue.Queue[_Arrival]) -> None:
        super().__init__(name=f"draco_ext server, worker {worker}", daemon=True)
        self.in_time = True
        self._gone = False
        self._connection = connection
        self._worker = worker
        self._arrived = arrived
        self._requests: queue.Queue[_Turn | None] = queue.Queue()
        self._results: queue.Queue[tuple[tuple[Tensor, ...], bool]] = queue.Queue()
        # Counts of results, and of buckets that they complete: sent by the server's thread, acknowledged by this one.
        self._sent = self._acknowledged = self._buckets_sent = self._buckets_acknowledged = 0
        self._keepalive: tuple[Tensor, ...] = ()  # see ProcessGroupCommunicator
        self.start()

    def begin(self, turn: _Turn) -> None:
        """Begin a turn."""
        if not self._gone:
            self.in_time = self.in_time or self._acknowledged == self._sent
            self._requests.put(turn)

    def end(self, result: tuple[Tensor, ...], *, late: bool, complete: bool) -> None:
        """Store the turn's result, which the worker gets after it has sent its values, however late.

        Args:
            result: the tensors to send; the first one is a verdict.
            late: the server does not wait for the worker any more.
            complete: the result is the last of its bucket.
        """
        if late:
            self.in_time = False
        if self._gone:
            return
        self._sent += 1
        self._buckets_sent += complete
        if self._buckets_sent - self._buckets_acknowledged > MOST_UNCLAIMED:
            self._gone = True
            while not self._results.empty():
                self._results.get_nowait()
            self._results.put(((torch.full_like(result[0], _GIVEN_UP),), True))
        else:
            self._results.put((result, complete))

    def run(self) -> None:
        """Serve turns until there is none left or the connection fails."""
        try:
            while (turn := self._requests.get()) is not None:
                target = turn.target(self._worker)
                self._connection.receive(target)
                self._arrived.put((self._worker, turn.number))
                result, complete = self._results.get()
                self._keepalive = (target, *result)
                for tensor in result:
                    self._connection.send(tensor)
                self._acknowledged += 1
                self._buckets_acknowledged += complete
                if result[0][0, 0] == _GIVEN_UP:
                    return
        except (RuntimeError, ValueError):  # its connection is closed, or the process group destroyed
            self._gone, self.in_time = True, False
            self._arrived.put((self._worker, None))

    def finish(self, timeout: float) -> None:
        """Let the thread end once all results are sent."""
        self._requests.put(None)
        self.join(timeout if self.in_time else 0)


def _close(connections: Iterable[_WorkerConnection]) -> None:
    for connection in connections:
        connection.finish(timeout=10)
