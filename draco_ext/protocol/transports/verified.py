"""A verified all-reduce for codes whose messages are gradients: nobody is trusted, and it sends less than a ring."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from draco_ext import ops
from draco_ext.codes import Code, groups_by_worker
from draco_ext.protocol.communicator import Communicator, Parcels
from draco_ext.protocol.delivery import Delivery, Known, more_than
from draco_ext.protocol.differences import Difference, join, validate_reported
from draco_ext.protocol.exchange import Exchange, RecordExchange, Steps, Swap
from draco_ext.protocol.keys import ChainedKeys
from draco_ext.protocol.messages import ExchangeOutcome, MemoryPool, Message
from draco_ext.protocol.transports.allgather import AllGather
from draco_ext.protocol.transports.base import Transport

# Messages of at most so many bytes go to all ranks whole: for them waiting costs more than bytes.
SMALL = 2**16


class VerifiedAllReduce(Transport):
    """An all-reduce in which every rank verifies everything that it receives, and whose sum nobody can change.

    With G groups the buffer is divided into G shards, and group c is the committee of shard c. Each phase delivers one
    vector of every group to ranks; see `Delivery`:

    1. Scatter: every member of committee c gets shard c of each group's message. It adds them up in the order of the
       groups, so honest members have the same bits.
    2. Hand round: every rank gets the sums of all committees.

    Members of a group have the same message, so each sends only its piece of it. A rank with groups of m members sends
    2 (n - m) / n times the buffer, where a plain all-reduce sends 2 (n - 1) / n times; with one group it sends only
    digests. It needs memory for the shards of the other groups, of (G - 1) / G times the buffer's size, while the first
    phase is under way, and keeps it for the next.
    """

    trust = (
        "verified: of each group up to s ranks may compute and send anything, to every rank something else; nobody is "
        "trusted."
    )

    def __init__(self, code: Code, communicator: Communicator) -> None:
        super().__init__(code, communicator)
        self._groups = code.decoding_groups
        self._group_of = groups_by_worker(self._groups)
        self._small = AllGather(code, communicator)
        self._rows = MemoryPool()  # for the shards of all groups

    def abort(self) -> None:
        """See `Transport.abort`."""
        self._small.abort()
        self._rows = MemoryPool()

    def gather_record(self, record: Tensor) -> RecordExchange:
        """Gather the records straight from each rank; see `Transport.gather_record`."""
        return self._small.gather_record(record)

    def _exchange(self, message: Message, number: int) -> Exchange:
        """Scatter, add up, hand round, and put together what ranks have found."""
        values, target = message.values, message.buffer.values
        if values.numel() * values.element_size() <= SMALL:
            return (yield from self._small.exchange(message, number))
        groups = self._groups
        if len(groups) == 1:
            scatter = last = yield from self._compare_copies(message)
        else:
            scatter, last = yield from self._scatter_and_hand_round(message)
        own = self._group_of[self.communicator.worker]
        begin = sum(shard.numel() for shard in values.tensor_split(len(groups))[:own])
        found: dict[int, Difference | None] = dict.fromkeys(last.wrong)  # what is wrong with a sum is not of interest
        for worker, parts in scatter.wrong.items():
            found[worker] = join([(begin + at, part) for at, part in parts]) if parts else None
        suspects = self._merge(found, last.announcements, values)
        if last.failed or more_than(self.code.adversaries, last.failing, groups):
            target.fill_(torch.nan)
            return ExchangeOutcome(suspects, True)
        # Who says that too many are wrong, or that it does not have its own message, is wrong.
        suspects = dict.fromkeys(scatter.failing | last.failing) | suspects
        return ExchangeOutcome(dict(sorted(suspects.items())), False)

    def _compare_copies(self, message: Message) -> Steps[Delivery]:
        """Verify a message of which every rank has its own copy."""
        values = message.values
        delivery = self._delivery(lambda worker: values, [values])
        keys = ChainedKeys(self.communicator, 1, values.device)
        yield (yield self._swap(keys.show()))
        keys.read()
        yield (yield self._swap(keys.show()))
        yield from self._verify(delivery, keys.read())
        message.write(values)
        return delivery

    def _scatter_and_hand_round(self, message: Message) -> Steps[tuple[Delivery, Delivery]]:
        """Deliver shards to committees, and sums to all, in six rounds of messages.

        Sums leave together with the answers that verify what they were made from. A rank that has got wrong shards gets
        the right ones later, and adds up again. It says so when it answers for its sum, and nobody judges the one that
        it has sent. Sums arrive in the message's place, to which the message is written again where it is still needed.
        """
        groups, own = self._groups, self._group_of[self.communicator.worker]
        shards = message.values.tensor_split(len(groups))
        sums = message.buffer.values.tensor_split(len(groups))
        rows = self._rows.take_rows(len(groups) - 1, shards[own])
        held = [*rows[:own], shards[own], *rows[own:]]
        scatter = self._delivery(lambda worker: shards[self._group_of[worker]], held)
        last = self._delivery(lambda worker: sums[own], sums, announced=scatter.wrong.keys())
        keys = ChainedKeys(self.communicator, 2, rows.device)

        yield (yield self._swap(scatter.pieces(), keys.show()))
        keys.read()
        yield (yield self._swap(keys.show()))
        answers = scatter.answer(keys.read())
        message_again = message.keep()
        ops.vector_mean(held, out=sums[own])
        arrived = yield self._swap(answers, last.pieces())
        scatter.prepare()
        yield arrived
        scatter.compare()
        is_late = not scatter.is_verified
        yield (yield self._swap(scatter.tell(), keys.show()))
        is_unsettled = scatter.hear()
        last.late = scatter.verifiers
        if is_unsettled:
            arrived_sums = [shard.clone() for shard in sums]
            if (again := message_again()) is not message.values:
                message.values.copy_(again)
            scatter.settle()
            if is_late and not scatter.failed:
                arrived_sums[own] = ops.vector_mean(held, out=arrived_sums[own])
            for shard, arrived_sum in zip(sums, arrived_sums, strict=True):
                shard.copy_(arrived_sum)
        self._rows.give_back(rows)
        if is_late:
            last.known = Known.NO if scatter.failed else Known.LATE
        yield from self._verify(last, keys.read())
        return scatter, last

    def _verify(self, delivery: Delivery, key: int) -> Steps[None]:
        """Verify what has arrived under a key that is known now, and settle what is wrong."""
        answered = yield self._swap(delivery.answer(key))
        delivery.prepare()
        yield answered
        delivery.compare()
        yield (yield self._swap(delivery.tell()))
        if delivery.hear():
            delivery.settle()

    def _delivery(self, serve: Callable[[int], Tensor], held: Sequence[Tensor], **options: Any) -> Delivery:
        return Delivery(self.communicator, self._groups, self.code.adversaries, serve, held, **options)

    def _swap(self, *parcels: Parcels) -> Swap:
        leaving, arriving = (list(itertools.chain(*side)) for side in zip(*parcels, strict=True))
        return Swap(self.communicator, leaving, arriving)

    def _merge(
        self, own: Mapping[int, Difference | None], announcements: Mapping[int, int], values: Tensor
    ) -> dict[int, Difference | None]:
        """Tell the other ranks what this one has found wrong, and add what they have.

        A worker is a suspect if this rank has found it wrong itself, or if more than s members of one group say so, of
        whom one is honest. So those to whom it has lied name it, and all others if these are enough.

        Args:
            own: the workers that this rank has found wrong, each with the difference if it is known.
            announcements: how many workers each other worker has found wrong; see `Delivery.announcements`.
            values: a message.

        Returns:
            The suspects. Each has the differences that the members of each group have found in the group's shard.
        """
        workers = {j: count for j, count in announcements.items() if count > 0}
        if not own and not workers:
            return {}
        table = [
            (j, -1.0, 0.0, 0.0) if found is None else (j, found.elements, found.first, found.largest)
            for j, found in own.items()
        ]
        sent = torch.tensor(table, dtype=torch.float64, device=values.device)
        received = {j: sent.new_zeros(count, 4) for j, count in workers.items()}
        others = [j for j in range(self.code.workers) if j != self.communicator.worker]
        self.communicator.exchange(
            [(sent, j) for j in others] if own else [], [(rows, j) for j, rows in received.items()]
        ).wait()
        claims: dict[int, dict[int, Difference | None]] = {j: {} for j in range(self.code.workers)}
        for teller, rows in (received | {self.communicator.worker: sent}).items():
            for worker, *numbers in rows.tolist():
                if worker in claims and worker != teller:
                    claims[int(worker)][teller] = validate_reported(*numbers, length=values.numel())
        suspects: dict[int, Difference | None] = {}
        for worker, claimed in claims.items():
            if worker in own or more_than(self.code.adversaries, claimed.keys(), self._groups):
                suspects[worker] = self._difference(claimed)
        return suspects

    def _difference(self, claimed: Mapping[int, Difference | None]) -> Difference | None:
        """Return a suspect's difference in all shards, given what other workers say of the shard of their group."""
        parts = []
        for members in self._groups:
            known = [found for j in members if (found := claimed.get(j)) is not None]
            if known:
                parts.append((0, max(known, key=lambda found: found.elements)))
        return join(parts) if parts else None
