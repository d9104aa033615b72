"""The collectives that the protocol uses, over a torch process group; `draco_ext.testing` has one within a process."""

from __future__ import annotations

import abc
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor

from draco_ext.protocol.groups import divide, timeout_of
from draco_ext.reporting.report import Seconds


class Pending:
    """An asynchronous collective and its result.

    Attributes:
        resume_on_next_bucket: whether its exchange goes on when the next bucket begins, or not before all have begun.
    """

    def __init__(self, wait: Callable[[], Tensor], *, resume_on_next_bucket: bool = True) -> None:
        self.resume_on_next_bucket = resume_on_next_bucket
        self._wait = wait

    def wait(self) -> Tensor:
        """Wait for the collective and return its result.

        Raises:
            RuntimeError: a rank has died, hangs, or sends something of another length.
        """
        return self._wait()


class Connection(abc.ABC):
    """A connection to one worker, for a thread of its own: it waits without end, and nobody counts the time."""

    @abc.abstractmethod
    def send(self, values: Tensor) -> None:
        """Send values, and wait until they have left.

        Raises:
            RuntimeError: the connection is closed.
        """

    @abc.abstractmethod
    def receive(self, values: Tensor) -> None:
        """Receive values, in place, and wait for them.

        Raises:
            RuntimeError: the connection is closed.
        """


class Communicator(abc.ABC):
    """The workers of a code, as seen by one of them.

    All collectives are called by all workers in the same order. Tensors that are being sent or received must not be
    touched until the collective is waited for.

    Attributes:
        worker: the worker that this rank is.
        workers: how many there are.
        root: the worker that is rank 0.
        seconds: where this rank's time goes; shared with the communicators split from this one.
    """

    worker: int
    workers: int
    root: int
    seconds: Seconds

    @abc.abstractmethod
    def all_gather(self, values: Tensor) -> Pending:
        """Gather everybody's values, (workers, *values.shape), row j from worker j."""

    @abc.abstractmethod
    def all_gather_p2p(self, values: Tensor, rows: Tensor) -> Pending:
        """Gather everybody's values into `rows`, each straight from its worker: no other can alter them on the way."""

    @abc.abstractmethod
    def all_reduce(self, values: Tensor, *, resume_on_next_bucket: bool = False) -> Pending:
        """Add everybody's values up, in place."""

    @abc.abstractmethod
    def broadcast(self, values: Tensor, source: int) -> Pending:
        """Send one worker's values to all others, in place; the exchange resumes when all buckets have begun."""

    @abc.abstractmethod
    def send(self, values: Tensor, worker: int) -> None:
        """Send values to one worker, and wait until they have left."""

    @abc.abstractmethod
    def receive(self, values: Tensor, worker: int) -> None:
        """Receive values from one worker, in place, and wait for them."""

    @abc.abstractmethod
    def connect(self, worker: int) -> Connection:
        """Return the connection to one worker, for a thread of its own."""

    @abc.abstractmethod
    def split(self, parts: Sequence[Sequence[int]], *, extra_timeout: float | None = None) -> Communicator:
        """Split the workers into parts, each with connections of its own; all workers call it with the same parts.

        Args:
            parts: workers, each of them in exactly one part.
            extra_timeout: seconds added to the timeout, over connections that stand between two ranks each, so that
                one that breaks is one rank's; default: connections like this communicator's.

        Returns:
            The communicator of the part that this worker is in, which numbers its workers in the order of the part.
        """


class _Operation(NamedTuple):
    """A started operation, and the worker at its other end where there is only one."""

    work: dist.Work
    worker: int | None


class ProcessGroupCommunicator(Communicator):
    """A communicator over a torch process group.

    Args:
        group: the process group.
        ranks: the rank within the group of every worker.
        timeout: of every wait; default: the group's.
        names: what errors call the workers: their ranks within the group that this one was split from.
        seconds: where waiting is counted.
    """

    # Of connections that break only one by one: gloo would take all of them down when a wait ends early.
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
        # Tensors of the last collectives. A thread of gloo may still refer to them after it is done; were its reference
        # the last, it would need Python's lock, and abort where Python is ending.
        self._keepalive: deque[tuple[Tensor, ...]] = deque(maxlen=2)

    def all_gather(self, values: Tensor) -> Pending:
        """See `Communicator.all_gather`."""
        rows = values.new_empty((self.workers, *values.shape))
        by_rank = [rows[self.ranks.index(rank)] for rank in range(self.workers)]
        work = dist.all_gather(by_rank, values, group=self.group, async_op=True)
        return self._pending([_Operation(work, None)], rows, (values, *by_rank))

    def all_gather_p2p(self, values: Tensor, rows: Tensor) -> Pending:
        """See `Communicator.all_gather_p2p`."""
        own, n = self.worker, self.workers
        rows[own] = values
        operations: list[dist.P2POp] = []
        others: list[int | None] = []
        for distance in range(1, n):
            to, source = (own + distance) % n, (own - distance) % n
            for op, tensor, other in (dist.isend, values, to), (dist.irecv, rows[source], source):
                peer, tag = self.ranks[other], tag_of(tensor)
                operations.append(dist.P2POp(op, tensor, group=self.group, group_peer=peer, tag=tag))
                others.append(other)
        works = dist.batch_isend_irecv(operations) if operations else []
        if len(works) < len(operations):  # NCCL gives one for all
            others = [None] * len(works)
        kept = (values, rows, *(operation.tensor for operation in operations))
        return self._pending(list(map(_Operation, works, others)), rows, kept)

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
        work: Any = dist.isend(values, group=self.group, group_dst=self.ranks[worker], tag=tag_of(values))
        self._pending([_Operation(work, worker)], values, (values,)).wait()

    def receive(self, values: Tensor, worker: int) -> None:
        """See `Communicator.receive`."""
        work: Any = dist.irecv(values, group=self.group, group_src=self.ranks[worker], tag=tag_of(values))
        self._pending([_Operation(work, worker)], values, (values,)).wait()

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
        order = sorted(self.ranks[worker] for worker in own)  # of the new group's ranks
        ranks = [order.index(self.ranks[worker]) for worker in own]
        names = [self._names[worker] for worker in own]
        return ProcessGroupCommunicator(group, ranks, timeout=timeout, names=names, seconds=self.seconds)

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

    def send(self, values: Tensor) -> None:
        dist.send(values, group=self.group, group_dst=self.rank, tag=tag_of(values))

    def receive(self, values: Tensor) -> None:
        dist.recv(values, group=self.group, group_src=self.rank, tag=tag_of(values))


def tag_of(values: Tensor) -> int:
    """Return the tag under which values are sent: their length.

    A message of another length so never meets the room made for it. Without tags gloo leaves the end of the room as it
    was, or aborts the process where the message is longer.
    """
    return values.numel() * values.element_size() % 2**31
