"""The encoder: computes this rank's messages from the gradients of a step's parts."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from draco_ext.codes import Code
from draco_ext.protocol.messages import GradientBuffer, Message

CHUNK = 2**17  # elements; even


class GradientEncoder:
    """An encoder of messages, which takes the gradients of a step's parts buffer by buffer during backward passes.

    If the code's message is the gradient itself, the message is the buffer. Otherwise the encoder keeps two vectors of
    the message's size from step to step: the weighted sums and their rounding errors. In both of them every parameter
    is padded to an even length.

    Args:
        code: the code.
        worker: this rank's worker number.
        scale_into_buffer: after the last part, also write message / workers into the buffer, from which an all-reduce
            makes the mean.
    """

    def __init__(self, code: Code, worker: int, *, scale_into_buffer: bool) -> None:
        self._code = code
        self._scale_into_buffer = scale_into_buffer
        self._worker = worker
        # By parameter, since DDP may divide them into other buckets after the first pass, in the middle of a step.
        self._sums: dict[Hashable, Tensor] = {}
        self._carries: dict[Hashable, Tensor] = {}

    def add(self, buffer: GradientBuffer, parts: Sequence[int], index: int) -> None:
        """Add one part's gradients to the messages.

        Args:
            buffer: the gradients.
            parts: the parts that this rank computes in this step.
            index: the index of this part among them; the first begins a message, the last completes it.
        """
        if self._code.message_is_gradient:
            return
        gradients = buffer.values.split(list(buffer.lengths))
        if index == 0 and _joined(buffer.keys, self._sums) is None:
            padded = [self._code.message_length(length) for length in buffer.lengths]
            for kept in (self._sums, self._carries):
                vectors = buffer.values.new_empty(sum(padded)).split(padded)
                kept.update(zip(buffer.keys, vectors, strict=True))
        scale = self._scale_into_buffer and index == len(parts) - 1
        for key, gradient in zip(buffer.keys, gradients, strict=True):
            # In chunks, so that the data of the first operation are still in the cache for the second.
            sums, carries = self._sums[key], self._carries[key]
            chunk = CHUNK if scale and gradient.device.type == "cpu" else max(1, gradient.numel())
            chunks = (vector.split(chunk + chunk % 2) for vector in (sums, carries, gradient))
            for total, carry, values in zip(*chunks, strict=True):
                self._code.encode_add_(total, carry, values, self._worker, parts[index], first=index == 0)
                if scale:
                    torch.mul(total[: values.numel()], 1 / self._code.workers, out=values)

    def message(self, buffer: GradientBuffer) -> Message:
        """Return this rank's message for a buffer; it is valid until the next step."""
        if self._code.message_is_gradient:
            return Message(buffer.values, buffer)
        values = _joined(buffer.keys, self._sums)
        if values is None:
            values = torch.cat([self._sums[key] for key in buffer.keys])
        return Message(values, buffer, self._scale_into_buffer, self._code.blocks)


def _joined(keys: Sequence[Hashable], sums: dict[Hashable, Tensor]) -> Tensor | None:
    """Return the sums of these parameters as one vector if they are adjacent in memory, else None."""
    vectors = [sums[key] for key in keys if key in sums]
    if len(vectors) < len(keys):
        return None
    first = vectors[0]
    end = first.storage_offset()
    for vector in vectors:
        if vector.storage_offset() != end or vector.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
            return None
        end += vector.numel()
    return first.as_strided((end - first.storage_offset(),), (1,))
