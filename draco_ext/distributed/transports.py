"""How messages travel between the ranks, and which of them are trusted.

A transport takes this rank's message for one bucket and gives the decoded gradient, the same bits on all ranks, with
the verdict. All calls are collective: every rank makes the same ones in the same order.
"""

from __future__ import annotations

import abc
import itertools
import secrets
import time
from collections import Counter, deque
from collections.abc import Collection, Generator, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from draco_ext import ops
from draco_ext.codes import Code, Decoded, RepetitionCode, decode
from draco_ext.distributed.groups import divide


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
    """

    suspects: dict[int, Difference | None]
    failed: bool
    missing: tuple[int, ...] = ()


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
        self, peers: Peers, works: Sequence[dist.Work], result: Tensor, kept: tuple[Tensor, ...], *, soon: bool
    ) -> None:
        self.soon = soon
        self._peers = peers
        self._works = works
        self._result = result
        self._kept = kept

    def wait(self) -> Tensor:
        """The values."""
        begin = time.perf_counter()
        for work in self._works:
            work.wait()
        self._peers.seconds.communicate += time.perf_counter() - begin
        self._peers.held.append(self._kept)
        return self._result


@dataclass(frozen=True)
class Peers:
    """The ranks of a process group as a code's workers.

    Attributes:
        group: the process group.
        code: the code.
        worker: the worker that this rank is.
        ranks: of every worker, its rank within the group.
        key: of the digests, the same on all ranks and new in every run.
        seconds: that were spent.
        held: tensors of the last exchanges. A thread of gloo may still refer to them after it is done; were its
            reference the last, it would need Python's lock, and abort where Python is ending.
    """

    group: dist.ProcessGroup
    code: Code
    worker: int
    ranks: tuple[int, ...]
    key: int
    seconds: Seconds = field(default_factory=Seconds)
    held: deque[tuple[Tensor, ...]] = field(default_factory=lambda: deque(maxlen=2))

    def gather(self, values: Tensor) -> Pending:
        """Everybody's values, (workers, *values.shape), row j from worker j."""
        rows = values.new_empty((self.code.workers, *values.shape))
        by_rank = [rows[self.ranks.index(rank)] for rank in range(self.code.workers)]
        work = dist.all_gather(by_rank, values, group=self.group, async_op=True)
        return Pending(self, [work], rows, (values, *by_rank), soon=True)

    def swap(self, values: Tensor, rows: Tensor) -> Pending:
        """Everybody's values into rows, like `gather`, but straight from each: nobody can alter what another sent."""
        own, n = self.worker, self.code.workers
        rows[own] = values
        exchanges = []
        for distance in range(1, n):
            to, source = (own + distance) % n, (own - distance) % n
            exchanges.append(dist.P2POp(dist.isend, values, group=self.group, group_peer=self.ranks[to]))
            exchanges.append(dist.P2POp(dist.irecv, rows[source], group=self.group, group_peer=self.ranks[source]))
        works = dist.batch_isend_irecv(exchanges) if exchanges else []
        return Pending(self, works, rows, (values, rows, *(exchange.tensor for exchange in exchanges)), soon=True)

    def sum(self, values: Tensor, group: dist.ProcessGroup | None = None, *, soon: bool = False) -> Pending:
        """Everybody's values added up, in place; or those of a group only."""
        work = dist.all_reduce(values, group=self.group if group is None else group, async_op=True)
        return Pending(self, [work], values, (values,), soon=soon)

    def spread(self, values: Tensor, worker: int, group: dist.ProcessGroup) -> Pending:
        """One worker's values to all of a group, in place."""
        source = dist.get_process_group_ranks(self.group)[self.ranks[worker]]
        work = dist.broadcast(values, source, group=group, async_op=True)
        return Pending(self, [work], values, (values,), soon=False)

    def send(self, values: Tensor, worker: int) -> None:
        """To one worker; until they have left."""
        begin = time.perf_counter()
        self.held.append((values,))
        dist.send(values, group=self.group, group_dst=self.ranks[worker])
        self.seconds.communicate += time.perf_counter() - begin

    def receive(self, values: Tensor, worker: int) -> None:
        """From one worker, in place; until they are there."""
        begin = time.perf_counter()
        self.held.append((values,))
        dist.recv(values, group=self.group, group_src=self.ranks[worker])
        self.seconds.communicate += time.perf_counter() - begin


# Yields what it waits for, so that other buckets begin meanwhile, and is sent the values; returns the outcome.
Exchange = Generator[Pending, Tensor, Outcome]


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

    @abc.abstractmethod
    def exchange(self, message: Message, number: int) -> Exchange:
        """Sends this rank's message and decodes everybody's.

        Args:
            message: its values and its bucket may be overwritten; in the end the bucket is the decoded gradient.
            number: of this exchange, the same on all ranks, never used before.
        """


