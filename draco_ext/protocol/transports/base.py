"""How messages travel between the ranks, and which of them are trusted.

A transport takes this rank's message for one bucket and gives the decoded gradient, the same bits on all ranks, with
the verdict. All calls are collective: every rank makes the same ones in the same order.
"""

from __future__ import annotations

import abc
import hashlib
import itertools
import secrets
import time
from collections import Counter, deque
from collections.abc import Collection, Generator, Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from draco_ext import ops
from draco_ext.codes import Code, CyclicCode, Decoded, RepetitionCode
from draco_ext.protocol.groups import divide

KEY_BITS = 55  # of a rank's share: the sum of 255 fits into an int64
SHARE_BYTES = 32  # of a rank's share in a seed that is drawn by commit and reveal
# Messages are gathered and decoded by slices of so many bytes, a multiple of the decoder's tile for every dtype.
SLICE = 2**22
# Slices of a rank's messages that may be on their way at a time, in bytes.
WINDOW = 4 * SLICE
# Elements of a message that are compared at a time: what is made of them stays in the cache.
PORTION = 2**16


@dataclass(frozen=True)
class Difference:
    """How far a bad worker's message was from what it should have been.

    Attributes:
        elements: how many elements differ in any bit.
        first: the first of them.
        largest: the largest absolute deviation; infinite where it is not finite.
    """

    elements: int
    first: int
    largest: float


@dataclass(frozen=True)
class Outcome:
    """What a transport makes of the messages for one bucket.

    Attributes:
        suspects: workers whose messages were wrong, each with the difference where the right message is known.
        failed: the code's guarantee does not cover what came in.
        missing: workers whose messages did not come in time.
        left_out: workers whose messages the gradient does not contain, suspects included; for the repetition code, of
            which none but suspects are, it may be empty.
    """

    suspects: dict[int, Difference | None]
    failed: bool
    missing: tuple[int, ...] = ()
    left_out: tuple[int, ...] = ()


@dataclass(frozen=True)
class Message:
    """What this rank sends for one bucket.

    Attributes:
        values: the message. A cyclic code's has every parameter padded to an even length.
        bucket: DDP's bucket, in which the decoded gradient is to be; the repetition code's message may be the same.
        lengths: of the parameters in the bucket.
        ready: the bucket holds `values` / workers.
    """

    values: Tensor
    bucket: Tensor
    lengths: tuple[int, ...]
    ready: bool = False

    def put(self, values: Tensor, factor: float = 1.0) -> Tensor:
        """Puts so many times `values`, which are laid out like the message, into the bucket; returns that."""
        if values.numel() == self.bucket.numel():
            pairs = [(values, self.bucket)]
        else:
            pieces = values.split([length + length % 2 for length in self.lengths])
            places = self.bucket.split(list(self.lengths))
            pairs = [(piece[: place.numel()], place) for piece, place in zip(pieces, places, strict=True)]
        for piece, place in pairs:
            if factor == 1:
                place.copy_(piece)
            else:
                torch.mul(piece, factor, out=place)
        return self.bucket


@dataclass
class Seconds:
    """Where a rank's time went: of its host; on a GPU work may go on behind it.

    Attributes:
        encode: adding gradients up to messages.
        communicate: waiting for others.
        decode: digests, projections, votes, and putting results in place.
    """

    encode: float = 0.0
    communicate: float = 0.0
    decode: float = 0.0


class Pending:
    """Values on their way.

    Attributes:
        soon: whether they are to be waited for when the next bucket begins, or not before all have begun.
    """

    def __init__(
        self,
        peers: Peers,
        works: Sequence[tuple[dist.Work, int | None]],  # each with the rank at its other end, where that is only one
        result: Tensor,
        kept: tuple[Tensor, ...],
        *,
        soon: bool,
    ) -> None:
        self.soon = soon
        self._peers = peers
        self._works = works
        self._result = result
        self._kept = kept

    def wait(self) -> Tensor:
        """The values.

        Raises:
            RuntimeError: they have not come: at once where a connection breaks, else when the process group's timeout
                has passed.
        """
        self._peers.held.append(self._kept)
        begin = time.perf_counter()
        for work, rank in self._works:
            try:
                work.wait(self._peers.patience)
            except RuntimeError as error:
                other = "a rank" if rank is None else f"rank {rank}"
                raise RuntimeError(
                    f"{other} has died, hangs, or sends something of another length ({error})"
                ) from error
        self._peers.seconds.communicate += time.perf_counter() - begin
        return self._result


