"""Gradients between parameters' ``.grad`` and the vectors of buckets: measures, hand-overs.

What buckets look like, the adapter of the training framework knows. It gives out the buckets of all passes, or of own
passes alone, and then flattens the gradients of others as it would put them into one. What a bucket consists of are
called pieces: parameters, or, where a module's gradients are reduced at once, tensors that stand for them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from draco_ext import ops
from draco_ext.protocol.communicator import Communicator
from draco_ext.training.adapter import AuditAdapter, Bucket
from draco_ext.training.audit import shipping
from draco_ext.training.audit.measures import Measure
from draco_ext.training.state import chunks

CHUNK = 2**24  # bytes; a hand-over sends so many at once, or one parameter

# Returns the gradients of some pieces as a bucket would have them; see `AuditAdapter.flatten_gradients`.
Flatten = Callable[[Sequence[Tensor]], Tensor]


@dataclass(frozen=True)
class PartResult:
    """The result of a pass over a part.

    Attributes:
        gradients: by piece, as vectors.
        used: see `StepRecord.reached`.
        buffers: the model's buffers after the pass, by name.
    """

    gradients: Mapping[Tensor, Tensor]
    used: bytes
    buffers: Mapping[str, Tensor]


def hand_over(
    pieces: Sequence[Tensor],
    flatten: Flatten,
    used: bytes,
    buffers: Mapping[str, Tensor],
    communicator: Communicator,
    worker: int,
    device: torch.device,
) -> None:
    """Send the result of a pass to one worker: the gradients, and what else `PartResult` has."""
    for chunk in chunks(pieces, CHUNK, lambda p: p.dtype):
        communicator.send(flatten(chunk).to(device), worker)
    rest = shipping.pack([torch.tensor(list(used), dtype=torch.uint8), dict(buffers)])
    shipping.send(rest, communicator, worker, device)


def take_over(
    pieces: Sequence[Tensor], communicator: Communicator, worker: int, device: torch.device, storage: torch.device
) -> PartResult:
    """Receive the result of a pass from one worker, and keep its gradients on the device `storage`."""
    received: dict[Tensor, Tensor] = {}
    for chunk in chunks(pieces, CHUNK, lambda p: p.dtype):
        lengths = [p.numel() for p in chunk]
        values = torch.empty(sum(lengths), dtype=chunk[0].dtype, device=device)
        communicator.receive(values, worker)
        received.update(zip(chunk, values.to(storage).split(lengths), strict=True))
    used, buffers = shipping.unpack(shipping.receive(communicator, worker, device), None, device)
    return PartResult(received, bytes(used.tolist()), buffers)


class GradientMeasure:
    """The measures of the gradients that this rank computes in the passes of a step.

    In a rank's own pass they are taken from buckets, and in other passes from the gradients that these leave, or from
    buckets, too. DDP makes other buckets after the first pass, so a step measures either bucket by bucket or piece by
    piece. Where bits are compared, a measure also covers what else a pass has left, the `rest`: which parameters are
    used, and the buffers.

    Args:
        adapter: gives the pieces in the same order on all ranks, and the gradients that passes leave.
        measure: measures a piece.

    Attributes:
        is_complete: whether all buckets of the own pass, or of another one that ends in buckets, were seen.
    """

    def __init__(self, adapter: AuditAdapter, measure: Measure) -> None:
        self._pieces = adapter.pieces()
        self._device = adapter.device
        self._measure = measure
        self._buckets_in_all_passes = adapter.buckets_in_all_passes
        self._flatten_gradients = adapter.flatten_gradients
        self._numbers = {piece: i for i, piece in enumerate(self._pieces)}
        self._layout: dict[int, Sequence[Tensor]] = {}  # the pieces of each bucket
        self.begin_step(0, 0, by_parameter=True)

    def begin_step(self, seed: int, step: int, *, by_parameter: bool) -> None:
        """Begin a step; its number and the seed make the key of measures."""
        words = torch.tensor([step], dtype=torch.int64).view(torch.uint8)
        self._key = int(ops.digest(words, seed)[0])
        self._by_parameter = by_parameter
        self.begin_own_pass(measured=False)

    def begin_other_pass(self, *, keep: bool) -> None:
        """Forget the pass before; `keep`: whether buckets are copied to the CPU, to be handed over after the pass."""
        self.is_complete = False
        self._keeps = keep
        self._other: dict[int, Tensor] = {}
        self._kept: dict[Tensor, Tensor] = {}

    def add_other(self, bucket: Bucket) -> None:
        """Add a bucket of a pass that is not the own one."""
        buffer = bucket.buffer
        self.is_complete |= bucket.is_last
        if not buffer.keys:
            return
        self._other[bucket.index] = self._of(buffer.values)
        if self._keeps:
            copies = buffer.values.to("cpu", copy=True).split(list(buffer.lengths))
            self._kept.update(zip(buffer.keys, copies, strict=True))  # type: ignore[arg-type]

    def flatten(self, pieces: Sequence[Tensor]) -> Tensor:
        """Return the gradients of some pieces in the last pass."""
        if self._buckets_in_all_passes:
            return torch.cat([self._kept[piece] for piece in pieces])
        return self._flatten_gradients(pieces)

    def begin_own_pass(self, *, measured: bool) -> None:
        """Forget the pass before; `measured`: whether others' opinions are compared with this one."""
        self.begin_other_pass(keep=False)
        self._measured = measured or self._measure.is_digest
        self._computed: dict[int, Tensor] = {}
        self._contributed: dict[int, Tensor] = {}
        self._statistics: dict[int, Tensor] = {}
        self._of_mini_batch = self._nothing()
        self._rests: tuple[Tensor, Tensor] | None = None

    def add(self, bucket: Bucket, *, factor: float | None = None) -> bool:
        """Add a bucket of the own pass, as it was computed.

        Args:
            bucket: the bucket.
            factor: what the bucket may be multiplied by afterwards, which costs least where it is read anyway.

        Returns:
            Whether the bucket was multiplied.
        """
        buffer = bucket.buffer
        self.is_complete |= bucket.is_last
        if not buffer.keys:
            return False
        if bucket.index == 0:
            self._layout = {}
        self._layout[bucket.index] = buffer.keys  # type: ignore[assignment]
        if not self._by_parameter:
            factor = factor if self._measure.is_digest else None
            digest, self._statistics[bucket.index] = digest_and_statistics(buffer.values, self._key, factor)
            if self._measure.is_digest:
                self._computed[bucket.index] = digest
                return factor is not None
        if self._measured:
            self._add(bucket, self._computed)
        return False

    def add_contributed(self, bucket: Bucket) -> None:
        """Add a bucket with the gradients that this rank contributes instead of its own."""
        if self._measured:
            self._add(bucket, self._contributed)

    def add_gradients(self, contributed: Mapping[Tensor, Tensor]) -> None:
        """Add the gradients in ``.grad``, and those that this rank will contribute instead, of all parameters or none.

        Only for a step that measures parameter by parameter.
        """
        self.is_complete = any(parameter.grad is not None for parameter in self._pieces)
        for number, parameter in enumerate(self._pieces):
            self._computed[number] = self._of(self.flatten([parameter]))
            if contributed:
                self._contributed[number] = self._of(contributed[parameter].contiguous())

    def add_first_mini_batch(self, rest: Tensor) -> None:
        """Measure the first mini-batch of several in the own pass, while ``.grad`` has its gradients alone."""
        self._of_mini_batch = self.of_gradients_by_parameter(rest)

    def end_own_pass(self, computed: Tensor, contributed: Tensor) -> None:
        """Add digests of the rest: of what was computed, and of what this rank contributes instead."""
        self._rests = computed, contributed

    def of_own_pass(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the measures of what was computed, contributed, and of the first mini-batch alone, on the device.

        The last is empty if it was not measured alone, and all are if the pass is not measured.
        """
        assert self._rests is not None
        computed, contributed = self._rests
        return (
            self._join(self._computed, computed),
            self._join(self._contributed or self._computed, contributed),
            self._of_mini_batch,
        )

    def statistics(self) -> Tensor:
        """Return statistics of the own pass, (buckets, 4) float64, see `opinions.Row`; no rows if none are taken."""
        rows = [self._statistics[i] for i in sorted(self._statistics)]
        return torch.stack(rows) if rows else torch.zeros(0, 4, dtype=torch.float64, device=self._device)

    @property
    def lengths(self) -> list[int]:
        """Return the lengths of the buckets if their statistics are taken."""
        return [_length(self._layout[i]) for i in sorted(self._statistics)]

    def of_other_pass(self, rest: Tensor) -> Tensor:
        """Return the measure of another pass's gradients, the same as an own pass has; `rest`: its digest."""
        if self._buckets_in_all_passes:
            return self._join(self._other, rest)
        divided = dict(enumerate([p] for p in self._pieces)) if self._by_parameter else self._layout
        return self._join({i: self._of(self.flatten(pieces)) for i, pieces in divided.items()}, rest)

    def of_gradients_by_parameter(self, rest: Tensor) -> Tensor:
        """Return the measure of the gradients in ``.grad`` parameter by parameter, with the digest of the rest."""
        pieces = {
            i: self._measure.of_nothing(p.numel()) if p.grad is None else self._of(self.flatten([p]))
            for i, p in enumerate(self._pieces)
        }
        return self._join(pieces, rest)

    def _of(self, values: Tensor) -> Tensor:
        return self._measure.of(values, self._key)

    def _add(self, bucket: Bucket, pieces: dict[int, Tensor]) -> None:
        buffer = bucket.buffer
        if not self._by_parameter:
            pieces[bucket.index] = self._of(buffer.values)
            return
        for parameter, values in zip(buffer.keys, buffer.values.split(list(buffer.lengths)), strict=True):
            pieces[self._numbers[parameter]] = self._of(values)  # type: ignore[index]

    def _join(self, pieces: Mapping[int, Tensor], rest: Tensor) -> Tensor:
        if not pieces:
            return self._nothing()
        joined = [pieces[i].to(self._device) for i in sorted(pieces)]
        if self._measure.is_digest:
            joined.append(rest)
        return self._measure.join(joined, self._key)

    def _nothing(self) -> Tensor:
        return torch.zeros(0, dtype=torch.int64, device=self._device)


def _length(parameters: Sequence[Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def digest_and_statistics(values: Tensor, key: int, factor: float | None = None) -> tuple[Tensor, Tensor]:
    """Return a vector's digest (2,), and its statistics (4,) float64; see `opinions.Row`.

    With a factor the vector is then multiplied by it, in place.
    """
    if factor is None:
        digest, tiles = ops.digest_and_stats(values, key)
    else:
        digest, tiles = ops.digest_stats_and_scale_(values, key, factor)
    if not len(tiles):  # a bucket without elements
        return digest, tiles.new_zeros(4)
    squares, largest, nonfinite, zeros = tiles.unbind(1)
    return digest, torch.stack([squares.sum(), largest.amax(), nonfinite.sum(), zeros.sum()])
