"""The collectives that the protocol uses, over a torch process group.

`draco_ext.testing` has a communicator between threads of one process.
"""

from __future__ import annotations

import abc
import itertools
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from draco_ext.protocol.groups import divide, timeout_of
from draco_ext.reporting.report import Seconds

Addressed = tuple[Tensor, int]  # a tensor, and the worker that it is sent to or received from
# What a worker sends straight to others, and room for what it gets from them.
Parcels = tuple[list[Addressed], list[Addressed]]


def parcels_for_all(own: int, values: Tensor, rows: Sequence[Tensor] | Tensor) -> Parcels:
    """Return parcels that bring a worker's values to all others, and theirs into `rows`."""
    n = len(rows)
    leaving = [(values, (own + distance) % n) for distance in range(1, n)]
    return leaving, [(rows[(own - distance) % n], (own - distance) % n) for distance in range(1, n)]


class Pending:
    """An asynchronous collective and its result.

    Attributes:
        resume_on_next_bucket: whether its exchange goes on when the next bucket begins; otherwise it waits until all
            buckets have begun.
    """

    def __init__(self, wait: Callable[[], Tensor], *, resume_on_next_bucket: bool = True) -> None:
        self.resume_on_next_bucket = resume_on_next_bucket
        self._wait = wait

    def wait(self) -> Tensor:
        """Wait for the collective and return its result.

        Raises:
            RuntimeError: a rank has died, hangs, or sends a message of another length.
        """
        return self._wait()


class Connection(abc.ABC):
    """A connection to one worker, used by a thread of its own.

    It has no timeout, and its waiting does not count in `Seconds`.
    """

    def send(self, values: Tensor) -> None:
        """Send values and wait until they are sent.

        Raises:
            RuntimeError: the connection is closed.
        """
        self.start_send(values)()

    @abc.abstractmethod
    def start_send(self, values: Tensor) -> Callable[[], None]:
        """Start to send values; return a function that waits until they are sent, and raises what `send` raises."""

    @abc.abstractmethod
    def receive(self, values: Tensor) -> None:
        """Receive values in place and wait for them.

        Raises:
            RuntimeError: the connection is closed.
        """


class Communicator(abc.ABC):
    """The workers of a code, as seen by one of them.

    All collectives are called by all workers in the same order. Tensors that are being sent or received must not be
    touched until the collective is waited for.

    Attributes:
        worker: this rank's worker number.
        workers: the number of workers.
        root: the worker that is rank 0.
        seconds: the time that this rank spends, by kind; shared with the communicators split from this one.
    """

    worker: int
    workers: int
    root: int
    seconds: Seconds

    @abc.abstractmethod
    def all_gather(self, values: Tensor) -> Pending:
        """Gather all workers' values: (workers, *values.shape), row j from worker j."""

    @abc.abstractmethod
    def all_gather_p2p(self, values: Tensor, rows: Tensor) -> Pending:
        """Gather all workers' values into `rows`, each directly from its worker, so that no other can alter them."""

    @abc.abstractmethod
    def all_reduce(self, values: Tensor, *, resume_on_next_bucket: bool = False) -> Pending:
        """Add up all workers' values, in place."""

    @abc.abstractmethod
    def broadcast(self, values: Tensor, source: int) -> Pending:
        """Send one worker's values to all others, in place.

        The exchange resumes when all buckets have begun.
        """

    @abc.abstractmethod
    def send(self, values: Tensor, worker: int) -> None:
        """Send values to one worker and wait until they are sent."""

    @abc.abstractmethod
    def receive(self, values: Tensor, worker: int) -> None:
        """Receive values from one worker in place and wait for them."""

    @abc.abstractmethod
    def exchange(self, leaving: Sequence[Addressed], arriving: Sequence[Addressed]) -> Pending:
        """Send tensors straight to other workers and receive others in place, all at the same time.

        Args:
            leaving: tensors and the workers that they are sent to.
            arriving: tensors and the workers that they are received from.

        Returns:
            The pending exchange. Its result is empty: what was received is in `arriving`.
        """

    @abc.abstractmethod
    def connect(self, worker: int) -> Connection:
        """Return the connection to one worker; it is used by a thread of its own."""

    @abc.abstractmethod
    def split(self, parts: Sequence[Sequence[int]], *, extra_timeout: float | None = None) -> Communicator:
        """Split the workers into parts, each with connections of its own. All workers call it with the same parts.

        Args:
            parts: the workers of each part; every worker is in exactly one.
            extra_timeout: seconds added to the timeout. If given, every pair of ranks gets a connection of its own,
                so that a broken connection affects no other rank. Default: connections like this communicator's.

        Returns:
            The communicator of this worker's part. It numbers the workers in the order of the part.
        """


# Bytes: gathered values of at most so many go straight to everybody over gloo, and those for one worker in one message.
SHORT = 2**16


@dataclass(frozen=True)
class _NotBegun:
    """An operation that could not begin; the error is raised where it is waited for."""

    error: RuntimeError

    def wait(self, timeout: timedelta) -> None:
        raise self.error


