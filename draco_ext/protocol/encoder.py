"""From the gradients in DistributedDataParallel's buckets to this rank's messages."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from draco_ext import ops
from draco_ext.codes import Code, CyclicCode
from draco_ext.protocol.transports.base import Message

PORTION = 2**17  # elements; even


class GradientEncoder:
    """Adds the gradients of a step's parts up into messages, bucket by bucket, as the backward passes yield them.

    The repetition code's message is the bucket itself. The cyclic code's needs two buffers of the gradient's size, kept
    from step to step, in which every parameter is padded to an even length: the sums, and what rounding has left of
    them.

    Args:
        code: the code.
        worker: the worker that this rank is.
        ready: the last part also leaves the message / workers in the bucket, where an all-reduce makes it the mean.
    """

    def __init__(self, code: Code, worker: int, *, ready: bool) -> None:
        self._code = code
        self._ready = ready
        self._worker = worker
        self._parts = code.assignment(worker)
        # Of each parameter: DDP makes other buckets after its first pass, which may be in the middle of a step.
        self._sums: dict[Tensor, Tensor] = {}
        self._carries: dict[Tensor, Tensor] = {}

    def add(self, bucket: dist.GradBucket, part: int) -> None:
        """Adds the gradients of this rank's `part`-th part; the first begins a message, the last completes it."""
        if not isinstance(self._code, CyclicCode):
            return
        parameters = bucket.parameters()
        pieces = bucket.buffer().split([p.numel() for p in parameters])
        if part == 0 and _joined(parameters, self._sums) is None:
            padded = [self._code.message_length(p.numel()) for p in parameters]
            for kept in (self._sums, self._carries):
                rooms = bucket.buffer().new_empty(sum(padded)).split(padded)
                kept.update(zip(parameters, rooms, strict=True))
        ready = self._ready and part == len(self._parts) - 1
        for parameter, piece in zip(parameters, pieces, strict=True):
            # By portions, so that the second operation finds in the cache what the first has read and written.
            sums, carries = self._sums[parameter], self._carries[parameter]
            portion = PORTION if ready and piece.device.type == "cpu" else max(1, sums.numel())
            portions = (vector.split(portion) for vector in (sums, carries, piece))
            for total, carry, gradient in zip(*portions, strict=True):
                ops.cyclic_encode_add_(
                    total,
                    carry,
                    gradient,
                    self._code.workers,
                    self._code.adversaries,
                    self._worker,
                    self._parts[part],
                    first=part == 0,
                )
                if ready:
                    torch.mul(total[: gradient.numel()], 1 / self._code.workers, out=gradient)

    def message(self, bucket: dist.GradBucket) -> Message:
        """This rank's message for a bucket, to be used up before the next step."""
        buffer, parameters = bucket.buffer(), bucket.parameters()
        values = buffer
        if isinstance(self._code, CyclicCode):
            values = _joined(parameters, self._sums)
            if values is None:
                values = torch.cat([self._sums[parameter] for parameter in parameters])
        return Message(values, buffer, tuple(p.numel() for p in parameters), self._ready)


def _joined(parameters: list[Tensor], sums: dict[Tensor, Tensor]) -> Tensor | None:
    """The sums of these parameters as one vector, where they lie one behind the other."""
    pieces = [sums.get(parameter) for parameter in parameters]
    first = pieces[0]
    if first is None:
        return None
    end = first.storage_offset()
    for piece in pieces:
        if (
            piece is None
            or piece.storage_offset() != end
            or piece.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()
        ):
            return None
        end += piece.numel()
    return first.as_strided((end - first.storage_offset(),), (1,))
