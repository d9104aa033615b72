"""The paper's parameter server as a transport: one trusted rank gathers, decodes and returns the result."""

from __future__ import annotations

import itertools
import queue
import secrets
import threading
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from draco_ext import ops
from draco_ext.codes import Code, groups_by_worker
from draco_ext.protocol.communicator import Communicator, Connection
from draco_ext.protocol.differences import Difference, join
from draco_ext.protocol.exchange import Exchange, RecordExchange
from draco_ext.protocol.messages import (
    ExchangeOutcome,
    Message,
    finish_slices,
    read_records,
    reject_truncated,
    room_for_results,
    slice_length,
    workers_in,
    write_truncation_sentinel,
)
from draco_ext.protocol.shards import HandedOut, Relays, ShardExchange
from draco_ext.protocol.transports import verified
from draco_ext.protocol.transports.base import Transport
from draco_ext.protocol.verifier import Verdict, Verifier, digests_of, read_digests

# The server drops a rank that is behind by more results than this; each of them keeps a bucket in memory.
MOST_UNCLAIMED = 32

# Slices that are sent together in pieces: they take twice as many waits as whole messages, and less memory.
SLICES_AT_ONCE = 2

# The statuses with which everything begins that the server sends: what follows.
_DECODED, _FAILED, _GIVEN_UP, _TAKEN, _DIGESTS, _PIECES, _SHARD, _CHECKED = range(8)


