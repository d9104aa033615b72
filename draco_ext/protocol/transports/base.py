"""The base class of transports."""

from __future__ import annotations

import abc
from collections.abc import Collection
from typing import ClassVar

import torch
from torch import Tensor

from draco_ext.codes import Code, Decoded
from draco_ext.protocol.communicator import Communicator
from draco_ext.protocol.differences import Difference, difference
from draco_ext.protocol.exchange import Exchange, Gather, HostCopy, RecordExchange
from draco_ext.protocol.messages import ExchangeOutcome, Message, reject_truncated, workers_in


class Transport(abc.ABC):
    """A way to exchange messages and decode them.

    All calls are collective: every rank makes the same calls in the same order.

    Attributes:
        trust: who must be honest for the guarantee to hold, in one sentence.
        needs_scaled_values: whether `exchange` expects the message / workers in the buffer.
        is_served: whether one trusted rank decodes for all ranks; otherwise every rank decides by itself.
    """

    trust: ClassVar[str]
    needs_scaled_values: ClassVar[bool] = False
    is_served: ClassVar[bool] = False

    def __init__(self, code: Code, communicator: Communicator, *, atol: float = 0.0, rtol: float = 0.0) -> None:
        self.code = code
        self.communicator = communicator
        self.atol = atol
        self.rtol = rtol

    def exchange(self, message: Message, number: int) -> Exchange:
        """Send this rank's message and decode all workers' messages.

        Args:
            message: its values and its buffer may be overwritten; at the end the buffer holds the decoded gradient.
            number: the number of this exchange, the same on all ranks and never used before.
        """
        if message.values.numel() == 0:
            return ExchangeOutcome({}, False)  # nothing to send
        return (yield from self._exchange(message, number))

    @abc.abstractmethod
    def _exchange(self, message: Message, number: int) -> Exchange:
        """Exchange a message that has elements; see `exchange`."""

    def gather_record(self, record: Tensor) -> RecordExchange:
        """Gather all workers' records, which are a few numbers about a step.

        Records are not decoded: a bad rank's record may contain anything.

        Args:
            record: (len,) int64, of the same length on all ranks, on the device of the messages.

        Returns:
            (workers, len) int64 on the CPU, row j from worker j, and the workers whose record is missing or truncated;
            their rows are 0. The result is the same on all ranks if each rank sends the same record to all.
        """
        return (yield HostCopy((yield (yield Gather(self.communicator, record))))), ()

    def abort(self) -> None:  # noqa: B027 (most transports have nothing to forget)
        """Forget the exchanges of an aborted step."""

    def _decode_rows(
        self, rows: Tensor, out: Tensor, missing: Collection[int] = (), seed: int | None = None
    ) -> ExchangeOutcome:
        """Decode all workers' messages, or slices of them.

        Args:
            rows: row j from worker j, with truncation sentinels.
            out: the vector that the gradient is written into.
            missing: workers whose rows are ignored.
            seed: the seed of the decoder's random numbers; default: one from the operating system.

        Returns:
            The outcome.
        """
        mask = torch.zeros(self.code.workers, dtype=torch.bool, device=rows.device)
        mask[list(missing)] = True
        reject_truncated(rows, mask)
        decoded = self.code.decode(
            rows, missing=mask if missing else None, seed=seed, atol=self.atol, rtol=self.rtol, out=out
        )
        suspects = _differences(rows, decoded, missing)
        return ExchangeOutcome(suspects, bool(decoded.failed), left_out=workers_in(decoded.left_out))


def _differences(rows: Tensor, decoded: Decoded, missing: Collection[int] = ()) -> dict[int, Difference | None]:
    """Return the suspects among decoded messages, each with the difference if another worker sent the right message."""
    code = decoded.code
    suspects = workers_in(decoded.suspects)
    if not suspects or decoded.failed or not code.message_is_gradient:
        return dict.fromkeys(suspects)
    good = {code.assignment(j): j for j in range(code.workers) if j not in suspects and j not in missing}
    return {j: difference(rows[j], rows[good[code.assignment(j)]]) for j in suspects}
