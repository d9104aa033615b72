"""Gradients between parameters' ``.grad`` and the vectors of DDP's buckets: measures, hand-overs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from draco_ext import ops
from draco_ext.protocol.communicator import Communicator
from draco_ext.training.audit.measures import Bits, Measure
from draco_ext.training.ddp import Bucket, as_parameter

CHUNK = 2**24  # bytes; a hand-over sends so many at once, or one parameter


def flatten(parameters: Sequence[Tensor]) -> Tensor:
    """Return the gradients of some parameters as DDP would put them into a bucket; 0 where there is none."""
    first = parameters[0]
    values = torch.empty(sum(p.numel() for p in parameters), dtype=first.dtype, device=first.device)
    for piece, parameter in zip(values.split([p.numel() for p in parameters]), parameters, strict=True):
        if parameter.grad is None:
            piece.zero_()
        else:
            as_parameter(piece, parameter).copy_(parameter.grad)
    return values


def flatten_one(gradient: Tensor, parameter: Tensor) -> Tensor:
    """Return a parameter's gradient as a vector, as DDP would put it into a bucket."""
    values = torch.empty(parameter.numel(), dtype=gradient.dtype, device=gradient.device)
    as_parameter(values, parameter).copy_(gradient)
    return values


def hand_over(parameters: Sequence[Tensor], communicator: Communicator, worker: int) -> None:
    """Send the gradients that stand in ``.grad`` to one worker."""
    for chunk in _chunks(parameters):
        communicator.send(flatten(chunk), worker)


def take_over(parameters: Sequence[Tensor], communicator: Communicator, worker: int) -> dict[Tensor, Tensor]:
    """Receive gradients from one worker; return them by parameter, as vectors."""
    received: dict[Tensor, Tensor] = {}
    for chunk in _chunks(parameters):
        lengths = [p.numel() for p in chunk]
        values = torch.empty(sum(lengths), dtype=chunk[0].dtype, device=chunk[0].device)
        communicator.receive(values, worker)
        received.update(zip(chunk, values.split(lengths), strict=True))
    return received