class ServerTransport(Transport):
    """A transport in which a server receives and decodes all messages, and sends the gradient and the verdict to all.

    The deadline is counted from the moment when the server has its own message. A rank whose message has not arrived by
    then is an erasure for that bucket, and the server does not wait for it again until it has caught up. It still gets
    every result, in order, and so keeps the same parameters. A rank that has died, or that is more than
    `MOST_UNCLAIMED` results behind, is an erasure from then on.

    One message per rank is sent to the server, slice by slice. The server holds the n slices of two turns, the slices
    of every turn with a late rank until its slice has arrived, and the results for such a rank.

    Where members of a group have the same message, each sends its piece of it, and the server verifies what it has put
    together; see `Verifier`. It then holds G slices instead of n. It asks only workers that are in time, and one that
    does not answer before the deadline is an erasure from there on.

    The server sends each worker that is in time, a relay, a shard of the result. Relays pass the shards on among
    themselves; see `ShardExchange`. When all of them have received, or have waited for half the deadline, the server
    sends them the digests of all shards under a new key, and what has not come. What is wrong they get from the server.
    So d elements leave it and not n d. Who is late, or barred (see `Relays`), gets the result whole. So do all if it is
    short, or if they are on the server's host: they all share its memory then, and no link is saved.
    """

    trust = (
        "server: rank 0 is trusted; of all ranks up to s may compute and send anything, or twice as many may be "
        "missing: dead, hung or late."
    )

    is_served = True

    def __init__(
        self,
        code: Code,
        communicator: Communicator,
        *,
        deadline: float,
        on_one_host: bool = False,
        atol: float = 0.0,
        rtol: float = 0.0,
    ) -> None:
        # Connections of its own with a longer timeout, since only the server decides who is late.
        own = communicator.split([range(communicator.workers)], extra_timeout=deadline)
        super().__init__(code, own, atol=atol, rtol=rtol)
        self.server = communicator.root
        self._deadline = deadline
        self._in_shards = not on_one_host
        self._connections: dict[int, _WorkerConnection] = {}
        self._rounds = itertools.count()
        self._groups = code.decoding_groups
        self._group_of = groups_by_worker(self._groups)
        # Otherwise messages differ by nature, one rank's word has to do, or a part may do without a majority.
        self._has_replicas = (
            code.message_is_gradient and not code.bounded and code.adversaries > 0 and atol == rtol == 0
        )
        if own.worker == self.server:
            self._arrived: queue.Queue[_Arrival] = queue.Queue()
            others = (j for j in range(code.workers) if j != self.server)
            self._connections = {j: _WorkerConnection(own.connect(j), j, self._arrived) for j in others}
            self._relays = Relays(code.adversaries, self._groups)
            weakref.finalize(self, _close, list(self._connections.values()))
        else:
            self._shards = ShardExchange(own, deadline / 2)

    def _exchange(self, message: Message, number: int) -> Exchange:
        """Send to the server and wait for its answer, slice by slice."""
        yield from ()  # a generator without a yield: messages and results alternate on a rank's connection
        length = slice_length(message.values.dtype) * (SLICES_AT_ONCE if self._has_replicas else 1)
        parts = message.values.split(length)
        results = room_for_results(message, parts)
        outcomes = [
            self._exchange_slice(values, result, last=values is parts[-1])
            for values, result in zip(parts, results, strict=True)
        ]
        return finish_slices(message, outcomes, length, results)

    def _exchange_slice(self, values: Tensor, result: Tensor, *, last: bool) -> ExchangeOutcome:
        """Exchange a slice of the message; `result` receives its decoded gradient, and may be the slice itself."""
        in_pieces = self._has_replicas and values.numel() * values.element_size() > verified.SMALL
        if self.communicator.worker == self.server:
            return self._serve_in_pieces(values, last=last) if in_pieces else self._serve(values, result, last=last)
        return self._ask_in_pieces(values) if in_pieces else self._ask_for(values, result)

    def _serve(self, values: Tensor, result: Tensor, *, last: bool) -> ExchangeOutcome:
        """Decode all workers' values on the server into `result`."""
        rows, absent = self._collect(values.cpu())
        # Not into the result: what is sent may wait for a late worker beyond this step.
        gradient = torch.empty_like(result)
        outcome = self._decode_rows(rows.to(values.device), gradient, absent)
        outcome = replace(outcome, missing=tuple(sorted(absent)))
        outcome = self._hand_out(outcome, gradient.cpu(), absent, complete=last)
        result.copy_(gradient)
        return outcome

    def _ask_for(self, values: Tensor, result: Tensor) -> ExchangeOutcome:
        """Send a rank's values to the server and receive the decoded ones in `result`."""
        return _read(self._ask(values, result))

    def _serve_in_pieces(self, values: Tensor, *, last: bool) -> ExchangeOutcome:
        """Collect a message of each group in pieces on the server, verify and decode; the result replaces its own."""
        own, groups = self.server, self._groups
        rows = values.new_empty(len(groups), values.numel(), device="cpu")
        rows[self._group_of[own]] = values
        pieces = {
            j: piece if g != self._group_of[own] else piece[:0]
            for g, members in enumerate(groups)
            for j, piece in zip(members, rows[g].tensor_split(len(members)), strict=True)
        }
        del pieces[own]
        absent = self._await(self._begin(_with_sentinels(pieces)))
        _reject_truncated(pieces, absent)
        if absent:
            rows = rows.clone()  # what arrives late is written into the old ones
        verifier = Verifier(own, groups, self.code.adversaries, list(rows), missing=absent)
        verdict = Verdict.AGAIN
        while verdict == Verdict.AGAIN:
            verdict = self._verify(verifier, values, absent)
        if verdict == Verdict.VERIFIED:
            verifier.finish()
            gradient = ops.majority_vote(rows.to(values.device), (1,) * len(groups), 0)[0]
        else:
            gradient = torch.full_like(values, torch.nan)
        suspects = {j: join(parts) if parts else None for j, parts in sorted(verifier.wrong.items())}
        outcome = ExchangeOutcome(suspects, verdict == Verdict.FAILED, tuple(sorted(absent)), tuple(suspects))
        outcome = self._hand_out(outcome, gradient.cpu(), absent, complete=last)
        values.copy_(gradient)
        return outcome

    def _verify(self, verifier: Verifier, values: Tensor, absent: set[int]) -> Verdict:
        """Compare what has arrived with digests of the members' copies, and ask for what is wrong.

        Args:
            verifier: knows what has arrived.
            values: the server's own message.
            absent: the workers that are an erasure; those that do not answer in time are added.
        """
        own, key = self.server, secrets.randbits(63)
        present = [j for g in verifier.unverified for j in self._groups[g] if j not in absent]
        replies = {j: torch.zeros(1, 2 * self._replicas_of(j), dtype=torch.int64) for j in present if j != own}
        current = self._go_on({j: (_opening(_DIGESTS, key),) for j in replies}, replies)
        verifier.prepare(key)
        if own in present:
            replies = replies | {own: digests_of(values.tensor_split(self._replicas_of(own)), [key])}
        absent |= self._await(current)
        answers = {j: read_digests(reply[0].tolist()) for j, reply in replies.items() if j not in absent}
        verdict, wanted = verifier.compare(key, answers, absent)
        if wanted and verdict != Verdict.FAILED:
            room = _with_sentinels(verifier.make_room(wanted))
            late = self._await(self._go_on({j: self._request(j, numbers) for j, numbers in wanted.items()}, room))
            _reject_truncated(room, late)
            absent |= late
            verifier.take(wanted, {j: piece for j, piece in room.items() if j not in late})
        return verdict

    def _request(self, worker: int, numbers: Iterable[int]) -> tuple[Tensor, Tensor]:
        """Return the question for some pieces of a worker's message."""
        flags = torch.zeros(self._replicas_of(worker), dtype=torch.uint8)
        flags[list(numbers)] = 1
        return _opening(_PIECES), flags

    def _replicas_of(self, worker: int) -> int:
        """Return how many workers have this one's message: into so many pieces it is divided."""
        return len(self._groups[self._group_of[worker]])

    def _ask_in_pieces(self, values: Tensor) -> ExchangeOutcome:
        """Send a rank's piece of its values to the server, and what it asks for, until it sends the decoded ones."""
        own = self.communicator.worker
        members = self._groups[self._group_of[own]]
        pieces = values.tensor_split(len(members))
        piece = pieces[members.index(own)] if self.server not in members else values[:0]
        with _connection_to_server():
            self.communicator.send(piece.cpu(), self.server)
            while True:
                status, key = self._receive_opening()
                if status == _DIGESTS:
                    reply = digests_of(pieces, [key])
                elif status == _PIECES:
                    flags = torch.empty(len(members), dtype=torch.uint8)
                    self.communicator.receive(flags, self.server)
                    reply = torch.cat([piece for piece, flag in zip(pieces, flags.tolist(), strict=True) if flag])
                else:
                    break
                self.communicator.send(reply.cpu(), self.server)
            return _read(self._receive_result(status, values))

    def gather_record(self, record: Tensor) -> RecordExchange:
        """Gather through the server, in turn with the buckets; see `Transport.gather_record`."""
        yield from ()
        if self.communicator.worker == self.server:
            rows, absent = self._collect(record.cpu())
            rows, missing = read_records(rows.clone(), absent)
            self._answer(self._whole(ExchangeOutcome({}, False, missing), rows), absent, complete=False)
            return rows, missing
        rows = torch.empty(self.code.workers, record.numel(), dtype=record.dtype)
        return rows, _read(self._ask(record, rows)).missing

    def send_to_server(self, worker: int, values: Tensor) -> None:
        """Send a worker's values (CPU) to the server, where they replace `values`. Only these two ranks call it.

        If they do not arrive in time, the server's values stay unchanged.
        """
        if self.communicator.worker != self.server:
            self._ask(values, values)
            return
        came = torch.empty_like(values)
        late = self._await(self._begin({worker: came}))
        if not late:
            values.copy_(came)
        self._connections[worker].end(_Reply((_opening(_TAKEN),)), late=bool(late))

    def send_from_server(self, worker: int, values: Tensor) -> None:
        """Send the server's values (CPU) to a worker, where they replace `values`. Only these two ranks call it.

        The server does not wait for the worker.
        """
        ready = torch.zeros(1, dtype=torch.int64)
        if self.communicator.worker != self.server:
            self._ask(ready, values)
            return
        connection = self._connections[worker]
        connection.begin(_Round(next(self._rounds), {worker: ready}))
        connection.end(_Reply(self._whole(ExchangeOutcome({}, False), values)), late=False)

    def _ask(self, values: Tensor, answer: Tensor) -> Tensor:
        """Send values to the server, receive its answer unless it is a failure, and return the verdict."""
        with _connection_to_server():
            self.communicator.send(values.cpu(), self.server)
            status, _ = self._receive_opening()
            return self._receive_result(status, answer)

    def _receive(self, values: Tensor) -> None:
        self.communicator.receive(values, self.server)

    def _receive_opening(self) -> tuple[int, int]:
        """Receive the status with which begins what the server sends next, and a key."""
        opening = _opening(0)
        self._receive(opening)
        status, key = opening.tolist()
        return status, key

    def _receive_result(self, status: int, answer: Tensor) -> Tensor:
        """Receive the rest of a turn: the verdict, and the result unless it is a failure; return the verdict.

        Args:
            status: the status that has come.
            answer: the tensor that the result is written into.
        """
        gathering, key = None, 0
        if status == _SHARD:
            takes_part = torch.empty(self.code.workers, dtype=torch.uint8)
            self._receive(takes_part)
            gathering = self._shards.gather(answer, workers_in(takes_part), self._receive)
            self.communicator.send(gathering.missing, self.server)
            status, key = self._receive_opening()
        if status == _GIVEN_UP:
            raise _GivenUp
        verdict = _write(ExchangeOutcome({}, False), self.code.workers)
        if status == _TAKEN:
            return verdict
        self._receive(verdict)
        if status == _DECODED:
            values = answer if answer.device.type == "cpu" else torch.empty_like(answer, device="cpu")
            self._receive(values)
            answer.copy_(values)
        elif status == _CHECKED and gathering is not None:
            digests = torch.empty(2 * len(gathering.shards), dtype=torch.int64)
            self._receive(digests)
            gathering.take_missing(self._receive)
            wrong = gathering.find_wrong(key, digests.tolist())
            self.communicator.send(wrong, self.server)
            gathering.take_wrong(wrong, self._receive)
            answer.copy_(gathering.values)
        return verdict

    def _collect(self, values: Tensor) -> tuple[Tensor, set[int]]:
        """Return all workers' values, row j from worker j, and the late workers, whose rows may still change."""
        rows = write_truncation_sentinel(values.new_empty(self.code.workers, values.numel()))
        rows[self.server] = values
        return rows, self._await(self._begin({j: rows[j] for j in self._connections}))

    def _begin(self, targets: dict[int, Tensor]) -> _Round:
        """Begin a turn with these workers, whose values are received in place; return its first round."""
        first = _Round(next(self._rounds), targets)
        for j in targets:
            self._connections[j].begin(first)
        return first

    def _go_on(self, questions: Mapping[int, tuple[Tensor, ...]], targets: dict[int, Tensor]) -> _Round:
        """Go on with a turn: send questions to workers, whose replies are received in place; return the round."""
        following = _Round(next(self._rounds), targets)
        for j, question in questions.items():
            self._connections[j].ask(question, following)
        return following

    def _await(self, current: _Round) -> set[int]:
        """Wait for the values of workers that are in time, until the deadline; return those whose have not arrived."""
        begin = time.perf_counter()
        awaited = {j for j in current.workers if self._connections[j].in_time}
        arrived = set()
        until = time.monotonic() + self._deadline
        while awaited:
            try:
                j, answered = self._arrived.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                break
            if answered is None:
                awaited.discard(j)
            elif answered == current.number:
                awaited.discard(j)
                arrived.add(j)
        current.discard()
        self.communicator.seconds.communicate += time.perf_counter() - begin
        return set(current.workers - arrived)

    def _whole(self, outcome: ExchangeOutcome, values: Tensor) -> tuple[Tensor, ...]:
        """Return the tensors of a result that is sent whole."""
        verdict = _write(outcome, self.code.workers)
        return (_opening(_FAILED), verdict) if outcome.failed else (_opening(_DECODED), verdict, values)

    def _answer(self, result: tuple[Tensor, ...], absent: set[int], *, complete: bool) -> None:
        """Send a result to all workers, including late ones."""
        for j, connection in self._connections.items():
            connection.end(_Reply(result, complete=complete), late=j in absent)

    def _hand_out(
        self, outcome: ExchangeOutcome, values: Tensor, absent: set[int], *, complete: bool
    ) -> ExchangeOutcome:
        """Send a result to all workers, to those that are in time in shards, which they pass on; return the outcome.

        Args:
            outcome: the outcome. Who has certainly passed on wrong shards before becomes a suspect in it.
            values: the decoded values, on the CPU, which nobody changes any more.
            absent: the late workers.
            complete: the result is the last of its bucket.
        """
        found = self._relays.judge()
        outcome = replace(outcome, suspects=dict(sorted((dict.fromkeys(found) | outcome.suspects).items())))
        whole = self._whole(outcome, values)
        present = (j for j, connection in self._connections.items() if j not in absent and connection.in_time)
        relays = self._relays.choose(present)
        is_short = values.numel() * values.element_size() <= verified.SMALL
        if outcome.failed or len(relays) < 2 or is_short or not self._in_shards:
            self._answer(whole, absent, complete=complete)
            return outcome
        shards = values.tensor_split(len(relays))
        handed_out = self._relays.hand_out(relays, shards)
        takes_part = torch.zeros(self.code.workers, dtype=torch.uint8)
        takes_part[list(relays)] = 1
        questions = {j: (_opening(_SHARD), takes_part, shard) for j, shard in zip(relays, shards, strict=True)}
        reports = {j: torch.zeros(len(relays), dtype=torch.uint8) for j in relays}
        current = self._go_on(questions, reports)
        # Nobody else knows the key before all that will use it have received, or wait for nothing any more.
        key = secrets.randbits(63)
        check = (_opening(_CHECKED, key), _write(outcome, self.code.workers), digests_of(shards, [key])[0])
        late = self._await(current)
        for j, connection in self._connections.items():
            reply = _Reply(whole, complete=complete)
            if j in reports and j not in late:
                missing = handed_out.shards_for(j, reports[j], is_wrong=False)
                reply = _Reply((*check, *missing), complete=complete, handed_out=handed_out)
            connection.end(reply, late=j in absent or j in late)
        self._relays.judge(late)
        return outcome


