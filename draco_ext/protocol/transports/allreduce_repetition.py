"""All-reduce for codes whose messages are gradients: a vote on digests, then a sum with one member of each group."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import torch
from torch import Tensor

from draco_ext import ops
from draco_ext.codes import Code
from draco_ext.protocol.communicator import Communicator
from draco_ext.protocol.differences import Difference, difference, join, validate_reported
from draco_ext.protocol.exchange import Exchange, Gather, HostCopy, Steps
from draco_ext.protocol.keys import draw_key, key_of
from draco_ext.protocol.messages import ExchangeOutcome, Message, slice_length, slices
from draco_ext.protocol.transports.base import Transport

HONEST_COMMUNICATION = "allreduce: up to s ranks may compute anything wrong; what ranks send is not altered on the way."


class AllReduceRepetition(Transport):
    """An all-reduce in which each member of a group contributes one shard, and a vote on digests of the messages.

    The buffer is divided into as many shards as a group (the smallest one) has members. Each member is responsible for
    one shard: it adds it up with the corresponding members of the other groups, and broadcasts the sum to its own
    group. With m members and G groups a rank sends (2 (G - 1) / G + m - 1) / m times the buffer; a plain all-reduce
    sends nearly 2 times the buffer. With one group nothing is sent, and with s = 0 it is the plain all-reduce. The
    digest and a share in its key add 24 bytes per rank and buffer.

    Sums begin as soon as a message has its digest. The digests are read when all buffers have begun, so the host waits
    for the device once in a step. If a member is outvoted then, a member of the majority sends it the right message. It
    reports the difference, and the message's sum is made again. So the same member always contributes a shard, and the
    sum has the same bits as without faults. For this the message is kept: DistributedDataParallel has it in ``.grad``,
    but with gradient_as_bucket_view, and elsewhere, it is copied.
    """

    trust = HONEST_COMMUNICATION

    def __init__(self, code: Code, communicator: Communicator, **tolerance: float) -> None:
        super().__init__(code, communicator, **tolerance)
        self._groups = code.decoding_groups
        self._shards = min(map(len, self._groups))
        self._own = next(members for members in self._groups if communicator.worker in members)
        self._shard = self._own.index(communicator.worker)  # this worker's shard, if it is less than _shards
        # A shard is all-reduced in its ring (one worker of each group), then broadcast in the circle (the group).
        self._ring: Communicator | None = None
        self._circle: Communicator | None = None
        if len(self._groups) == 1:
            return
        if self._shards == 1:
            self._ring = communicator
            return
        self._circle = communicator.split(self._groups)
        rings = [[members[shard] for members in self._groups] for shard in range(self._shards)]
        spare = [j for members in self._groups for j in members[self._shards :]]
        ring = communicator.split([workers for workers in (*rings, spare) if workers])
        if self._shard < self._shards:
            self._ring = ring

    def _exchange(self, message: Message, number: int) -> Exchange:
        """Digest and add up the messages; then vote, and where somebody is outvoted, repair and add up again."""
        if self.code.adversaries == 0:  # groups of one
            yield from self._add_up(message)
            return ExchangeOutcome({}, False)
        values = message.values
        key = key_of((yield (yield draw_key(self.communicator, values.device))))
        own = ops.digest(values, key)[0]
        gathered = yield Gather(self.communicator, own)
        message_again = message.keep() if len(self._groups) > 1 else lambda: values
        yield from self._add_up(message)
        rows = yield HostCopy((yield gathered))
        digests = [tuple(row) for row in rows.tolist()]
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
            message.buffer.values.fill_(torch.nan)
            return ExchangeOutcome(dict.fromkeys(suspects), True)
        if not suspects:
            return ExchangeOutcome({}, False)
        again = replace(message, values=message_again())
        if ops.digest(again.values, key)[0].tolist() != rows[self.communicator.worker].tolist():
            raise RuntimeError("gradients were changed while they were exchanged")
        found = self._repair_suspects(again.values, suspects, helpers)
        yield from self._add_up(again)
        return ExchangeOutcome(found, False)

    def _add_up(self, message: Message) -> Steps[None]:
        """Write the mean over the groups into the buffer; all members of a group have the same message."""
        if len(self._groups) == 1:
            message.write(message.values)
            return
        shards = message.buffer.values.tensor_split(self._shards)
        if self._ring is not None:
            own_shard = shards[self._shard]
            if not message.buffer_holds_scaled_values:
                # Scaled exactly as DDP does it, so that the result has the same bits.
                torch.mul(message.values.tensor_split(self._shards)[self._shard], 1 / self.code.parts, out=own_shard)
            yield self._ring.all_reduce(own_shard, resume_on_next_bucket=self._circle is not None)
        if self._circle is not None:
            arriving = [self._circle.broadcast(shard, i) for i, shard in enumerate(shards)]
            while arriving:
                yield arriving.pop(0)

    def _repair_suspects(
        self, values: Tensor, suspects: list[int], helpers: dict[int, int]
    ) -> dict[int, Difference | None]:
        """Replace every suspect's message by the right one, in place; return how each differed."""
        communicator = self.communicator
        own: Difference | None = Difference(0, 0, 0.0)
        for j in suspects:
            if communicator.worker == helpers[j]:
                for piece in slices(values):
                    communicator.send(piece, j)
            elif communicator.worker == j:
                found = []
                for piece in slices(values):
                    right = torch.empty_like(piece)
                    communicator.receive(right, helpers[j])
                    found.append(difference(piece, right))
                    piece.copy_(right)
                length = slice_length(values.dtype)
                own = join([(i * length, part) for i, part in enumerate(found)])
        assert own is not None
        reported = torch.tensor([own.elements, own.first, own.largest], dtype=torch.float64, device=values.device)
        rows = communicator.all_gather(reported).wait().tolist()
        return {j: validate_reported(*rows[j], length=values.numel()) for j in suspects}
