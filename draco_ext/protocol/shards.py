"""A result on its way from a trusted server to all workers: each gets a shard, and they pass the shards on."""

from __future__ import annotations

import logging
import queue
import threading
import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from draco_ext.protocol.communicator import Communicator, Connection
from draco_ext.protocol.delivery import more_than
from draco_ext.protocol.messages import MemoryPool
from draco_ext.protocol.verifier import digest_of, read_digests

logger = logging.getLogger("draco_ext")

# Results for which two workers do not pass shards on after one has said that the other's was missing or wrong.
BARRED_FOR = 10_000

_Arrival = tuple[int, int | None]  # worker, and number of the gathering whose shard has arrived; None: it is gone


class Gathering:
    """A result as it comes to one worker in shards.

    Attributes:
        values: the result, on the CPU; what has not arrived yet may still arrive, whenever.
        shards: its shards, by relay.
        missing: by relay, 1 if its shard has not come in time.
    """

    def __init__(self, values: Tensor, relays: Sequence[int], own: int) -> None:
        self.values = values
        self.shards = values.tensor_split(len(relays))
        self.missing = torch.zeros(len(relays), dtype=torch.uint8)
        self._place = relays.index(own)
        self._completed: list[int] = []  # relays with which the exchange is complete; their threads append
        self._relays = relays

    @property
    def own(self) -> Tensor:
        """This worker's shard."""
        return self.shards[self._place]

    @property
    def is_complete(self) -> bool:
        """Return whether no other worker has still to send or to receive anything."""
        return len(self._completed) == len(self._relays) - 1

    def complete_with(self, worker: int) -> None:
        """Note that a shard has come from another relay, and this worker's has gone there."""
        self._completed.append(worker)

    def take_missing(self, receive: Callable[[Tensor], None]) -> None:
        """Receive from the server, joined, the shards that are missing, if any are.

        What other workers send late is not written into `values` and `shards` any more.
        """
        if self.missing.any():
            self.values = self.values.clone()
            self.shards = self.values.tensor_split(len(self._relays))
            _receive_joined(self.shards, self.missing, receive)

    def find_wrong(self, key: int, digests: Sequence[int]) -> Tensor:
        """Return by relay, 1 if its shard has not the digest that the server gives.

        Args:
            key: the server has sent it when nothing could arrive any more.
            digests: the numbers of all shards' digests under it.
        """
        wrong = torch.zeros_like(self.missing)
        for i, (shard, right) in enumerate(zip(self.shards, read_digests(digests), strict=True)):
            if i != self._place and not self.missing[i]:  # those came from the server
                wrong[i] = digest_of(shard, key) != right
        return wrong

    def take_wrong(self, wrong: Tensor, receive: Callable[[Tensor], None]) -> None:
        """Receive from the server, joined, the shards that were wrong, if any were."""
        if wrong.any():
            _receive_joined(self.shards, wrong, receive)


def _receive_joined(shards: Sequence[Tensor], flags: Tensor, receive: Callable[[Tensor], None]) -> None:
    chosen = flagged(shards, flags)
    joined = chosen[0].new_empty(sum(shard.numel() for shard in chosen))
    receive(joined)
    for shard, values in zip(chosen, joined.split([shard.numel() for shard in chosen]), strict=True):
        shard.copy_(values)


def flagged(shards: Sequence[Tensor], flags: Tensor) -> list[Tensor]:
    """Return the shards whose flag is not 0."""
    return [shard for shard, flag in zip(shards, flags.tolist(), strict=True) if flag]