def _chunks(parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Divide parameters into lists of one dtype, each with few bytes or a single parameter."""
    chunk: list[Tensor] = []
    length = 0
    for parameter in parameters:
        size = parameter.numel() * parameter.element_size()
        if chunk and (length + size > CHUNK or parameter.dtype != chunk[0].dtype):
            yield chunk
            chunk, length = [], 0
        chunk.append(parameter)
        length += size
    if chunk:
        yield chunk


class GradientMeasure:
    """The measures of the gradients that this rank computes in the passes of a step.

    In a rank's own pass they are taken from DDP's buckets, and in other passes from ``.grad``. DDP makes other buckets
    after the first pass, so a step measures either bucket by bucket or parameter by parameter.

    Args:
        parameters: the parameters in the same order on all ranks.
        device: the device of the results.
        measure: measures a piece.

    Attributes:
        is_complete: whether all buckets of the own pass were seen.
    """

    def __init__(self, parameters: Sequence[Tensor], device: torch.device, measure: Measure) -> None:
        self._parameters = parameters
        self._device = device
        self._measure = measure
        self._numbers = {parameter: i for i, parameter in enumerate(parameters)}
        self._layout: dict[int, Sequence[Tensor]] = {}  # the parameters of each bucket
        self.begin_step(0, 0, by_parameter=True)
        for parameter in parameters:
            parameter.register_hook(self._hook(self._numbers[parameter], weakref.ref(parameter)))

    def begin_step(self, seed: int, step: int, *, by_parameter: bool) -> None:
        """Begin a step; its number and the seed make the key of measures."""
        words = torch.tensor([step], dtype=torch.int64).view(torch.uint8)
        self._key = int(ops.digest(words, seed)[0])
        self._by_parameter = by_parameter
        self.begin_own_pass(measured=False)

    def begin_own_pass(self, *, measured: bool) -> None:
        """Forget the own pass before; `measured`: whether others' opinions are compared with this one."""
        self.is_complete = False
        self._measured = measured or self._measure.always
        self._computed: dict[int, Tensor] = {}
        self._contributed: dict[int, Tensor] = {}
        self._statistics: dict[int, Tensor] = {}
        self._of_mini_batch: dict[int, Tensor] = {}
        self._watching = self._has_watched = False

    def add(self, bucket: Bucket) -> None:
        """Add a bucket of the own pass, as it was computed."""
        buffer = bucket.buffer
        self.is_complete |= bucket.is_last
        self._layout[bucket.index] = buffer.keys  # type: ignore[assignment]
        if not self._by_parameter:
            digest, self._statistics[bucket.index] = digest_and_statistics(buffer.values, self._key)
            if isinstance(self._measure, Bits):
                self._computed[bucket.index] = digest
                return
        if self._measured:
            self._add(bucket, self._computed)

    def add_contributed(self, bucket: Bucket) -> None:
        """Add a bucket with the gradients that this rank contributes instead of its own."""
        if self._measured:
            self._add(bucket, self._contributed)

    def add_gradients(self, contributed: Mapping[Tensor, Tensor]) -> None:
        """Add the gradients in ``.grad``, and those that this rank will contribute instead, of all parameters or none.

        Only for a step that measures parameter by parameter.
        """
        self.is_complete = any(parameter.grad is not None for parameter in self._parameters)
        for number, parameter in enumerate(self._parameters):
            self._computed[number] = self._of(flatten([parameter]))
            if contributed:
                self._contributed[number] = self._of(contributed[parameter].contiguous())

    def watch_mini_batch(self, on: bool) -> None:
        """Say whether the gradients of the current mini-batch alone are measured, before they are added up."""
        self._watching = on
        self._has_watched |= on

    def of_own_pass(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the measures of what was computed, contributed, and of the watched mini-batch, on the device.

        The last is empty if no mini-batch was watched, and all are if the pass is not measured.
        """
        computed = self._join(self._computed)
        contributed = self._join(self._contributed) if self._contributed else computed
        of_mini_batch = self._join_all(self._of_mini_batch) if self._has_watched else self._nothing()
        return computed, contributed, of_mini_batch

    def statistics(self) -> Tensor:
        """Return statistics of the own pass, (buckets, 4) float64, see `opinions.Row`; no rows if none are taken."""
        rows = [self._statistics[i] for i in sorted(self._statistics)]
        return torch.stack(rows) if rows else torch.zeros(0, 4, dtype=torch.float64, device=self._device)

    @property
    def lengths(self) -> list[int]:
        """Return the lengths of the buckets if their statistics are taken."""
        return [_length(self._layout[i]) for i in sorted(self._statistics)]

    def of_gradients(self) -> Tensor:
        """Return the measure of the gradients in ``.grad``, the same as an own pass has."""
        pieces = dict(enumerate([p] for p in self._parameters)) if self._by_parameter else self._layout
        return self._join({i: self._of(flatten(parameters)) for i, parameters in pieces.items()})

    def of_gradients_by_parameter(self) -> Tensor:
        """Return the measure of the gradients in ``.grad``, the same as that of a watched mini-batch with them."""
        return self._join_all({i: self._of(flatten([p])) for i, p in enumerate(self._parameters) if p.grad is not None})

    def _of(self, values: Tensor) -> Tensor:
        return self._measure.of(values, self._key)

    def _add(self, bucket: Bucket, pieces: dict[int, Tensor]) -> None:
        buffer = bucket.buffer
        if not self._by_parameter:
            pieces[bucket.index] = self._of(buffer.values)
            return
        for parameter, values in zip(buffer.keys, buffer.values.split(list(buffer.lengths)), strict=True):
            pieces[self._numbers[parameter]] = self._of(values)  # type: ignore[index]

    def _join(self, pieces: Mapping[int, Tensor]) -> Tensor:
        if not pieces:
            return self._nothing()
        return self._measure.join([pieces[i].to(self._device) for i in sorted(pieces)], self._key)

    def _join_all(self, pieces: Mapping[int, Tensor]) -> Tensor:
        """Join the measures of parameters, where those without a gradient count, too."""
        lengths = [parameter.numel() for parameter in self._parameters]
        return self._join({i: pieces.get(i, self._measure.of_nothing(length)) for i, length in enumerate(lengths)})

    def _nothing(self) -> Tensor:
        return torch.zeros(0, dtype=torch.int64, device=self._device)

    def _hook(self, number: int, parameter: weakref.ref[Tensor]) -> Callable[[Tensor], None]:
        """Return a hook that measures a parameter's gradient in a watched mini-batch."""
        this = weakref.ref(self)

        def measure(gradient: Tensor) -> None:
            self, place = this(), parameter()
            if self is not None and self._watching and place is not None:
                self._of_mini_batch[number] = self._of(flatten_one(gradient, place))

        return measure


def _length(parameters: Sequence[Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def digest_and_statistics(values: Tensor, key: int) -> tuple[Tensor, Tensor]:
    """Return a vector's digest (2,), and its statistics (4,) float64; see `opinions.Row`."""
    double = values.double()
    finite = torch.where(double.isfinite(), double, 0)
    zeros, bad = (values == 0).sum().double(), (~double.isfinite()).sum().double()
    return ops.digest(values, key), torch.stack([(finite * finite).sum(), finite.abs().max(), bad, zeros])
