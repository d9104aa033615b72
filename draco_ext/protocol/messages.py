"""Gradient buffers, messages and their slices, and the outcome of an exchange."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from draco_ext.ops import message_length
from draco_ext.protocol.differences import BITS, Difference, join

# Bytes of a slice; messages are gathered and decoded slice by slice. A multiple of the decoder's tile for every dtype.
SLICE = 2**22


@dataclass(frozen=True)
class GradientBuffer:
    """The gradients of some parameters in one vector, which a training framework reduces at once.

    Attributes:
        values: (d,), contiguous. The decoded gradient is written here.
        lengths: the length of each parameter's gradient; they add up to d.
        keys: a key for each parameter, the same in every step, although the parameters may be in other buffers then.
        name: the name that errors give it.
        restore: writes the gradients that this rank has computed into `values` again, where they are also elsewhere;
            None: they are not.
    """

    values: Tensor
    lengths: tuple[int, ...]
    keys: tuple[Hashable, ...]
    name: str
    restore: Callable[[], None] | None = None


@dataclass(frozen=True)
class Message:
    """The message that this rank sends for one buffer.

    Attributes:
        values: the message. In a cyclic code's message every parameter is padded to blocks of an even length.
        buffer: the buffer that receives the decoded gradient; the repetition code's message may share its memory.
        buffer_holds_scaled_values: whether the buffer already holds `values` / workers.
        blocks: the number of blocks of each parameter's gradient, if it is so many times longer than its message.
    """

    values: Tensor
    buffer: GradientBuffer
    buffer_holds_scaled_values: bool = False
    blocks: int = 1

    def keep(self) -> Callable[[], Tensor]:
        """Keep the message while the buffer is overwritten.

        Returns:
            A function that returns the message again, perhaps in the buffer. Where they share memory, it needs a copy
            of the message, unless the buffer can be restored.
        """
        values, buffer = self.values, self.buffer
        if values.untyped_storage().data_ptr() != buffer.values.untyped_storage().data_ptr():
            return lambda: values
        restore = buffer.restore
        if restore is None:
            copy = values.clone()
            return lambda: copy

        def restored() -> Tensor:
            restore()
            return values

        return restored

    def write(self, values: Tensor, factor: float = 1.0) -> Tensor:
        """Write `values` times a factor into the buffer; return the buffer.

        Args:
            values: (blocks, length of the message) or, with one block, (length of the message,).
            factor: the factor.
        """
        target, blocks = self.buffer.values, self.blocks
        if blocks == 1 and values.numel() == target.numel():
            pairs = [(values, target)]
        else:
            lengths = self.buffer.lengths
            sources = values.view(blocks, -1).split([message_length(length, blocks) for length in lengths], dim=1)
            pairs = [
                (row[: piece.numel()], piece)
                for source, place in zip(sources, target.split(list(lengths)), strict=True)
                for row, piece in zip(source, place.split(max(1, source.size(1))), strict=False)
            ]
        for source, place in pairs:
            if factor != 1:
                torch.mul(source, factor, out=place)
            elif source.data_ptr() != place.data_ptr():
                place.copy_(source)
        return target


@dataclass(frozen=True)
class ExchangeOutcome:
    """The outcome of exchanging the messages for one buffer.

    Attributes:
        suspects: workers whose messages were wrong, each with the difference if the right message is known.
        failed: whether too many messages are wrong or missing for the code's guarantee.
        missing: workers whose messages did not come in time.
        left_out: workers whose messages the gradient does not contain, suspects included. It may be empty for the
            repetition code, which leaves out suspects only.
    """

    suspects: dict[int, Difference | None]
    failed: bool
    missing: tuple[int, ...] = ()
    left_out: tuple[int, ...] = ()

    @property
    def is_clean(self) -> bool:
        """Return whether every worker's message is in the gradient."""
        return not (self.failed or self.suspects or self.missing or self.left_out)


def slice_length(dtype: torch.dtype) -> int:
    """Return the number of elements in a slice of a message."""
    return SLICE // dtype.itemsize


def slices(values: Tensor) -> tuple[Tensor, ...]:
    """Return views of a message's slices."""
    return torch.split(values, slice_length(values.dtype))