class ShardExchange:
    """The exchange of shards among workers of which each may be silent, late, dead or wrong.

    gloo can neither tell whether a message has arrived nor cancel a receive, and closes all connections when a wait
    times out. So each other worker has a thread, which sends and receives in turn, and this one waits for the threads.
    A shard that does not come in time is received when it comes, into memory that nothing else uses then. Both ends of
    a connection exchange the shards of the same results, in order, since the server tells all relays who they are.

    Args:
        communicator: connects the workers; every pair has a connection of its own.
        timeout: seconds that this worker waits for the others' shards.
    """

    def __init__(self, communicator: Communicator, timeout: float) -> None:
        self._communicator = communicator
        self._timeout = timeout
        self._number = 0
        self._peers: dict[int, _Peer] = {}
        self._arrived: queue.Queue[_Arrival] = queue.Queue()
        self._pool = MemoryPool()
        self._recent: list[Gathering] = []  # whose memory may be used again once they are complete
        weakref.finalize(self, _close, self._peers)

    def gather(self, like: Tensor, relays: Sequence[int], receive: Callable[[Tensor], None]) -> Gathering:
        """Receive this worker's shard of a result from the server, and exchange it for those of the other relays.

        Args:
            like: a tensor like the result.
            relays: the workers that pass shards on, this one among them.
            receive: receives a tensor from the server in place.
        """
        self._number += 1
        gathering = Gathering(self._take_memory(like), relays, self._communicator.worker)
        receive(gathering.own)
        begin = time.perf_counter()
        awaited: dict[int, int] = {}
        for place, worker in enumerate(relays):
            if worker != self._communicator.worker:
                awaited[worker] = place
                self._peer(worker).exchange(_Request(self._number, gathering, gathering.shards[place]))
        awaited = self._await(awaited)
        for worker, place in awaited.items():
            gathering.missing[place] = 1
            self._peers[worker].in_time = False
        self._communicator.seconds.communicate += time.perf_counter() - begin
        self._recent.append(gathering)
        return gathering

    def _take_memory(self, like: Tensor) -> Tensor:
        pending = []
        for gathering in self._recent:
            if gathering.is_complete:
                self._pool.give_back(gathering.values)
            else:
                pending.append(gathering)
        self._recent = pending[-2:]
        return self._pool.take(like.numel(), torch.empty(0, dtype=like.dtype))

    def _peer(self, worker: int) -> _Peer:
        if worker not in self._peers:
            self._peers[worker] = _Peer(self._communicator.connect(worker), worker, self._arrived)
        return self._peers[worker]

    def _await(self, awaited: dict[int, int]) -> dict[int, int]:
        """Wait for the shards of these workers; return those whose have not arrived in time."""
        left = {j: place for j, place in awaited.items() if not self._peers[j].is_gone}
        gone = {j: place for j, place in awaited.items() if j not in left}
        until = time.monotonic() + self._timeout
        while left:
            try:
                j, number = self._arrived.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                break
            if j in left and number in (self._number, None):
                place = left.pop(j)
                if number is None:
                    gone[j] = place
        return gone | left


@dataclass(frozen=True)
class _Request:
    """A shard of a gathering that one relay is to send while it gets this worker's."""

    number: int
    gathering: Gathering
    target: Tensor


class _Peer(threading.Thread):
    """This worker's end of the connection to another relay.

    Attributes:
        in_time: whether everything has come in time so far.
        is_gone: the connection has failed.
    """

    def __init__(self, connection: Connection, worker: int, arrived: queue.Queue[_Arrival]) -> None:
        super().__init__(name=f"draco_ext shards, worker {worker}", daemon=True)
        self.in_time = True
        self.is_gone = False
        self._connection = connection
        self._worker = worker
        self._arrived = arrived
        self._requests: queue.Queue[_Request | None] = queue.Queue()
        self._keepalive: _Request | None = None  # see ProcessGroupCommunicator
        self.start()

    def exchange(self, request: _Request | None) -> None:
        """Exchange shards, after all earlier ones; None: end the thread then."""
        self._requests.put(request)

    def run(self) -> None:
        """Exchange shards until there are none left or the connection fails."""
        try:
            while (request := self._requests.get()) is not None:
                # Both ends send at once, and gloo sends what the other one has asked for.
                wait_sent = self._connection.start_send(request.gathering.own)
                self._connection.receive(request.target)
                self._arrived.put((self._worker, request.number))
                wait_sent()
                self._keepalive = request
                request.gathering.complete_with(self._worker)
        except (RuntimeError, ValueError):  # its connection is closed, or the process group destroyed
            self.is_gone, self.in_time = True, False
            self._arrived.put((self._worker, None))