class _Operation(NamedTuple):
    """A started operation, and the worker at its other end if there is only one."""

    work: dist.Work | _NotBegun
    worker: int | None


class ProcessGroupCommunicator(Communicator):
    """A communicator over a torch process group.

    Args:
        group: the process group.
        ranks: the rank of every worker within the group.
        timeout: the timeout of every wait; default: the group's.
        names: the number by which errors name each worker: its rank in the group that this one was split from.
        seconds: counts the time spent waiting.
    """

    # The timeout of groups whose connections must fail one by one: gloo closes all of them when a wait times out.
    _NEVER = timedelta(days=365)

    def __init__(
        self,
        group: dist.ProcessGroup,
        ranks: Sequence[int],
        *,
        timeout: timedelta = timedelta(0),
        names: Sequence[int] | None = None,
        seconds: Seconds | None = None,
    ) -> None:
        self.group = group
        self.ranks = tuple(ranks)
        self.worker = self.ranks.index(dist.get_rank(group))
        self.workers = len(self.ranks)
        self.root = self.ranks.index(0)
        self.seconds = Seconds() if seconds is None else seconds
        self._timeout = timeout
        self._names = self.ranks if names is None else tuple(names)
        # Tensors of the last collectives. A thread of gloo may still refer to them after the collective. If it held
        # the last reference, it would need Python's lock to free them, and would abort while Python shuts down.
        self._keepalive: deque[tuple[Tensor, ...]] = deque(maxlen=2)

    def all_gather(self, values: Tensor) -> Pending:
        """See `Communicator.all_gather`."""
        if _is_short(values):
            # Straight from everybody: gloo's ring sends as much, in n - 1 rounds that wait for each other.
            sent = values.expand(self.workers, *values.shape).contiguous()
            received = torch.empty_like(sent)
            begun: Any = dist.all_to_all_single(received, sent, group=self.group, async_op=True)
            pending = self._pending([_Operation(begun, None)], received, (sent,))
            return Pending(lambda: pending.wait()[list(self.ranks)])
        rows = values.new_empty((self.workers, *values.shape))
        by_rank = [rows[self.ranks.index(rank)] for rank in range(self.workers)]
        work = dist.all_gather(by_rank, values, group=self.group, async_op=True)
        return self._pending([_Operation(work, None)], rows, (values, *by_rank))

    def all_gather_p2p(self, values: Tensor, rows: Tensor) -> Pending:
        """See `Communicator.all_gather_p2p`."""
        rows[self.worker] = values
        return self._start_p2p(*parcels_for_all(self.worker, values, rows), rows)

    def all_reduce(self, values: Tensor, *, resume_on_next_bucket: bool = False) -> Pending:
        """See `Communicator.all_reduce`."""
        work = dist.all_reduce(values, group=self.group, async_op=True)
        return self._pending([_Operation(work, None)], values, (values,), resume_on_next_bucket=resume_on_next_bucket)

    def broadcast(self, values: Tensor, source: int) -> Pending:
        """See `Communicator.broadcast`."""
        work = dist.broadcast(values, group=self.group, group_src=self.ranks[source], async_op=True)
        return self._pending([_Operation(work, source)], values, (values,), resume_on_next_bucket=False)

    def send(self, values: Tensor, worker: int) -> None:
        """See `Communicator.send`."""
        self._start_p2p([(values, worker)], [], values).wait()

    def receive(self, values: Tensor, worker: int) -> None:
        """See `Communicator.receive`."""
        self._start_p2p([], [(values, worker)], values).wait()

    def exchange(self, leaving: Sequence[Addressed], arriving: Sequence[Addressed]) -> Pending:
        """See `Communicator.exchange`; short tensors for one worker go as one message."""
        sent, _ = _pack(leaving)
        received, joint = _pack(arriving)
        pending = self._start_p2p(sent, received, torch.empty(0))

        def wait() -> Tensor:
            result = pending.wait()
            for values, parts in joint:
                pieces = values.split_with_sizes([part.numel() for part in parts])
                for part, piece in zip(parts, pieces, strict=True):
                    part.copy_(piece)
            return result

        return Pending(wait)

    def connect(self, worker: int) -> Connection:
        """See `Communicator.connect`."""
        return _ProcessGroupConnection(self.group, self.ranks[worker])

    def split(self, parts: Sequence[Sequence[int]], *, extra_timeout: float | None = None) -> Communicator:
        """See `Communicator.split`."""
        ranks_of_parts = [[self.ranks[worker] for worker in part] for part in parts]
        if extra_timeout is None:
            group, timeout = divide(self.group, ranks_of_parts), timedelta(0)
        else:
            group = divide(self.group, ranks_of_parts, backend="gloo", timeout=self._NEVER)
            seconds = timeout_of(self.group).total_seconds() + extra_timeout
            timeout = timedelta(seconds=min(seconds, self._NEVER.total_seconds()))
        own = next(part for part in parts if self.worker in part)
        order = sorted(self.ranks[worker] for worker in own)  # the order of the ranks in the new group
        ranks = [order.index(self.ranks[worker]) for worker in own]
        names = [self._names[worker] for worker in own]
        return ProcessGroupCommunicator(group, ranks, timeout=timeout, names=names, seconds=self.seconds)

    def _start_p2p(self, leaving: Sequence[Addressed], arriving: Sequence[Addressed], result: Tensor) -> Pending:
        """Send tensors to workers and receive others, in turn, all at the same time; return the pending result."""
        pairs = itertools.zip_longest(leaving, arriving)
        in_turn = [
            (is_sent, *addressed)
            for pair in pairs
            for is_sent, addressed in zip((True, False), pair, strict=True)
            if addressed is not None
        ]
        others: list[int | None] = [other for _, _, other in in_turn]
        works = self._begin_p2p(in_turn)
        if len(works) < len(others):  # NCCL returns one work for all operations
            others = [None] * len(works)
        kept = (result, *(tensor for _, tensor, _ in in_turn))
        return self._pending(list(map(_Operation, works, others)), result, kept)

    def _begin_p2p(self, operations: Sequence[tuple[bool, Tensor, int]]) -> Sequence[dist.Work | _NotBegun]:
        """Begin to send and receive: whether it is sent, the tensor, and the other worker."""
        if any(_needs_batch(tensor) for _, tensor, _ in operations):
            ops = [
                dist.P2POp(
                    dist.isend if is_sent else dist.irecv,
                    tensor,
                    group=self.group,
                    group_peer=self.ranks[other],
                    tag=tag_of(tensor),
                )
                for is_sent, tensor, other in operations
            ]
            return dist.batch_isend_irecv(ops)
        works: list[dist.Work | _NotBegun] = []
        for is_sent, tensor, other in operations:
            # Not by dist.isend and dist.irecv: what they check again takes four times as long as a short message.
            begin = self.group.send if is_sent else self.group.recv
            try:
                works.append(begin([tensor], self.ranks[other], tag_of(tensor)))
            except RuntimeError as error:  # a closed connection; the others still get what they wait for
                works.append(_NotBegun(error))
        return works

    def _pending(
        self,
        operations: list[_Operation],
        result: Tensor,
        kept: tuple[Tensor, ...],
        *,
        resume_on_next_bucket: bool = True,
    ) -> Pending:
        def wait() -> Tensor:
            self._keepalive.append(kept)
            begin = time.perf_counter()
            for work, worker in operations:
                try:
                    work.wait(self._timeout)
                except RuntimeError as error:
                    other = "a rank" if worker is None else f"rank {self._names[worker]}"
                    raise RuntimeError(
                        f"{other} has died, hangs, or sends something of another length ({error})"
                    ) from error
            self.seconds.communicate += time.perf_counter() - begin
            return result

        return Pending(wait, resume_on_next_bucket=resume_on_next_bucket)


