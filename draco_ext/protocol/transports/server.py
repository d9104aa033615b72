"""The paper's parameter server as a transport: one trusted rank gathers, decodes and hands the result back."""

from __future__ import annotations

import itertools
import queue
import threading
import time
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from draco_ext.protocol.groups import divide, timeout_of
from draco_ext.protocol.transports.base import (
    Difference,
    Exchange,
    Message,
    Outcome,
    Peers,
    RecordExchange,
    Transport,
    finish,
    mark,
    read_records,
    sliced,
    tag_of,
    workers_in,
)

SERVER = 0  # rank
# How many results wait for a rank that is behind before it is given up: each of them is a bucket in memory.
MOST_UNCLAIMED = 32
# Only the server decides who is late; gloo would take all connections down.
NEVER = timedelta(days=365)

_DECODED, _FAILED, _GIVEN_UP, _TAKEN = range(4)


class ServerTransport(Transport):
    """Rank 0 receives all messages, decodes them, and sends the gradient and the verdict to everybody.

    A rank whose message is not there when the deadline has passed, counted from the server's own message, is an erasure
    for that bucket, and is not waited for again until it has caught up: it still gets every result, in order, and so
    keeps the same parameters. One that has died, or has left `MOST_UNCLAIMED` results unclaimed, is an erasure from
    then on.

    Moves one message per rank to the server and one back, slice by slice. The server holds the n slices of two turns,
    those of every turn in which a rank was late until its slice has come, and results that wait for such a rank.
    """

    trust = (
        "server: rank 0 is trusted; of all ranks up to s may compute and send anything, or twice as many may be "
        "missing: dead, hung or late."
    )

    def __init__(self, peers: Peers, *, deadline: float, atol: float = 0.0, rtol: float = 0.0) -> None:
        # Of its own, and gloo: its connections stand between two ranks each, so that one that breaks is one rank's.
        group = divide(peers.group, [range(peers.code.workers)], backend="gloo", timeout=NEVER)
        patience = min(timeout_of(peers.group).total_seconds() + deadline, NEVER.total_seconds())
        super().__init__(replace(peers, group=group, patience=timedelta(seconds=patience)), atol=atol, rtol=rtol)
        self._server = peers.ranks.index(SERVER)
        self._deadline = deadline
        self._lines: dict[int, _Line] = {}
        self._turns = itertools.count()
        if peers.worker == self._server:
            self._arrived: queue.Queue[_Arrival] = queue.Queue()
            others = (j for j in range(self.code.workers) if j != self._server)
            self._lines = {j: _Line(self.peers.group, peers.ranks[j], j, self._arrived) for j in others}
            weakref.finalize(self, _close, list(self._lines.values()))

    def _exchange(self, message: Message, number: int) -> Exchange:
        """Sends to the server and waits for its answer, slice by slice."""
        yield from ()  # in one go: a rank's messages and results take turns on its connection
        slices = sliced(message.values)
        take = self._serve if self.peers.worker == self._server else self._ask_for
        return finish(message, [take(values, last=values is slices[-1]) for values in slices])

    def _serve(self, values: Tensor, *, last: bool) -> Outcome:
        """At the server: decodes everybody's values, in place of its own."""
        rows, absent = self._collect(values.cpu())
        gradient, outcome = self._decode_rows(rows.to(values.device), absent)
        outcome = replace(outcome, missing=tuple(sorted(absent)))
        verdict = _write(outcome, self.code.workers)
        self._answer((verdict,) if outcome.failed else (verdict, gradient.cpu()), absent, complete=last)
        values.copy_(gradient)
        return outcome

    def _ask_for(self, values: Tensor, *, last: bool) -> Outcome:
        """At any other rank: sends its values, and gets the decoded ones in their place."""
        answer = values.cpu()
        verdict = self._ask(answer, answer)
        values.copy_(answer)
        found, missing, left_out = _read(verdict)
        return Outcome(found, bool(verdict[0, 0] == _FAILED), missing, left_out)

    def gather_record(self, record: Tensor) -> RecordExchange:
        """Through the server, by turns with the buckets; see `Transport.gather_record`."""
        yield from ()
        if self.peers.worker == self._server:
            rows, absent = self._collect(record.cpu())
            rows, missing = read_records(rows.clone(), absent)
            verdict = _write(Outcome({}, False, missing), self.code.workers)
            self._answer((verdict, rows), absent, complete=False)
            return rows, missing
        rows = torch.empty(self.code.workers, record.numel(), dtype=record.dtype)
        _, missing, _ = _read(self._ask(record, rows))
        return rows, missing

    def fetch(self, worker: int, values: Tensor) -> None:
        """Takes a worker's values (CPU) to the server, into its own; these two ranks alone call it.

        Where they do not come in time the server's stay as they are.
        """
        if self.peers.worker != self._server:
            self._ask(values, values)
            return
        line, came = self._lines[worker], torch.empty_like(values)
        turn = _Turn(next(self._turns), {worker: came}, values)
        line.begin(turn)
        in_time = worker in self._await(turn, {worker} if line.in_time else set())
        if in_time:
            values.copy_(came)
        line.end((self._status(_TAKEN),), late=not in_time, complete=False)

    def hand(self, worker: int, values: Tensor) -> None:
        """Hands the server's values (CPU) to a worker, into its own; these two ranks alone call it.

        The server does not wait for it.
        """
        ready = torch.zeros(1, dtype=torch.int64)
        if self.peers.worker != self._server:
            self._ask(ready, values)
            return
        line = self._lines[worker]
        line.begin(_Turn(next(self._turns), None, ready))
        line.end((self._status(_DECODED), values), late=False, complete=False)

    def _status(self, status: int) -> Tensor:
        verdict = _write(Outcome({}, False), self.code.workers)
        verdict[0, 0] = status
        return verdict

    def _ask(self, values: Tensor, answer: Tensor) -> Tensor:
        """Sends values to the server, takes its answer unless that is a failure, and returns the verdict."""
        verdict = torch.empty(self.code.workers + 1, len(_COLUMNS), dtype=torch.float64)
        try:
            self.peers.send(values.cpu(), self._server)
            self.peers.receive(verdict, self._server)
            if verdict[0, 0] == _DECODED:
                self.peers.receive(answer, self._server)
        except RuntimeError as error:
            raise RuntimeError("the server, rank 0, cannot be reached any more") from error
        if verdict[0, 0] == _GIVEN_UP:
            raise RuntimeError(f"this rank was {MOST_UNCLAIMED} buckets behind the others, and was given up")
        return verdict

    def _collect(self, values: Tensor) -> tuple[Tensor, set[int]]:
        """Everybody's values, row j from worker j, and the workers that were late: their rows may change yet."""
        begin = time.perf_counter()
        rows = mark(values.new_empty(self.code.workers, values.numel()))
        rows[self._server] = values
        turn = _Turn(next(self._turns), rows, values)
        awaited = set()
        for j, line in self._lines.items():
            line.begin(turn)
            if line.in_time:
                awaited.add(j)
        arrived = self._await(turn, awaited)
        turn.rows = None
        self.peers.seconds.communicate += time.perf_counter() - begin
        return rows, self._lines.keys() - arrived

    def _await(self, turn: _Turn, awaited: set[int]) -> set[int]:
        """Those of the workers whose values come until the deadline."""
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
        """Hands a result, which begins with a verdict, to everybody, also to those who were late."""
        for j, line in self._lines.items():
            line.end(result, late=j in absent, complete=complete)


