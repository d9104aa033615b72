"""The paper's parameter server as a transport: one trusted rank gathers, decodes and hands the result back."""

from __future__ import annotations

import queue
import threading
import time
import weakref
from collections.abc import Iterable
from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from draco_ext.codes import decode
from draco_ext.distributed.groups import divide, timeout_of
from draco_ext.distributed.transports import (
    Difference,
    Exchange,
    Message,
    Outcome,
    Peers,
    Transport,
    differences,
    mark,
    spoil_short,
    tag_of,
    workers_in,
)

SERVER = 0  # rank
# How many results wait for a rank that is behind before it is given up: each of them is a bucket in memory.
MOST_UNCLAIMED = 32
# Only the server decides who is late; gloo would take all connections down.
NEVER = timedelta(days=365)

_DECODED, _FAILED, _GIVEN_UP = range(3)


class ServerTransport(Transport):
    """Rank 0 receives all messages, decodes them, and sends the gradient and the verdict to everybody.

    A rank whose message is not there when the deadline has passed, counted from the server's own message, is an erasure
    for that bucket, and is not waited for again until it has caught up: it still gets every result, in order, and so
    keeps the same parameters. One that has died, or has left `MOST_UNCLAIMED` results unclaimed, is an erasure from
    then on. Moves one message per rank to the server and one back; the server holds n messages.
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
        if peers.worker == self._server:
            self._arrived: queue.Queue[_Arrival] = queue.Queue()
            others = (j for j in range(self.code.workers) if j != self._server)
            self._lines = {j: _Line(self.peers.group, peers.ranks[j], j, self._arrived) for j in others}
            weakref.finalize(self, _close, list(self._lines.values()))

    def exchange(self, message: Message, number: int) -> Exchange:
        """Sends to the server and waits for its answer."""
        yield from ()  # in one go: a rank's messages and results take turns on its connection
        if self.peers.worker == self._server:
            return self._serve(message, number)
        verdict = torch.empty(self.code.workers + 1, len(_COLUMNS), dtype=torch.float64)
        gradient = torch.empty_like(message.values, device="cpu")
        try:
            self.peers.send(message.values.cpu(), self._server)
            self.peers.receive(verdict, self._server)
            if verdict[0, 0] == _DECODED:
                self.peers.receive(gradient, self._server)
        except RuntimeError as error:
            raise RuntimeError("the server, rank 0, cannot be reached any more") from error
        if verdict[0, 0] == _GIVEN_UP:
            raise RuntimeError(f"this rank was {MOST_UNCLAIMED} buckets behind the others, and was given up")
        failed = bool(verdict[0, 0] == _FAILED)
        if failed:
            message.bucket.fill_(torch.nan)
        else:
            message.put(gradient.to(message.bucket.device))
        found, missing, left_out = _read(verdict)
        return Outcome(found, failed, missing, left_out)

    def _serve(self, message: Message, number: int) -> Outcome:
        begin = time.perf_counter()
        values = message.values
        rows = values.new_zeros(self.code.workers, values.numel())
        rows[self._server] = values
        awaited = set()
        for j, line in self._lines.items():
            line.begin(number, mark(torch.empty_like(values, device="cpu")))
            if line.in_time:
                awaited.add(j)
        absent = set(self._lines)
        until = time.monotonic() + self._deadline
        while awaited:
            try:
                j, exchange, came = self._arrived.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                break
            if came is None:
                awaited.discard(j)
            elif exchange == number:
                rows[j] = came
                awaited.discard(j)
                absent.discard(j)
        self.peers.seconds.communicate += time.perf_counter() - begin
        spoil_short(rows)
        missing = torch.zeros(self.code.workers, dtype=torch.bool, device=values.device)
        missing[list(absent)] = True
        decoded = decode(rows, self.code, missing=missing if absent else None, **self.tolerance)
        failed = bool(decoded.failed)
        left_out = workers_in(decoded.left_out)
        outcome = Outcome(differences(rows, decoded, absent), failed, tuple(sorted(absent)), left_out)
        verdict = _write(outcome, self.code.workers)
        result = (verdict,) if failed else (verdict, decoded.gradient.cpu())
        for j, line in self._lines.items():
            line.end(result, late=j in absent)
        message.put(decoded.gradient)
        return outcome


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


_Arrival = tuple[int, int, Tensor | None]  # worker, number of the exchange, its message; None: it will not come


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
        self._orders: queue.Queue[tuple[int, Tensor] | None] = queue.Queue()
        self._results: queue.Queue[tuple[Tensor, ...]] = queue.Queue()
        self._given = self._claimed = 0  # results: counted by the server's thread, and by this one
        self._held: tuple[Tensor, ...] = ()  # see Peers.held
        self.start()

    def begin(self, number: int, room: Tensor) -> None:
        """An exchange begins: its message goes into `room`."""
        if not self._gone:
            self.in_time = self.in_time or self._claimed == self._given
            self._orders.put((number, room))

    def end(self, result: tuple[Tensor, ...], *, late: bool) -> None:
        """Its result, which the rank will get as soon as it has sent its message, however late."""
        if late:
            self.in_time = False
        if self._gone:
            return
        self._given += 1
        if self._given - self._claimed > MOST_UNCLAIMED:
            self._gone = True
            while not self._results.empty():
                self._results.get_nowait()
            self._results.put((torch.full_like(result[0], _GIVEN_UP),))
        else:
            self._results.put(result)

    def run(self) -> None:
        """Until there is nothing left to do, or the rank is dead."""
        try:
            while (order := self._orders.get()) is not None:
                number, room = order
                dist.recv(room, group=self._group, group_src=self._rank, tag=tag_of(room))
                self._arrived.put((self._worker, number, room))
                result = self._results.get()
                self._held = (room, *result)
                for tensor in result:
                    dist.send(tensor, group=self._group, group_dst=self._rank, tag=tag_of(tensor))
                self._claimed += 1
                if result[0][0, 0] == _GIVEN_UP:
                    return
        except (RuntimeError, ValueError):  # its connection is closed, or the process group destroyed
            self._gone, self.in_time = True, False
            self._arrived.put((self._worker, -1, None))

    def finish(self, timeout: float) -> None:
        """Lets the thread end once all results are handed back."""
        self._orders.put(None)
        self.join(timeout if self.in_time else 0)


def _close(lines: Iterable[_Line]) -> None:
    for line in lines:
        line.finish(timeout=10)
