"""Gradients between parameters' ``.grad`` and the vectors of DDP's buckets: digests, hand-overs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from draco_ext import ops
from draco_ext.protocol.communicator import Communicator
from draco_ext.protocol.messages import GradientBuffer
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


def join_digests(digests: Sequence[Tensor], key: int) -> Tensor:
    """Return one digest (2,) of several."""
    return ops.digest(torch.cat(list(digests)).view(torch.uint8), key)


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


class GradientDigest:
    """Digests of the gradients that this rank computes in the passes of a step.

    In a rank's own pass they are taken from DDP's buckets, and in other passes from ``.grad``. DDP makes other buckets
    after the first pass, so a step digests either bucket by bucket or parameter by parameter.

    Args:
        parameters: the parameters in the same order on all ranks.
        device: the device of the results.

    Attributes:
        is_complete: whether all buckets of the own pass were seen.
        lengths: the lengths of the buckets if their statistics are taken.
    """

    def __init__(self, parameters: Sequence[Tensor], device: torch.device) -> None:
        self._parameters = parameters
        self._device = device
        self._numbers = {parameter: i for i, parameter in enumerate(parameters)}
        self._layout: dict[int, Sequence[Tensor]] = {}  # the parameters of each bucket
        self.begin_step(0, 0, by_parameter=True)
        for parameter in parameters:
            parameter.register_hook(self._hook(self._numbers[parameter], weakref.ref(parameter)))

    def begin_step(self, seed: int, step: int, *, by_parameter: bool) -> None:
        """Begin a step; its number and the seed make the key of digests."""
        words = torch.tensor([step], dtype=torch.int64).view(torch.uint8)
        self._key = int(ops.digest(words, seed)[0])
        self._by_parameter = by_parameter
        self.begin_own_pass()

    def begin_own_pass(self) -> None:
        """Forget the own pass before."""
        self.is_complete = False
        self._computed: dict[int, Tensor] = {}
        self._contributed: dict[int, Tensor] = {}
        self._statistics: dict[int, Tensor] = {}
        self._of_mini_batch: dict[int, Tensor] = {}
        self._watching = False

    def add(self, bucket: Bucket) -> None:
        """Add a bucket of the own pass, as it was computed."""
        buffer = bucket.buffer
        self.is_complete |= bucket.is_last
        self._layout[bucket.index] = buffer.keys  # type: ignore[assignment]
        if self._by_parameter:
            self._add_parameters(buffer, self._computed)
        else:
            digest, self._statistics[bucket.index] = digest_and_statistics(buffer.values, self._key)
            self._computed[bucket.index] = digest

    def add_gradients(self, contributed: Mapping[Tensor, Tensor]) -> None:
        """Add the gradients in ``.grad``, and those that this rank will contribute instead, of all parameters or none.

        Only for a step that digests parameter by parameter.
        """
        self.is_complete = any(parameter.grad is not None for parameter in self._parameters)
        for number, parameter in enumerate(self._parameters):
            self._computed[number] = ops.digest(flatten([parameter]), self._key)
            if contributed:
                self._contributed[number] = ops.digest(contributed[parameter].contiguous(), self._key)

    def add_contributed(self, bucket: Bucket) -> None:
        """Add a bucket with the gradients that this rank contributes instead of its own."""
        if self._by_parameter:
            self._add_parameters(bucket.buffer, self._contributed)
        else:
            self._contributed[bucket.index] = ops.digest(bucket.buffer.values, self._key)

    def watch_mini_batch(self, on: bool) -> None:
        """Say whether the gradients of the current mini-batch alone are digested, before they are added up."""
        self._watching = on

    def result(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the digests of what was computed, contributed, and of the watched mini-batch, and statistics.

        Returns:
            Three of shape (2,), int64; (buckets, 4) float64, see `opinions.Row`, without rows if they are not taken.
        """
        computed = self._join(self._computed)
        contributed = self._join(self._contributed) if self._contributed else computed
        rows = [self._statistics[i] for i in sorted(self._statistics)]
        statistics = torch.stack(rows) if rows else torch.zeros(0, 4, dtype=torch.float64, device=self._device)
        return computed, contributed, self._join_all(self._of_mini_batch), statistics.to(self._device)

    @property
    def lengths(self) -> list[int]:
        """Return the lengths of the buckets if their statistics are taken."""
        return [sum(p.numel() for p in self._layout[i]) for i in sorted(self._statistics)]

    def of_gradients(self) -> Tensor:
        """Return the digest (2,) of the gradients in ``.grad``, the same as an own pass has."""
        pieces = dict(enumerate([p] for p in self._parameters)) if self._by_parameter else self._layout
        return self._join({i: ops.digest(flatten(parameters), self._key) for i, parameters in pieces.items()})

    def of_gradients_by_parameter(self) -> Tensor:
        """Return the digest (2,) of the gradients in ``.grad``, the same as that of a watched mini-batch with them."""
        return self._join_all(
            {
                number: ops.digest(flatten([parameter]), self._key)
                for number, parameter in enumerate(self._parameters)
                if parameter.grad is not None
            }
        )

    def _add_parameters(self, buffer: GradientBuffer, digests: dict[int, Tensor]) -> None:
        for parameter, piece in zip(buffer.keys, buffer.values.split(list(buffer.lengths)), strict=True):
            digests[self._numbers[parameter]] = ops.digest(piece, self._key)  # type: ignore[index]

    def _join(self, digests: Mapping[int, Tensor]) -> Tensor:
        return join_digests([digests[i].to(self._device) for i in sorted(digests)], self._key)

    def _join_all(self, digests: Mapping[int, Tensor]) -> Tensor:
        """Join digests of parameters, where those without a gradient count, too."""
        none = torch.zeros(2, dtype=torch.int64, device=self._device)
        return self._join({i: digests.get(i, none) for i in range(len(self._parameters))})

    def _hook(self, number: int, parameter: weakref.ref[Tensor]) -> Callable[[Tensor], None]:
        """Return a hook that digests a parameter's gradient in a watched mini-batch."""
        this = weakref.ref(self)

        def digest(gradient: Tensor) -> None:
            self, place = this(), parameter()
            if self is not None and self._watching and place is not None:
                self._of_mini_batch[number] = ops.digest(flatten_one(gradient, place), self._key)

        return digest


def digest_and_statistics(values: Tensor, key: int) -> tuple[Tensor, Tensor]:
    """Return a vector's digest (2,), and its statistics (4,) float64; see `opinions.Row`."""
    double = values.double()
    finite = torch.where(double.isfinite(), double, 0)
    zeros, bad = (values == 0).sum().double(), (~double.isfinite()).sum().double()
    return ops.digest(values, key), torch.stack([(finite * finite).sum(), finite.abs().max(), bad, zeros])