@dataclass(frozen=True)
class _ProcessGroupConnection(Connection):
    group: dist.ProcessGroup
    rank: int

    def start_send(self, values: Tensor) -> Callable[[], None]:
        work: Any = dist.isend(values, group=self.group, group_dst=self.rank, tag=tag_of(values))

        def wait() -> None:
            work.wait()

        return wait

    def receive(self, values: Tensor) -> None:
        dist.recv(values, group=self.group, group_src=self.rank, tag=tag_of(values))


def _pack(addressed: Sequence[Addressed]) -> tuple[list[Addressed], list[tuple[Tensor, list[Tensor]]]]:
    """Join the short tensors that go the same way.

    Returns:
        What is sent or received, and those messages among it that were joined, with the bytes of each tensor. Where
        what arrives is shorter, the rest of them stays as it was.
    """
    messages: list[Addressed] = []
    short: dict[int, list[Tensor]] = defaultdict(list)
    for tensor, worker in addressed:
        if _is_short(tensor):
            short[worker].append(tensor)
        else:
            messages.append((tensor, worker))
    joint = []
    for worker, tensors in short.items():
        if len(tensors) == 1:
            messages.append((tensors[0], worker))
        else:
            parts = [tensor.flatten().view(torch.uint8) for tensor in tensors]
            values = torch.cat(parts)
            messages.append((values, worker))
            joint.append((values, parts))
    return messages, joint


def _is_short(values: Tensor) -> bool:
    return not values.is_cuda and values.nbytes <= SHORT


def _needs_batch(values: Tensor) -> bool:
    """Return whether operations must begin in one batch, as NCCL wants it; gloo takes twice the time for that."""
    return values.is_cuda


def tag_of(values: Tensor) -> int:
    """Return the tag with which values are sent: their length in bytes.

    So a message is never received into a tensor of another length. Without tags, gloo leaves the end of the tensor
    unchanged if the message is shorter, and aborts the process if it is longer.
    """
    return values.numel() * values.element_size() % 2**31