# What the server found of each worker, as numbers on the wire; row 0 is what became of the bucket.
_COLUMNS = ("suspect", "missing", "known", "elements", "first", "largest", "left out")


def _write(outcome: Outcome, workers: int) -> Tensor:
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


_Arrival = tuple[int, int | None]  # worker, and number of the turn for which its values have come; None: none will


@dataclass
class _Turn:
    """One of the turns that ranks take in sending values and getting a result.

    Attributes:
        number: counts them.
        rows: where everybody's values arrive; None once they are decoded: what comes then is thrown away.
        like: has their length and dtype.
    """

    number: int
    rows: Tensor | dict[int, Tensor] | None
    like: Tensor

    def room(self, worker: int) -> Tensor:
        """For the values of a worker."""
        rows = self.rows  # may be taken away meanwhile
        return torch.empty_like(self.like) if rows is None else rows[worker]


class _Line(threading.Thread):
    """The server's end of the connection to one rank: by turns takes a message and hands a result back.

    A thread, since gloo cannot be asked whether a message has come, only waited for.

    Attributes:
        in_time: whether the rank is waited for.
    """

    def __init__(self, group: dist.ProcessGroup, rank: int, worker: int, arrived: queue.Queue[_Arrival]) -> None:
        super().__init__(name=f"draco_ext server, rank {rank}", daemon=True)
        self.in_time = True
        self._gone = False
        self._group = group
        self._rank = rank
        self._worker = worker
        self._arrived = arrived
        self._orders: queue.Queue[_Turn | None] = queue.Queue()
        self._results: queue.Queue[tuple[tuple[Tensor, ...], bool]] = queue.Queue()
        # Results, and buckets that they complete: counted by the server's thread, and by this one.
        self._given = self._claimed = self._buckets_given = self._buckets_claimed = 0
        self._held: tuple[Tensor, ...] = ()  # see Peers.held
        self.start()

    def begin(self, turn: _Turn) -> None:
        """A turn begins."""
        if not self._gone:
            self.in_time = self.in_time or self._claimed == self._given
            self._orders.put(turn)

    def end(self, result: tuple[Tensor, ...], *, late: bool, complete: bool) -> None:
        """The turn's result, which the rank will get as soon as it has sent its values, however late.

        Args:
            result: its first tensor is a verdict.
            late: the rank is not waited for any more.
            complete: the result is the last of its bucket.
        """
        if late:
            self.in_time = False
        if self._gone:
            return
        self._given += 1
        self._buckets_given += complete
        if self._buckets_given - self._buckets_claimed > MOST_UNCLAIMED:
            self._gone = True
            while not self._results.empty():
                self._results.get_nowait()
            self._results.put(((torch.full_like(result[0], _GIVEN_UP),), True))
        else:
            self._results.put((result, complete))

    def run(self) -> None:
        """Until there is nothing left to do, or the rank is dead."""
        try:
            while (turn := self._orders.get()) is not None:
                room = turn.room(self._worker)
                dist.recv(room, group=self._group, group_src=self._rank, tag=tag_of(room))
                self._arrived.put((self._worker, turn.number))
                result, complete = self._results.get()
                self._held = (room, *result)
                for tensor in result:
                    dist.send(tensor, group=self._group, group_dst=self._rank, tag=tag_of(tensor))
                self._claimed += 1
                self._buckets_claimed += complete
                if result[0][0, 0] == _GIVEN_UP:
                    return
        except (RuntimeError, ValueError):  # its connection is closed, or the process group destroyed
            self._gone, self.in_time = True, False
            self._arrived.put((self._worker, None))

    def finish(self, timeout: float) -> None:
        """Lets the thread end once all results are handed back."""
        self._orders.put(None)
        self.join(timeout if self.in_time else 0)


def _close(lines: Iterable[_Line]) -> None:
    for line in lines:
        line.finish(timeout=10)