def room_for_results(message: Message, parts: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return a vector for the decoded gradient of each slice: the slice itself, or a longer one of several blocks."""
    if message.blocks == 1:
        return parts
    return [part.new_empty(message.blocks * part.numel()) for part in parts]


def finish_slices(
    message: Message, outcomes: Sequence[ExchangeOutcome], length: int, results: Sequence[Tensor] | None = None
) -> ExchangeOutcome:
    """Write the decoded gradient into a message's buffer; return the outcome of all slices.

    If one slice failed, the buffer failed.

    Args:
        message: the message.
        outcomes: the outcome of each slice.
        length: the number of elements in a slice.
        results: the decoded gradient of each slice; default: the message's values have become it.
    """
    failed = any(outcome.failed for outcome in outcomes)
    if failed:
        message.buffer.values.fill_(torch.nan)
    else:
        values = message.values
        if results is not None and message.blocks > 1:
            values = torch.cat([result.view(message.blocks, -1) for result in results], dim=1)
        message.write(values)
    found: dict[int, list[tuple[int, Difference | None]]] = {}
    for i, outcome in enumerate(outcomes):
        for j, difference in outcome.suspects.items():
            found.setdefault(j, []).append((i * length, difference))
    suspects = {j: join(parts) for j, parts in sorted(found.items())}
    missing = sorted({j for outcome in outcomes for j in outcome.missing})
    left_out = sorted({j for outcome in outcomes for j in outcome.left_out})
    return ExchangeOutcome(suspects, failed, tuple(missing), tuple(left_out))


class MemoryPool:
    """A pool of the memory that messages arrive in: new memory costs as much as a decode."""

    def __init__(self) -> None:
        self._free: list[Tensor] = []  # bytes

    def take(self, length: int, like: Tensor) -> Tensor:
        """Return a vector of so many elements, of a tensor's dtype and on its device; what it holds is not defined."""
        size = length * like.element_size()
        values = self._free.pop() if self._free else None
        if values is None or values.numel() < size:
            values = torch.empty(size, dtype=torch.uint8, device=like.device)
        return values[:size].view(like.dtype)

    def take_rows(self, count: int, like: Tensor) -> Tensor:
        """Return rows (count, len(like)); see `take`."""
        return self.take(count * like.numel(), like).view(count, -1)

    def give_back(self, values: Tensor) -> None:
        """Take a vector or rows back that are not used any more."""
        self._free.append(values.view(-1).view(torch.uint8))


def workers_in(mask: Tensor) -> tuple[int, ...]:
    """Return the workers whose entry in a mask is not 0."""
    return tuple(mask.nonzero().flatten().tolist())


# Before a message is received, a sentinel is written to the end of its row. If it is still there afterwards, the
# message was too short, and the rest of the row may differ between ranks.


def write_truncation_sentinel(rows: Tensor) -> Tensor:
    """Write the sentinel to the end of each row (or of the only one) before messages arrive; return the rows."""
    rows.view(BITS[rows.element_size()])[..., -1:] = _sentinel(rows.dtype)
    return rows


def reject_truncated(rows: Tensor, missing: Tensor) -> None:
    """Overwrite with NaN the rows of messages that were too short."""
    short = _is_truncated(rows) & ~missing
    if short.any():
        rows[short] = torch.nan


def read_records(rows: Tensor, missing: Collection[int] = ()) -> tuple[Tensor, tuple[int, ...]]:
    """Return the result of `Transport.gather_record` from rows with sentinels; truncated records count as missing."""
    rows = rows.cpu()
    absent = _is_truncated(rows)
    absent[list(missing)] = True
    rows[absent] = 0
    return rows, tuple(absent.nonzero().flatten().tolist())


def _is_truncated(rows: Tensor) -> Tensor:
    return (rows.view(BITS[rows.element_size()])[:, -1:] == _sentinel(rows.dtype)).any(1)


def _sentinel(dtype: torch.dtype) -> int:
    """Return the bits of a NaN that no arithmetic makes; a digest equals them with a probability of 2^-64."""
    dtype = torch.float64 if dtype == torch.int64 else dtype
    infinity = torch.tensor([torch.inf], dtype=dtype)
    return int(infinity.view(BITS[infinity.element_size()])) + 42