def _close(peers: dict[int, _Peer]) -> None:
    for peer in peers.values():
        peer.exchange(None)
        peer.join(10 if peer.in_time else 0)


# ---------------------------------------------------------------------------------------------- the server's side


@dataclass(frozen=True)
class _Claim:
    """A claim of one relay about another's shard."""

    by: int
    about: int
    is_wrong: bool  # otherwise it has not come in time


@dataclass(frozen=True)
class HandedOut:
    """A result that the server has handed out in shards.

    Attributes:
        relays: the workers that got a shard.
        shards: their shards.
        claims: what they say of each other.
    """

    relays: tuple[int, ...]
    shards: tuple[Tensor, ...]
    claims: queue.SimpleQueue[_Claim] = field(repr=False)

    def shards_for(self, worker: int, flags: Tensor, *, is_wrong: bool) -> tuple[Tensor, ...]:
        """Note which shards a worker says are wrong or missing, and return them, joined, if there are any."""
        for about in (relay for relay, flag in zip(self.relays, flags.tolist(), strict=True) if flag):
            if about != worker:
                self.claims.put(_Claim(worker, about, is_wrong))
        chosen = flagged(self.shards, flags)
        return (torch.cat(chosen),) if chosen else ()


class Relays:
    """The choice of the workers that pass shards on, by what they have said of each other.

    Where one says that another's shard was missing or wrong, one of them is bad, or late, or the connection between
    them is. Which one cannot be told, so both are barred for some time, and get results whole. So a claim costs who
    makes it as much as whom it is about, and b bad workers have at most b others barred. If more than s members of one
    group say it of the same worker, one of them is honest, and that worker alone is barred. If they say that what it
    passed on was wrong, it is a suspect.

    Args:
        adversaries: s.
        groups: the groups of workers of which up to s members may be bad.
    """

    def __init__(self, adversaries: int, groups: Sequence[Sequence[int]]) -> None:
        self._adversaries = adversaries
        self._groups = groups
        self._number = 0
        self._barred_until: dict[int, int] = {}
        self._claims: queue.SimpleQueue[_Claim] = queue.SimpleQueue()  # threads of connections add to them
        self._accusers: dict[int, set[int]] = defaultdict(set)  # of those who have passed on wrong shards

    def choose(self, present: Iterable[int]) -> tuple[int, ...]:
        """Return the relays of the next result, of these workers."""
        self._number += 1
        self._barred_until = {j: until for j, until in self._barred_until.items() if until > self._number}
        return tuple(sorted(set(present) - self._barred_until.keys()))

    def hand_out(self, relays: tuple[int, ...], shards: tuple[Tensor, ...]) -> HandedOut:
        """Return a result that these workers get in these shards."""
        return HandedOut(relays, shards, self._claims)

    def judge(self, late: Collection[int] = ()) -> list[int]:
        """Bar workers by the claims that have come, and return those that have become suspects.

        Args:
            late: workers that are no relays anyway before they have caught up: that their shards were missing is known.
        """
        claims = []
        while not self._claims.empty():
            claim = self._claims.get()
            if claim.is_wrong or claim.about not in late:
                claims.append(claim)
        accusers = defaultdict[int, set[int]](set)
        for claim in claims:
            accusers[claim.about].add(claim.by)
            if claim.is_wrong:
                self._accusers[claim.about].add(claim.by)
        barred = {j for j, by in accusers.items() if self._one_is_honest(by)}
        barred |= self._barred_until.keys()
        for claim in claims:
            if barred.isdisjoint((claim.by, claim.about)):
                barred |= {claim.by, claim.about}
        for j in sorted(accusers.keys() & barred - self._barred_until.keys()):
            names = ", ".join(map(str, sorted(accusers[j])))
            logger.warning(
                "the shard of a result that worker %d passed on was missing or wrong, says worker %s", j, names
            )
        for j in barred:
            self._barred_until.setdefault(j, self._number + BARRED_FOR)
        suspects = sorted(j for j, by in self._accusers.items() if self._one_is_honest(by))
        for j in suspects:
            del self._accusers[j]
        return suspects

    def _one_is_honest(self, workers: Collection[int]) -> bool:
        return more_than(self._adversaries, workers, self._groups)
