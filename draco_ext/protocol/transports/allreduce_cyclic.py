"""All-reduce for codes with projections: the sum of the messages, and a check of their projections."""

from __future__ import annotations

import torch

from draco_ext.protocol.exchange import Exchange, Gather, HostCopy
from draco_ext.protocol.keys import draw_key, key_of
from draco_ext.protocol.messages import ExchangeOutcome, Message, slices, workers_in
from draco_ext.protocol.transports.allreduce_repetition import HONEST_COMMUNICATION
from draco_ext.protocol.transports.base import Transport


class AllReduceCyclic(Transport):
    """All-reduce of the messages, whose sum is the result, with a check of their projections.

    Besides the traffic of a plain all-reduce it sends the projections (40 bytes for every 32768 elements and rank) and
    8 bytes per rank and buffer. Only if the check fails, the messages are all-reduced again, with weights.
    """

    trust = HONEST_COMMUNICATION
    needs_scaled_values = True

    def _exchange(self, message: Message, number: int) -> Exchange:
        """Add up the messages while the projections are gathered; if their check fails, add up with weights."""
        code, communicator, values = self.code, self.communicator, message.values
        buffer = message.buffer.values
        # The projection must not be known before all messages are made.
        drawn = yield draw_key(communicator, values.device)
        if not message.buffer_holds_scaled_values:
            message.write(values, 1 / code.workers)
        total = communicator.all_reduce(buffer)
        key = key_of((yield drawn))
        projections, norms = code.project(values[None], key)
        own = torch.cat([torch.view_as_real(projections[0]).flatten(), norms[0]])
        rows = yield (yield Gather(communicator, own))
        pairs, norms = (half.contiguous() for half in rows.tensor_split([2 * projections.numel()], dim=1))
        gathered = torch.view_as_complex(pairs.view(code.workers, *projections.shape[1:], 2))
        weights, suspects, failed = code.locate(
            gathered, norms, values.numel(), dtype=values.dtype, atol=self.atol, rtol=self.rtol
        )
        yield total
        flags = torch.stack([suspects, weights == 0, weights.isnan(), failed.expand_as(suspects)])
        suspects, absent, unknown, failed = yield HostCopy(flags)
        found, left_out = workers_in(suspects), workers_in(absent)
        if failed.any() or unknown.any():
            buffer.fill_(torch.nan)
        elif left_out:
            if absent[communicator.worker]:
                buffer.zero_()
            else:
                for piece in slices(values):
                    piece.copy_(code.combine(piece[None], weights[communicator.worker, None]))
                message.write(values)
            yield communicator.all_reduce(buffer)
        return ExchangeOutcome(dict.fromkeys(found), bool(failed.any()), left_out=left_out)