def _opening(status: int, key: int = 0) -> Tensor:
    """Return the tensor with which everything begins that the server sends: a status, and a key."""
    return torch.tensor([status, key])


# Columns of a verdict, the numbers that the server sends about each worker; row 0 says whether the bucket has failed.
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


def _read(verdict: Tensor) -> ExchangeOutcome:
    found: dict[int, Difference | None] = {}
    missing = []
    for j, (suspect, absent, known, elements, first, largest, _) in enumerate(verdict[1:].tolist()):
        if suspect:
            found[j] = Difference(int(elements), int(first), largest) if known else None
        if absent:
            missing.append(j)
    return ExchangeOutcome(found, bool(verdict[0, 0] == _FAILED), tuple(missing), workers_in(verdict[1:, -1]))


def _with_sentinels(pieces: dict[int, Tensor]) -> dict[int, Tensor]:
    for piece in pieces.values():
        write_truncation_sentinel(piece)
    return pieces


def _reject_truncated(pieces: Mapping[int, Tensor], late: set[int]) -> None:
    none_is_missing = torch.zeros(1, dtype=torch.bool)
    for j, piece in pieces.items():
        if j not in late:
            reject_truncated(piece[None], none_is_missing)


class _GivenUp(Exception):
    """The server has given up this rank."""


