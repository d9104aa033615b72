"""All-gather of the messages: every rank decodes all of them."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace

from torch import Tensor

from draco_ext.codes import Code
from draco_ext.protocol.communicator import Communicator, Pending, parcels_for_all
from draco_ext.protocol.exchange import Exchange, HostCopy, RecordExchange, Swap, Turn
from draco_ext.protocol.keys import SharedSeed
from draco_ext.protocol.messages import (
    SLICE,
    ExchangeOutcome,
    MemoryPool,
    Message,
    finish_slices,
    read_records,
    slice_length,
    slices,
    write_truncation_sentinel,
)
from draco_ext.protocol.transports.base import Transport

# Bytes of a rank's messages that may be in flight at a time.
WINDOW = 4 * SLICE


@dataclass
class _Slice:
    """A slice of a message: this rank's values, and the rows that receive all workers' values once it is sent."""

    values: Tensor
    rows: Tensor | None = None
    messages: Pending | None = None
    share: bytes = b""
    commitments: Pending | None = None

    @property
    def size(self) -> int:
        return self.values.numel() * self.values.element_size()


class AllGather(Transport):
    """A transport in which every rank collects all messages and decodes them, slice by slice.

    It sends every message from its rank to every other. For each of its own slices in flight a rank holds n slices: at
    most `WINDOW` bytes of each worker's messages. It keeps this memory between steps.

    A decoder that needs random numbers gets the same ones on all ranks, since they decide which errors near the noise
    floor are noticed. They are drawn by commit and reveal when the messages have arrived. A rank that does not reveal
    the share to which it has committed is a suspect, and its message is an erasure.
    """

    trust = (
        "verified: up to s ranks may compute and send anything; a rank must send the same message to all, "
        "and nobody else is trusted."
    )

    def __init__(self, code: Code, communicator: Communicator, **tolerance: float) -> None:
        super().__init__(code, communicator, **tolerance)
        self._seed = SharedSeed(communicator) if code.uses_projections else None
        self.abort()

    def abort(self) -> None:
        """See `Transport.abort`."""
        self._unsent: deque[_Slice] = deque()  # slices of all buffers, in order
        self._under_way = 0  # bytes
        self._rows = MemoryPool()  # for everybody's slices

    def _exchange(self, message: Message, number: int) -> Exchange:
        """Gather and decode the slices in order, while the next ones arrive."""
        own = [_Slice(values) for values in slices(message.values)]
        self._unsent.extend(own)
        self._send()
        yield Turn.EARLIER_EXCHANGES_FIRST
        outcomes = []
        for each in own:
            outcomes.append(self._decode(each))
            self._send()
        return finish_slices(message, outcomes, slice_length(message.values.dtype))

    def gather_record(self, record: Tensor) -> RecordExchange:
        """Gather the records straight from each rank; see `Transport.gather_record`."""
        own = self.communicator.worker
        rows = write_truncation_sentinel(record.new_zeros(self.code.workers, record.numel()))
        rows[own] = record
        yield (yield Swap(self.communicator, *parcels_for_all(own, record, rows)))
        return read_records((yield HostCopy(rows)))

    def _send(self) -> None:
        while self._unsent and (not self._under_way or self._under_way + self._unsent[0].size <= WINDOW):
            each = self._unsent.popleft()
            self._under_way += each.size
            each.rows = write_truncation_sentinel(self._rows.take_rows(self.code.workers, each.values))
            if self._seed is not None:
                each.share, each.commitments = self._seed.commit(each.values.device)
            each.messages = self.communicator.all_gather_p2p(each.values, each.rows)

    def _decode(self, each: _Slice) -> ExchangeOutcome:
        assert each.messages is not None
        rows = each.messages.wait()
        seed, liars = None, list[int]()
        if self._seed is not None and each.commitments is not None:
            seed, liars = self._seed.reveal(each.share, each.commitments)
        outcome = self._decode_rows(rows, each.values, liars, seed)
        self._under_way -= each.size
        self._rows.give_back(rows)
        each.rows = each.messages = None
        left_out = tuple(sorted({*outcome.left_out, *liars}))
        return replace(outcome, suspects=outcome.suspects | dict.fromkeys(liars), left_out=left_out)
