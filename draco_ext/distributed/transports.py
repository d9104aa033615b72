"""How messages travel between the ranks, and which of them are trusted.

A transport takes this rank's message for one bucket and gives the decoded gradient, the same bits on all ranks, with
the verdict. All calls are collective: every rank makes the same ones in the same order.
"""

from __future__ import annotations

import abc
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from draco_ext import ops
from draco_ext.codes import Code, Decoded, RepetitionCode, decode


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
        gradient: mean over the parts, of the message's length; NaN everywhere if `failed`.
        suspects: workers whose messages were wrong, each with the difference where the right message is known.
        failed: the code's guarantee does not cover what came in.
        missing: workers whose messages did not come in time.
    """

    gradient: Tensor
    suspects: dict[int, Difference | None]
    failed: bool
    missing: tuple[int, ...] = ()


@dataclass(frozen=True)
class Peers:
    """The ranks of a process group as a code's workers.

    Attributes:
        group: the process group.
        code: the code.
        worker: the worker that this rank is.
        ranks: of every worker, its rank within the group.
        key: of the digests, the same on all ranks and new in every run.
        held: tensors of the exchange that runs or was the last. A thread of gloo may still refer to them after it is
            done; were its reference the last, it would need Python's lock, and abort where Python is ending.
    """

    group: dist.ProcessGroup
    code: Code
    worker: int
    ranks: tuple[int, ...]
    key: int
    held: list[Tensor] = field(default_factory=list)

    def gather(self, values: Tensor) -> Tensor:
        """Everybody's values, (workers, *values.shape), row j from worker j."""
        rows = values.new_empty((self.code.workers, *values.shape))
        by_rank = [rows[self.ranks.index(rank)] for rank in range(self.code.workers)]
        self.held.extend((values, *by_rank))
        dist.all_gather(by_rank, values, group=self.group)
        return rows

    def sum(self, values: Tensor) -> None:
        """Everybody's values added up, in place."""
        self.held.append(values)
        dist.all_reduce(values, group=self.group)

    def send(self, values: Tensor, worker: int) -> None:
        """To one worker."""
        self.held.append(values)
        dist.send(values, group=self.group, group_dst=self.ranks[worker])

    def receive(self, values: Tensor, worker: int) -> None:
        """From one worker, in place."""
        self.held.append(values)
        dist.recv(values, group=self.group, group_src=self.ranks[worker])


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

    def exchange(self, message: Tensor, number: int) -> Outcome:
        """Sends this rank's message and decodes everybody's.

        Args:
            message: contiguous vector; may be overwritten.
            number: of this exchange, the same on all ranks, never used before.
        """
        self.peers.held.clear()
        return self._exchange(message, number)

    @abc.abstractmethod
    def _exchange(self, message: Tensor, number: int) -> Outcome: ...


class AllGather(Transport):
    """Every rank collects all messages and decodes by itself. Moves n messages to every rank, holds n x d elements."""

    trust = (
        "allgather: up to s ranks may compute and send anything; a rank must send the same message to all, "
        "and nobody else is trusted."
    )

    def _exchange(self, message: Tensor, number: int) -> Outcome:
        rows = self.peers.gather(message)
        decoded = decode(rows, self.code, **self.tolerance)
        return Outcome(decoded.gradient, differences(rows, decoded), bool(decoded.failed))


class AllReduceRepetition(Transport):
    """All-reduce in which one member of each group contributes, after a vote on digests of the messages.

    Moves what a plain all-reduce moves and 16 bytes per rank and bucket; holds nothing of the size of a message. A
    member that is outvoted is sent the right message by one of the majority, and tells what differed; so whoever
    contributes for a group is always the same member, with the same bits.
    """

    trust = "allreduce: up to s ranks may compute anything wrong; what ranks send is not altered on the way."

    def _exchange(self, message: Tensor, number: int) -> Outcome:
        code, peers = self.code, self.peers
        digests = [tuple(row) for row in peers.gather(ops.digest(message, peers.key + number)).tolist()]
        first_of_group, suspects, helpers, failed = [], [], {}, False
        begin = 0
        for size in code.group_sizes:
            members = range(begin, begin + size)
            first_of_group.append(begin)
            begin += size
            winner, votes = Counter(digests[j] for j in members).most_common(1)[0]
            failed |= votes < size - code.adversaries
            helper = next(j for j in members if digests[j] == winner)
            for j in members:
                if digests[j] != winner:
                    suspects.append(j)
                    helpers[j] = helper
        if failed:
            return Outcome(message.fill_(torch.nan), dict.fromkeys(suspects), True)
        found = self._hand_over(message, suspects, helpers)
        if peers.worker in first_of_group:
            message.mul_(1 / code.parts)  # as DDP does, to the last bit
        else:
            message.zero_()
        peers.sum(message)
        return Outcome(message, found, False)

    def _hand_over(self, message: Tensor, suspects: list[int], helpers: dict[int, int]) -> dict[int, Difference | None]:
        """Gives every suspect the message that it should have had; in place."""
        if not suspects:
            return {}
        peers, own = self.peers, Difference(0, 0, 0.0)
        for j in suspects:
            if peers.worker == helpers[j]:
                peers.send(message, j)
            elif peers.worker == j:
                right = torch.empty_like(message)
                peers.receive(right, helpers[j])
                own = difference(message, right)
                message.copy_(right)
        told = torch.tensor([own.elements, own.first, own.largest], dtype=torch.float64, device=message.device)
        rows = peers.gather(told).tolist()
        return {j: Difference(int(rows[j][0]), int(rows[j][1]), rows[j][2]) for j in suspects}


class AllReduceCyclic(Transport):
    """All-reduce of the messages, whose plain sum is the answer, and a check of their projections.

    Moves what a plain all-reduce moves and the projections, 32 bytes for every 32768 elements and rank; holds one more
    message. Only where the projections object, the messages are all-reduced again, with weights.
    """

    trust = AllReduceRepetition.trust

    def _exchange(self, message: Tensor, number: int) -> Outcome:
        code, peers = self.code, self.peers
        n, length = code.workers, message.numel()
        total = message.clone()
        peers.sum(total)
        # The projection must not be known before all messages are in; what came of them, everybody has.
        seed = int(ops.digest(total, peers.key + number)[0])
        projections, energy = ops.cyclic_project(message[None], seed)
        gathered = peers.gather(torch.view_as_real(projections[0]))
        energies = peers.gather(energy[0])
        weights, suspects, failed = ops.cyclic_locate(
            torch.view_as_complex(gathered), energies, code.adversaries, length, dtype=message.dtype, **self.tolerance
        )
        found = suspects.nonzero().flatten().tolist()
        if failed or weights.isnan().any():
            return Outcome(total.fill_(torch.nan), dict.fromkeys(found), bool(failed))
        if not found:
            return Outcome(total.div_(n), {}, False)
        own = ops.cyclic_combine(message[None], weights[peers.worker, None]) if peers.worker not in found else None
        total = torch.zeros_like(message) if own is None else own
        peers.sum(total)
        return Outcome(total, dict.fromkeys(found), False)


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