@contextmanager
def _connection_to_server() -> Iterator[None]:
    try:
        yield
    except _GivenUp:
        raise RuntimeError(f"this rank was {MOST_UNCLAIMED} buckets behind the others, and was given up") from None
    except RuntimeError as error:
        raise RuntimeError("the server, rank 0, cannot be reached any more") from error


_Arrival = tuple[int, int | None]  # worker, and number of the round whose values have arrived; None: it is gone


class _Round:
    """One round of a turn: workers send values, and get a question, with which another round begins, or the result.

    Args:
        number: the number of the round.
        targets: the tensors that receive the workers' values.
    """

    def __init__(self, number: int, targets: dict[int, Tensor]) -> None:
        self.number = number
        self._targets: dict[int, Tensor] | None = targets
        self._forms = {j: (values.shape, values.dtype) for j, values in targets.items()}

    @property
    def workers(self) -> Set[int]:
        """The workers that send values."""
        return self._forms.keys()

    def target(self, worker: int) -> Tensor:
        """Return the tensor into which a worker's values are received."""
        targets = self._targets  # another thread may set it to None at any time
        if targets is not None:
            return targets[worker]
        shape, dtype = self._forms[worker]
        return torch.empty(shape, dtype=dtype)

    def discard(self) -> None:
        """Discard values that are received later."""
        self._targets = None