class AllGather(Transport):
    """Every rank collects all messages and decodes by itself.

    Moves every message from its rank to every other; holds those of two buckets, also between steps.
    """

    trust = (
        "allgather: up to s ranks may compute and send anything; a rank must send the same message to all, "
        "and nobody else is trusted."
    )

    def __init__(self, peers: Peers, **tolerance: float) -> None:
        super().__init__(peers, **tolerance)
        self._rooms: dict[tuple[int, torch.dtype], Tensor] = {}

    def exchange(self, message: Message, number: int) -> Exchange:
        """Gathers, then decodes."""
        rows = yield self.peers.swap(message.values, self._room(message.values, number))
        decoded = decode(rows, self.code, **self.tolerance)
        message.put(decoded.gradient)
        return Outcome(differences(rows, decoded), bool(decoded.failed))

    def _room(self, values: Tensor, number: int) -> Tensor:
        """For everybody's messages; taken in turns, since a bucket begins before the one before it is decoded."""
        key, size = (number % 2, values.dtype), self.code.workers * values.numel()
        if key not in self._rooms or self._rooms[key].numel() < size:
            self._rooms[key] = values.new_empty(size)
        return self._rooms[key][:size].view(self.code.workers, values.numel())


class AllReduceRepetition(Transport):
    """An all-reduce that uses that a group's members have the same message, after a vote on digests of the messages.

    The bucket is cut into as many shards as a group has members (the smallest group, where they differ). Each member
    is responsible for one of them: it adds it up with its like in the other groups, and gives the sum to its own group.
    With m members and G groups a rank so sends (2 (G - 1) / G + m - 1) / m times the bucket, where a plain all-reduce
    sends nearly 2; with one group nothing, and with s = 0 it is the plain all-reduce. To that come 16 bytes per rank
    and bucket; nothing of the size of a message is held.

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

    def exchange(self, message: Message, number: int) -> Exchange:
        """Gathers digests, votes, mends, adds up."""
        if self.code.adversaries == 0:  # groups of one
            yield from self._add_up(message)
            return Outcome({}, False)
        gathered = yield self.peers.gather(ops.digest(message.values, self.peers.key + number))
        digests = [tuple(row) for row in gathered.tolist()]
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
                peers.send(values, j)
            elif peers.worker == j:
                right = torch.empty_like(values)
                peers.receive(right, helpers[j])
                own = difference(values, right)
                values.copy_(right)
        told = torch.tensor([own.elements, own.first, own.largest], dtype=torch.float64, device=values.device)
        rows = peers.gather(told).wait().tolist()
        return {j: Difference(int(rows[j][0]), int(rows[j][1]), rows[j][2]) for j in suspects}


class AllReduceCyclic(Transport):
    """All-reduce of the messages, whose plain sum is the answer, and a check of their projections.

    Moves what a plain all-reduce moves, the projections, 40 bytes for every 32768 elements and rank, and 8 bytes per
    rank and bucket. Only where the projections object, the messages are all-reduced again, with weights.
    """

    trust = AllReduceRepetition.trust

    def exchange(self, message: Message, number: int) -> Exchange:
        """Adds up, and meanwhile gathers projections; where they object, adds up with weights."""
        code, peers, values = self.code, self.peers, message.values
        # The projection must not be known before all messages are made: everybody has a share in its seed.
        share = torch.tensor([secrets.randbits(48)], device=values.device)
        seeds = peers.gather(share)
        total = peers.sum(message.bucket if message.ready else message.put(values, 1 / code.workers))
        seed = int((yield seeds).sum())
        projections, energy = ops.cyclic_project(values[None], seed)
        own = torch.cat([torch.view_as_real(projections[0]).flatten(), energy[0]])
        rows = yield peers.gather(own)
        pairs, energies = (half.contiguous() for half in rows.tensor_split([2 * projections.numel()], dim=1))
        gathered = torch.view_as_complex(pairs.view(code.workers, *projections.shape[1:], 2))
        weights, suspects, failed = ops.cyclic_locate(
            gathered, energies, code.adversaries, values.numel(), dtype=values.dtype, **self.tolerance
        )
        found = suspects.nonzero().flatten().tolist()
        yield total
        if failed or weights.isnan().any():
            message.bucket.fill_(torch.nan)
        elif (weights != 1 / code.workers).any():  # somebody is left out
            if weights[peers.worker] == 0:
                message.bucket.zero_()
            else:
                message.put(ops.cyclic_combine(values[None], weights[peers.worker, None]))
            yield peers.sum(message.bucket)
        return Outcome(dict.fromkeys(found), bool(failed))


def difference(sent: Tensor, right: Tensor) -> Difference:
    """Between two messages, bit by bit."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[sent.element_size()]
    differing = (sent.view(bits) != right.view(bits)).nonzero().flatten()
    if len(differing) == 0:
        return Difference(0, 0, 0.0)
    largest = (sent[differing].double() - right[differing].double()).abs().max().item()
    return Difference(len(differing), int(differing[0]), largest if largest < float("inf") else float("inf"))


def differences(rows: Tensor, decoded: Decoded, missing: Collection[int] = ()) -> dict[int, Difference | None]:
    """The suspects among decoded messages, with what differs where the code tells what the message should have been."""
    code = decoded.code
    suspects = decoded.suspects.nonzero().flatten().tolist()
    if decoded.failed or not isinstance(code, RepetitionCode):
        return dict.fromkeys(suspects)
    good = {code.assignment(j): j for j in range(code.workers) if j not in suspects and j not in missing}
    return {j: difference(rows[j], rows[good[code.assignment(j)]]) for j in suspects}