@dataclass(frozen=True)
class Peers:
    """The ranks of a process group as a code's workers.

    Attributes:
        group: the process group.
        code: the code.
        worker: the worker that this rank is.
        ranks: of every worker, its rank within the group.
        patience: how long values are waited for; 0: as long as the group's timeout says.
        seconds: that were spent.
        held: tensors of the last exchanges. A thread of gloo may still refer to them after it is done; were its
            reference the last, it would need Python's lock, and abort where Python is ending.
    """

    group: dist.ProcessGroup
    code: Code
    worker: int
    ranks: tuple[int, ...]
    patience: timedelta = timedelta(0)
    seconds: Seconds = field(default_factory=Seconds)
    held: deque[tuple[Tensor, ...]] = field(default_factory=lambda: deque(maxlen=2))

    def gather(self, values: Tensor) -> Pending:
        """Everybody's values, (workers, *values.shape), row j from worker j."""
        rows = values.new_empty((self.code.workers, *values.shape))
        by_rank = [rows[self.ranks.index(rank)] for rank in range(self.code.workers)]
        work = dist.all_gather(by_rank, values, group=self.group, async_op=True)
        return Pending(self, [(work, None)], rows, (values, *by_rank), soon=True)

    def draw_key(self, device: torch.device) -> Pending:
        """A key (1,), of which nobody knows anything before everybody has called this; see `draw_share`."""
        return self.sum(draw_share(device), soon=True)

    def swap(self, values: Tensor, rows: Tensor) -> Pending:
        """Everybody's values into rows, like `gather`, but straight from each: nobody can alter what another sent."""
        own, n = self.worker, self.code.workers
        rows[own] = values
        exchanges = []
        for distance in range(1, n):
            to, source = self.ranks[(own + distance) % n], (own - distance) % n
            for op, tensor, peer in (dist.isend, values, to), (dist.irecv, rows[source], self.ranks[source]):
                exchanges.append(dist.P2POp(op, tensor, group=self.group, group_peer=peer, tag=tag_of(tensor)))
        works = dist.batch_isend_irecv(exchanges) if exchanges else []
        # NCCL gives one for all.
        ranks = [exchange.group_peer for exchange in exchanges] if len(works) == len(exchanges) else [None] * len(works)
        kept = (values, rows, *(exchange.tensor for exchange in exchanges))
        return Pending(self, list(zip(works, ranks, strict=True)), rows, kept, soon=True)

    def sum(self, values: Tensor, group: dist.ProcessGroup | None = None, *, soon: bool = False) -> Pending:
        """Everybody's values added up, in place; or those of a group only."""
        work = dist.all_reduce(values, group=self.group if group is None else group, async_op=True)
        return Pending(self, [(work, None)], values, (values,), soon=soon)

    def spread(self, values: Tensor, worker: int, group: dist.ProcessGroup) -> Pending:
        """One worker's values to all of a group, in place."""
        source = dist.get_process_group_ranks(self.group)[self.ranks[worker]]
        work = dist.broadcast(values, source, group=group, async_op=True)
        return Pending(self, [(work, self.ranks[worker])], values, (values,), soon=False)

    def send(self, values: Tensor, worker: int) -> None:
        """To one worker; until they have left."""
        rank = self.ranks[worker]
        work = dist.isend(values, group=self.group, group_dst=rank, tag=tag_of(values))
        Pending(self, [(work, rank)], values, (values,), soon=True).wait()

    def receive(self, values: Tensor, worker: int) -> None:
        """From one worker, in place; until they are there."""
        rank = self.ranks[worker]
        work = dist.irecv(values, group=self.group, group_src=rank, tag=tag_of(values))
        Pending(self, [(work, rank)], values, (values,), soon=True).wait()


def draw_share(device: torch.device) -> Tensor:
    """(1,) int64: this rank's share in a key, which is the sum of all. Not to be sent before the message is final.

    From the operating system: torch's generators are seeded, the same on many ranks.
    """
    return torch.tensor([secrets.randbits(KEY_BITS)], device=device)


def tag_of(values: Tensor) -> int:
    """What a message is sent under: its length. One of another length does not meet the room made for it.

    Without it gloo leaves the end of the room as it was, or aborts the process where the message is longer.
    """
    return values.numel() * values.element_size() % 2**31