@dataclass(frozen=True)
class _Reply:
    """A reply, which the server sends when a worker's values have arrived.

    Attributes:
        tensors: a result or a question.
        following: the round that the question begins; None: the turn ends with the result.
        complete: the result is the last of its bucket.
        handed_out: the shards of the result that the worker has got and checks; it then asks for those that are wrong.
    """

    tensors: tuple[Tensor, ...]
    following: _Round | None = None
    complete: bool = False
    handed_out: HandedOut | None = None


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
        self._requests: queue.Queue[_Round | None] = queue.Queue()
        self._replies: queue.Queue[_Reply | None] = queue.Queue()  # None: the worker is given up
        # Counts of results, and of buckets that they complete: sent by the server's thread, acknowledged by this one.
        self._sent = self._acknowledged = self._buckets_sent = self._buckets_acknowledged = 0
        self._keepalive: tuple[Tensor, ...] = ()  # see ProcessGroupCommunicator
        self.start()

    def begin(self, first: _Round) -> None:
        """Begin a turn with its first round."""
        if not self._gone:
            self.in_time = self.in_time or self._acknowledged == self._sent
            self._requests.put(first)

    def ask(self, question: tuple[Tensor, ...], following: _Round) -> None:
        """Send a question to the worker, whose values have arrived, and begin the following round."""
        if not self._gone:
            self._replies.put(_Reply(question, following))

    def end(self, result: _Reply, *, late: bool) -> None:
        """Store the turn's result, which the worker gets after it has sent its values, however late.

        Args:
            result: the result.
            late: the server does not wait for the worker any more.
        """
        if late:
            self.in_time = False
        if self._gone:
            return
        self._sent += 1
        self._buckets_sent += result.complete
        if self._buckets_sent - self._buckets_acknowledged > MOST_UNCLAIMED:
            self._gone = True
            while not self._replies.empty():
                self._replies.get_nowait()
            self._replies.put(None)
        else:
            self._replies.put(result)

    def run(self) -> None:
        """Serve turns until there is none left or the connection fails."""
        try:
            while (current := self._requests.get()) is not None:
                reply = self._receive_and_reply(current)
                while reply is not None and reply.following is not None:
                    current = reply.following
                    reply = self._receive_and_reply(current)
                if reply is None:
                    self._connection.send(_opening(_GIVEN_UP))
                    return
                if reply.handed_out is not None:
                    self._send_wrong_shards(reply.handed_out)
                self._acknowledged += 1
                self._buckets_acknowledged += reply.complete
        except (RuntimeError, ValueError):  # its connection is closed, or the process group destroyed
            self._gone, self.in_time = True, False
            self._arrived.put((self._worker, None))

    def _receive_and_reply(self, current: _Round) -> _Reply | None:
        """Receive the worker's values in a round, and send it what the server replies, which is returned."""
        target = current.target(self._worker)
        self._connection.receive(target)
        self._arrived.put((self._worker, current.number))
        reply = self._replies.get()
        if reply is not None:
            self._keepalive = (target, *reply.tensors)
            for tensor in reply.tensors:
                self._connection.send(tensor)
        return reply

    def _send_wrong_shards(self, handed_out: HandedOut) -> None:
        """Receive which shards were wrong, and send these."""
        flags = torch.zeros(len(handed_out.relays), dtype=torch.uint8)
        self._connection.receive(flags)
        shards = handed_out.shards_for(self._worker, flags, is_wrong=True)
        for joined in shards:
            self._connection.send(joined)
        self._keepalive = (flags, *shards)

    def finish(self, timeout: float) -> None:
        """Let the thread end once all results are sent."""
        self._requests.put(None)
        self.join(timeout if self.in_time else 0)


def _close(connections: Iterable[_WorkerConnection]) -> None:
    for connection in connections:
        connection.finish(timeout=10)