# Yields what it waits for, so that other buckets begin meanwhile, and is sent the values; returns the outcome. Yields
# None to let the buckets before it go on first.
Exchange = Generator[Pending | None, Tensor, Outcome]
RecordExchange = Generator[Pending | None, Tensor, tuple[Tensor, tuple[int, ...]]]


class Transport(abc.ABC):
    """One way to exchange messages and decode them.

    Attributes:
        trust: one sentence: who must be honest for the guarantee to hold.
    """

    trust: str

    def __init__(self, peers: Peers, *, atol: float = 0.0, rtol: float = 0.0) -> None:
        self.peers = peers
        self.code = peers.code
        self.tolerance = {"atol": atol, "rtol": rtol}

    def exchange(self, message: Message, number: int) -> Exchange:
        """Sends this rank's message and decodes everybody's.

        Args:
            message: its values and its bucket may be overwritten; in the end the bucket is the decoded gradient.
            number: of this exchange, the same on all ranks, never used before.
        """
        if message.values.numel() == 0:
            return Outcome({}, False)  # nothing to send
        return (yield from self._exchange(message, number))

    @abc.abstractmethod
    def _exchange(self, message: Message, number: int) -> Exchange:
        """`exchange` of a message that has elements."""

    def _decode_rows(
        self, rows: Tensor, missing: Collection[int] = (), seed: int | None = None
    ) -> tuple[Tensor, Outcome]:
        """Decodes everybody's messages, or slices of them.

        Args:
            rows: row j from worker j, in marked rooms.
            missing: workers whose rows are not to be looked at.
            seed: of what the decoder draws; default: from the operating system.

        Returns:
            The gradient, and the outcome.
        """
        mask = torch.zeros(self.code.workers, dtype=torch.bool, device=rows.device)
        mask[list(missing)] = True
        spoil_short(rows, mask)
        given = {"missing": mask if missing else None, "seed": seed, **self.tolerance}
        decoded = self.code.decode(rows, **given)
        left_out = workers_in(decoded.left_out)
        return decoded.gradient, Outcome(differences(rows, decoded, missing), bool(decoded.failed), left_out=left_out)

    def gather_record(self, record: Tensor) -> RecordExchange:
        """Gives every rank everybody's record: a few numbers about a step. Not decoded, what a bad rank sends included.

        Args:
            record: (len,) int64, of the same length on all ranks, on the device of the messages.

        Returns:
            (workers, len) int64 on the CPU, row j from worker j, and the workers whose record did not come or was cut
            off; their rows are 0. The same on all ranks, where each sends the same to all.
        """
        rows = yield self.peers.gather(record)
        return rows.cpu(), ()


def gather_alone(transport: Transport, record: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """`Transport.gather_record` with nothing else under way; returns the same."""
    exchange, value = transport.gather_record(record), None
    while True:
        try:
            pending = exchange.send(value)
        except StopIteration as stop:
            return stop.value
        value = None if pending is None else pending.wait()


class SharedSeed:
    """A seed that is the same on all ranks and that no rank can choose, drawn by commit and reveal.

    Each rank draws a share, and commits itself to it by a hash that also names its worker, so that a copied commitment
    cannot be opened. It reveals the share when all commitments and messages are in. The seed is a hash of all shares.
    Connections of its own: a share does not queue up behind the next messages.
    """

    def __init__(self, peers: Peers) -> None:
        group = divide(peers.group, [range(peers.code.workers)])
        self._peers = replace(peers, group=group, held=deque(maxlen=2))

    def commit(self, device: torch.device) -> tuple[bytes, Pending]:
        """Draws a share. Returns it with everybody's commitments, which are on their way."""
        share = secrets.token_bytes(SHARE_BYTES)
        return share, self._swap(_commitment(self._peers.worker, share), device)

    def reveal(self, share: bytes, commitments: Pending) -> tuple[int, list[int]]:
        """Opens the commitments. To be called when all messages are in.

        Returns:
            The seed, and the workers whose share does not fit their commitment. It is left out.
        """
        rows = commitments.wait()
        committed, shares = _texts(rows), _texts(self._swap(share, rows.device).wait())
        fits = [_commitment(j, share) == committed[j] for j, share in enumerate(shares)]
        digest = hashlib.sha256(b"".join(itertools.compress(shares, fits))).digest()
        return int.from_bytes(digest[:8], "big", signed=True), [j for j, fit in enumerate(fits) if not fit]

    def _swap(self, text: bytes, device: torch.device) -> Pending:
        # What is cut off on its way ends with zeros on all ranks.
        rooms = torch.zeros(self._peers.code.workers, len(text), dtype=torch.uint8, device=device)
        return self._peers.swap(torch.frombuffer(bytearray(text), dtype=torch.uint8).to(device), rooms)


def _commitment(worker: int, share: bytes) -> bytes:
    return hashlib.sha256(worker.to_bytes(4, "big") + share).digest()


def _texts(rows: Tensor) -> list[bytes]:
    return [bytes(row) for row in rows.tolist()]


@dataclass
class _Slice:
    """A slice of a message: this rank's values, and where everybody's arrive once it has been sent."""

    values: Tensor
    rows: Tensor | None = None
    messages: Pending | None = None
    share: bytes = b""
    commitments: Pending | None = None

    @property
    def size(self) -> int:
        return self.values.numel() * self.values.element_size()


class AllGather(Transport):
    """Every rank collects all messages and decodes by itself, slice by slice.

    Moves every message from its rank to every other. A rank holds n slices for each of its own that are on their way:
    at most `WINDOW` bytes of each worker's messages, also between steps.

    A decoder that needs random numbers gets the same ones on all ranks: which errors near the noise floor are noticed
    depends on them. They are drawn by commit and reveal when the messages are in. A rank that does not reveal the share
    that it has committed itself to is a suspect, and its message an erasure.
    """

    trust = (
        "allgather: up to s ranks may compute and send anything; a rank must send the same message to all, "
        "and nobody else is trusted."
    )

    def __init__(self, peers: Peers, **tolerance: float) -> None:
        super().__init__(peers, **tolerance)
        self._seed = SharedSeed(peers) if isinstance(peers.code, CyclicCode) else None
        self._unsent: deque[_Slice] = deque()  # of all buckets, in order
        self._under_way = 0  # bytes
        self._rooms: list[Tensor] = []  # bytes, for everybody's slices, that are free

    def _exchange(self, message: Message, number: int) -> Exchange:
        """Gathers and decodes the slices in order, while the next ones come."""
        slices = [_Slice(values) for values in sliced(message.values)]
        self._unsent.extend(slices)
        self._send()
        yield None  # the buckets before come first
        outcomes = []
        for piece in slices:
            outcomes.append(self._decode(piece))
            self._send()
        return finish(message, outcomes)

    def _send(self) -> None:
        while self._unsent and (not self._under_way or self._under_way + self._unsent[0].size <= WINDOW):
            piece = self._unsent.popleft()
            self._under_way += piece.size
            piece.rows = mark(self._take_room(piece.values))
            if self._seed is not None:
                piece.share, piece.commitments = self._seed.commit(piece.values.device)
            piece.messages = self.peers.swap(piece.values, piece.rows)

    def _take_room(self, values: Tensor) -> Tensor:
        """For everybody's values; a used one where there is one, since new memory costs as much as a decode."""
        size = self.code.workers * values.numel() * values.element_size()
        room = self._rooms.pop() if self._rooms else None
        if room is None or room.numel() < size:
            room = torch.empty(size, dtype=torch.uint8, device=values.device)
        return room[:size].view(values.dtype).view(self.code.workers, -1)

    def _decode(self, piece: _Slice) -> Outcome:
        rows = piece.messages.wait()
        seed, liars = None, []
        if self._seed is not None:
            seed, liars = self._seed.reveal(piece.share, piece.commitments)
        gradient, outcome = self._decode_rows(rows, liars, seed)
        piece.values.copy_(gradient)
        self._under_way -= piece.size
        self._rooms.append(rows.view(-1).view(torch.uint8))
        piece.rows = piece.messages = None
        left_out = tuple(sorted({*outcome.left_out, *liars}))
        return replace(outcome, suspects=outcome.suspects | dict.fromkeys(liars), left_out=left_out)

    def gather_record(self, record: Tensor) -> RecordExchange:
        """Straight from each rank; see `Transport.gather_record`."""
        rooms = mark(record.new_zeros(self.code.workers, record.numel()))
        rows = yield self.peers.swap(record, rooms)
        return read_records(rows)


class AllReduceRepetition(Transport):
    """An all-reduce that uses that a group's members have the same message, after a vote on digests of the messages.

    The bucket is cut into as many shards as a group has members (the smallest group, where they differ). Each member
    is responsible for one of them: it adds it up with its like in the other groups, and gives the sum to its own group.
    With m members and G groups a rank so sends (2 (G - 1) / G + m - 1) / m times the bucket, where a plain all-reduce
    sends nearly 2; with one group nothing, and with s = 0 it is the plain all-reduce. To that come 24 bytes per rank
    and bucket, for the digest and a share in its key; nothing of the size of a message is held.

    A member that is outvoted is first sent the right message by one of the majority, and tells what differed. So it is
    always the same member that contributes a shard, with the same bits, and the order of the sum never changes.
    """

    trust = "allreduce: up to s ranks may compute anything wrong; what ranks send is not altered on the way."

    def __init__(self, peers: Peers, **tolerance: float) -> None:
        super().__init__(peers, **tolerance)
        ends = list(itertools.accumulate(self.code.group_sizes))
        self._groups = [range(end - size, end) for end, size in zip(ends, self.code.group_sizes, strict=True)]
        self._shards = min(self.code.group_sizes)
        self._own = next(members for members in self._groups if peers.worker in members)
        self._shard = peers.worker - self._own.start  # for which this worker is responsible, if there is one
        # Buckets by number: messages in order, how many of them have shares in the key, and what has been gathered.
        self._undigested: list[tuple[int, Tensor]] = []
        self._key = self._with_key = 0
        self._digests: dict[int, list[tuple[int, int]]] = {}
        self._ring = self._circle = None
        if len(self._groups) == 1:
            return
        if self._shards == 1:
            self._ring = peers.group
            return
        self._circle = divide(peers.group, [[peers.ranks[j] for j in members] for members in self._groups])
        rings = [[members.start + shard for members in self._groups] for shard in range(self._shards)]
        spare = [j for members in self._groups for j in members[self._shards :]]
        parts = [[peers.ranks[j] for j in workers] for workers in (*rings, spare) if workers]
        ring = divide(peers.group, parts)
        if self._shard < self._shards:
            self._ring = ring

    def _exchange(self, message: Message, number: int) -> Exchange:
        """Draws a key, gathers digests, votes, mends, adds up."""
        if self.code.adversaries == 0:  # groups of one
            yield from self._add_up(message)
            return Outcome({}, False)
        digests = yield from self._gather_digests(message.values, number)
        suspects, helpers, failed = [], {}, False
        for members in self._groups:
            winner, votes = Counter(digests[j] for j in members).most_common(1)[0]
            failed |= votes < len(members) - self.code.adversaries
            helper = next(j for j in members if digests[j] == winner)
            for j in members:
                if digests[j] != winner:
                    suspects.append(j)
                    helpers[j] = helper
        if failed:
            message.bucket.fill_(torch.nan)
            return Outcome(dict.fromkeys(suspects), True)
        found = self._hand_over(message.values, suspects, helpers)
        yield from self._add_up(message)
        return Outcome(found, False)

    def _gather_digests(self, values: Tensor, number: int) -> Generator[Pending | None, Tensor, list[tuple[int, int]]]:
        """Of all workers' messages, under a key that nobody knows before this rank's message is final.

        Every exchange, however small, is a round in which all ranks wait. So there is one for each bucket, not two: the
        first of a step waits for the second, draws a key for both, and gathers the digests of both; with them go the
        shares in the key of the one that has begun meanwhile, and so on.
        """
        self._undigested.append((number, values))
        yield None
        while number not in self._digests:
            if self._undigested[0][0] != number:
                yield None  # the foremost acts for all
                continue
            if self._with_key == 0:
                covered = len(self._undigested)
                self._key = int((yield self.peers.draw_key(values.device)))
                self._with_key = covered
            batch = self._undigested[: self._with_key]
            behind = len(self._undigested) - len(batch)  # whose shares go with this
            own = [ops.digest(message, (self._key + i) % 2**63) for i, (_, message) in enumerate(batch)]
            *columns, shares = (yield self.peers.gather(torch.cat([*own, draw_share(values.device)]))).T.tolist()
            for i, (other, _) in enumerate(batch):
                self._digests[other] = list(zip(columns[2 * i], columns[2 * i + 1], strict=True))
            del self._undigested[: len(batch)]
            self._key, self._with_key = sum(shares) % 2**63, behind
        return self._digests.pop(number)

    def _add_up(self, message: Message) -> Generator[Pending, Tensor, None]:
        """The mean over the groups, of which each member has the same message, into the bucket."""
        peers = self.peers
        if len(self._groups) == 1:
            message.put(message.values)
            return
        shards = message.bucket.tensor_split(self._shards)
        if self._ring is not None:
            mine = shards[self._shard]
            # Scaled as DDP does, to the last bit.
            torch.mul(message.values.tensor_split(self._shards)[self._shard], 1 / self.code.parts, out=mine)
            yield peers.sum(mine, self._ring, soon=self._circle is not None)
        if self._circle is not None:
            arriving = [peers.spread(shard, j, self._circle) for shard, j in zip(shards, self._own, strict=False)]
            while arriving:
                yield arriving.pop(0)

    def _hand_over(self, values: Tensor, suspects: list[int], helpers: dict[int, int]) -> dict[int, Difference | None]:
        """Gives every suspect the message that it should have had; in place."""
        if not suspects:
            return {}
        peers, own = self.peers, Difference(0, 0, 0.0)
        for j in suspects:
            if peers.worker == helpers[j]:
                for piece in sliced(values):
                    peers.send(piece, j)
            elif peers.worker == j:
                found = []
                for piece in sliced(values):
                    right = torch.empty_like(piece)
                    peers.receive(right, helpers[j])
                    found.append(difference(piece, right))
                    piece.copy_(right)
                length = slice_length(values.dtype)
                own = join((i * length, part) for i, part in enumerate(found))
        told = torch.tensor([own.elements, own.first, own.largest], dtype=torch.float64, device=values.device)
        rows = peers.gather(told).wait().tolist()
        return {j: _heard(*rows[j], length=values.numel()) for j in suspects}


class AllReduceCyclic(Transport):
    """All-reduce of the messages, whose plain sum is the answer, and a check of their projections.

    Moves what a plain all-reduce moves, the projections, 40 bytes for every 32768 elements and rank, and 8 bytes per
    rank and bucket. Only where the projections object, the messages are all-reduced again, with weights.
    """

    trust = AllReduceRepetition.trust

    def _exchange(self, message: Message, number: int) -> Exchange:
        """Adds up, and meanwhile gathers projections; where they object, adds up with weights."""
        code, peers, values = self.code, self.peers, message.values
        # The projection must not be known before all messages are made.
        drawn = peers.draw_key(values.device)
        total = peers.sum(message.bucket if message.ready else message.put(values, 1 / code.workers))
        key = yield drawn
        projections, norms = ops.cyclic_project(values[None], int(key))
        own = torch.cat([torch.view_as_real(projections[0]).flatten(), norms[0]])
        rows = yield peers.gather(own)
        pairs, norms = (half.contiguous() for half in rows.tensor_split([2 * projections.numel()], dim=1))
        gathered = torch.view_as_complex(pairs.view(code.workers, *projections.shape[1:], 2))
        weights, suspects, failed = ops.cyclic_locate(
            gathered, norms, code.adversaries, values.numel(), dtype=values.dtype, **self.tolerance
        )
        found, left_out = workers_in(suspects), workers_in(weights == 0)
        yield total
        if failed or weights.isnan().any():
            message.bucket.fill_(torch.nan)
        elif (weights != 1 / code.workers).any():  # somebody is left out
            if weights[peers.worker] == 0:
                message.bucket.zero_()
            else:
                for piece in sliced(values):
                    piece.copy_(ops.cyclic_combine(piece[None], weights[peers.worker, None]))
                message.put(values)
            yield peers.sum(message.bucket)
        return Outcome(dict.fromkeys(found), bool(failed), left_out=left_out)


def workers_in(mask: Tensor) -> tuple[int, ...]:
    """Return the workers that a mask names."""
    return tuple(mask.nonzero().flatten().tolist())


BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def mark(rooms: Tensor) -> Tensor:
    """Before messages arrive in these rooms, one in each row, or in this one; returns them."""
    rooms.view(BITS[rooms.element_size()])[..., -1] = _mark(rooms.dtype)
    return rooms


def spoil_short(rows: Tensor, missing: Tensor) -> None:
    """Messages that have ended before their rooms become NaN: what follows them would differ from rank to rank."""
    short = _short(rows) & ~missing
    if short.any():
        rows[short] = torch.nan


def read_records(rows: Tensor, missing: Collection[int] = ()) -> tuple[Tensor, tuple[int, ...]]:
    """What `Transport.gather_record` returns, of marked rooms; those that were cut off are missing, too."""
    rows = rows.cpu()
    absent = _short(rows)
    absent[list(missing)] = True
    rows[absent] = 0
    return rows, tuple(absent.nonzero().flatten().tolist())


def _short(rows: Tensor) -> Tensor:
    return rows.view(BITS[rows.element_size()])[:, -1] == _mark(rows.dtype)


def _mark(dtype: torch.dtype) -> int:
    """The bits of a NaN that no arithmetic makes; as an integer no digest but one in 2^64."""
    dtype = torch.float64 if dtype == torch.int64 else dtype
    infinity = torch.tensor([torch.inf], dtype=dtype)
    return int(infinity.view(BITS[infinity.element_size()])) + 42


def _heard(elements: float, first: float, largest: float, *, length: int) -> Difference | None:
    """What a suspect tells of itself, if it can be."""
    if 0 <= first < length and 0 <= elements <= length and largest >= 0:
        return Difference(int(elements), int(first), largest)
    return None


def difference(sent: Tensor, right: Tensor) -> Difference:
    """Between two messages, bit by bit."""
    bits = BITS[sent.element_size()]
    elements, first, largest = 0, 0, 0.0
    for i, (one, other) in enumerate(zip(sent.split(PORTION), right.split(PORTION), strict=True)):
        differing = one.view(bits) != other.view(bits)
        count = int(differing.count_nonzero())
        if count == 0:
            continue
        if elements == 0:
            first = i * PORTION + int(differing.view(torch.uint8).argmax())
        elements += count
        deviations = (one.double() - other.double()).abs_()
        deviation = deviations.max().item()
        if deviation != deviation:  # infinities that are the same make one that is not a number, too
            deviation = deviations.masked_fill_(~differing, 0.0).max().item()
        largest = max(largest, deviation if deviation < float("inf") else float("inf"))
    return Difference(elements, first, largest)


def join(parts: Iterable[tuple[int, Difference]]) -> Difference:
    """Of a whole, from those of its parts, each with the element at which it begins."""
    differing = [(begin + part.first, part) for begin, part in parts if part.elements]
    if not differing:
        return Difference(0, 0, 0.0)
    elements = sum(part.elements for _, part in differing)
    return Difference(elements, min(first for first, _ in differing), max(part.largest for _, part in differing))


def differences(rows: Tensor, decoded: Decoded, missing: Collection[int] = ()) -> dict[int, Difference | None]:
    """The suspects among decoded messages, with what differs where the code tells what the message should have been."""
    code = decoded.code
    suspects = decoded.suspects.nonzero().flatten().tolist()
    if decoded.failed or not isinstance(code, RepetitionCode):
        return dict.fromkeys(suspects)
    good = {code.assignment(j): j for j in range(code.workers) if j not in suspects and j not in missing}
    return {j: difference(rows[j], rows[good[code.assignment(j)]]) for j in suspects}


def slice_length(dtype: torch.dtype) -> int:
    """Elements of a message that are gathered and decoded at once."""
    return SLICE // dtype.itemsize


def sliced(values: Tensor) -> tuple[Tensor, ...]:
    """A message by slices; views."""
    return values.split(slice_length(values.dtype))


def finish(message: Message, outcomes: Sequence[Outcome]) -> Outcome:
    """Puts a message whose values are the decoded gradient, slice by slice, into its bucket; what came of all slices.

    Where the guarantee does not cover one of them, it does not cover the bucket.
    """
    failed = any(outcome.failed for outcome in outcomes)
    if failed:
        message.bucket.fill_(torch.nan)
    else:
        message.put(message.values)
    length = slice_length(message.values.dtype)
    found: dict[int, list[tuple[int, Difference | None]]] = {}
    for i, outcome in enumerate(outcomes):
        for j, part in outcome.suspects.items():
            found.setdefault(j, []).append((i * length, part))
    suspects = {
        j: None if any(part is None for _, part in parts) else join(parts) for j, parts in sorted(found.items())
    }
    missing = sorted({j for outcome in outcomes for j in outcome.missing})
    left_out = sorted({j for outcome in outcomes for j in outcome.left_out})
    return Outcome(suspects, failed, tuple(missing), tuple(left_out))
