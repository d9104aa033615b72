"""The interface of a code, and `decode`."""

from __future__ import annotations

import abc
import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from draco_ext import _checks


class DecodingError(RuntimeError):
    """The code's guarantee does not cover the messages that came in."""


@dataclass(frozen=True)
class Decoded:
    """The result of `decode`.

    Attributes:
        gradient: (d,), the messages' dtype and device: mean (or sum) over the parts. NaN everywhere if `failed`.
        suspects: (n,) bool: the workers whose messages were certainly wrong, and left out; never missing ones. With the
            cyclic code errors near the noise may be left out with nobody named: others could have caused them as well.
        failed: () bool: the code's guarantee does not cover what came in, the gradient must not be used.
        left_out: (n,) bool: all whose messages the gradient does not contain, suspects included, missing ones not. Who
            is left out again and again, without being a suspect, probably is bad.
        code: the code that was decoded.
        bounded: the gradient is a robust mean of the parts' and not their mean, so only as good as the second stage of
            the code says (`Code.bounded`), even if nobody is bad.
    """

    gradient: Tensor
    suspects: Tensor
    failed: Tensor
    left_out: Tensor
    code: Code
    bounded: bool = False

    def raise_if_failed(self) -> Decoded:
        """Return self, or raise DecodingError. Waits for the device to finish decoding."""
        if not self.failed:
            return self
        named = self.suspects.nonzero().flatten().tolist()
        if self.bounded:
            raise DecodingError(
                f"no gradient: more parts have no majority among their workers than {self.code!r} can do without "
                f"({self.code.corruptible} of {self.code.parts}); workers that differ from the majority of another "
                f"part: {named}"
            )
        raise DecodingError(
            f"no gradient: more of the {self.code.workers} workers are bad or missing than {self.code!r} can correct "
            f"({self.code.adversaries} bad, or {2 * self.code.adversaries} missing); {len(named)} worker(s) differ "
            f"from what can be reconstructed: {named}"
        )


@dataclass(frozen=True)
class Code(abc.ABC):
    """A code: the assignment of a batch's parts to workers, their messages, and the decoding of these.

    A subclass defines `dtypes`, `parts`, `assignment`, `message_length`, `encode`, `encode_add_`, `decode` and
    `error_bound`. All else follows from these, or is an optional property of the code that lets others treat it better.

    Args:
        workers: n.
        adversaries: s, how many workers may be bad; 2 * s + 1 <= n.

    Attributes:
        dtypes: the dtypes that messages may have.
        message_is_gradient: a worker has one part, and its message is that part's gradient, bit for bit. Workers of a
            group in `replica_groups` then send the same bits.
        exact: the decoded gradient has the bits of the honest one, whatever computes it. Otherwise decoding rounds, and
            machines with other instruction sets may round differently.
        uses_projections: bad messages are found by random projections. `decode` then uses its `seed`, and `project`,
            `locate` and `combine` do its work in steps, for ranks that have only some of the messages.
        sliceable: the same columns of all messages are decoded to these columns of the gradient. Transports need it.

    Raises:
        TypeError: an argument is not an int.
        ValueError: s < 0 or n < 2 * s + 1.
    """

    workers: int
    adversaries: int

    dtypes: ClassVar[tuple[torch.dtype, ...]]
    message_is_gradient: ClassVar[bool] = False
    exact: ClassVar[bool] = False
    uses_projections: ClassVar[bool] = False
    sliceable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _checks.check_workers(self.workers, self.adversaries)

    # ------------------------------------------------------------------------------------------ who computes what

    @property
    def redundancy(self) -> int:
        """The number of workers that compute each part: 2s+1, or at least 2s+1 if groups are uneven."""
        return 2 * self.adversaries + 1

    @property
    def blocks(self) -> int:
        """The number of blocks that a gradient is cut into; messages are so many times shorter than it."""
        return 1

    @property
    @abc.abstractmethod
    def parts(self) -> int:
        """The number of parts of a batch."""

    @abc.abstractmethod
    def assignment(self, worker: int) -> tuple[int, ...]:
        """Return the parts of this worker, in the order in which `encode` takes their gradients."""

    def parts_in_step(self, step: int, worker: int) -> tuple[int, ...]:
        """Return the parts that this worker computes in a step, in order.

        Training asks this anew in every step. A code with a fixed assignment answers `assignment(worker)`.

        Args:
            step: counted from 0.
            worker: from 0 to n - 1.
        """
        _checks.check_int("step", step, 0)
        return self.assignment(worker)

    def holders(self, part: int) -> tuple[int, ...]:
        """Return the workers that compute a part, in ascending order."""
        self._check_part(part)
        return tuple(worker for worker in range(self.workers) if part in self.assignment(worker))

    @property
    def bounded(self) -> bool:
        """Return whether the decoded gradient is a robust mean of the parts' gradients, and not their mean.

        It is then bounded by those of honest parts while the votes of at most `corruptible` parts are wrong.
        """
        return False

    @property
    def corruptible(self) -> int:
        """The number of parts that may have more than s bad workers; 0 if the code is not `bounded`."""
        return 0

    def distorted_parts(self, colluders: Iterable[int]) -> tuple[int, ...]:
        """Return the parts of which more than s workers are among these: the parts that these colluders can spoil.

        If they are all but s of a part's workers, and so for groups of 2s+1 in any case, they win its vote, and nobody
        notices; see `draco_ext.codes.collusion.worst_colluders` for the set that spoils most.

        Args:
            colluders: workers.
        """
        bad = set(colluders)
        for worker in bad:
            self._check_worker(worker)
        return tuple(part for part in range(self.parts) if len(bad.intersection(self.holders(part))) > self.adversaries)

    @functools.cached_property
    def replica_groups(self) -> tuple[tuple[int, ...], ...]:
        """Groups of workers that have the same assignment; every worker is in one."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for worker in range(self.workers):
            groups.setdefault(self.assignment(worker), []).append(worker)
        return tuple(map(tuple, groups.values()))

    @property
    def decoding_groups(self) -> tuple[tuple[int, ...], ...]:
        """Groups of workers that are decoded independently; in each of them up to `adversaries` may be bad."""
        return (tuple(range(self.workers)),)

    # ------------------------------------------------------------------------------------------ what a worker sends

    @abc.abstractmethod
    def message_length(self, d: int) -> int:
        """Return the length of a message for a gradient of d elements."""

    @abc.abstractmethod
    def encode(self, worker: int, gradients: Tensor, out: Tensor | None = None) -> Tensor:
        """Return the worker's message.

        Args:
            worker: from 0 to n - 1.
            gradients: (len(assignment(worker)), d), a gradient for each of its parts, in that order.
            out: receives the message, and is returned: contiguous, of its length, dtype and device, sharing no memory
                with the gradients.

        Returns:
            The message, (message_length(d),).
        """

    @abc.abstractmethod
    def encode_add_(
        self, message: Tensor, carry: Tensor, gradient: Tensor, worker: int, part: int, *, first: bool = False
    ) -> Tensor:
        """Add one part's gradient to a worker's message, in place: encoding as the gradients come.

        Adding all parts of the worker gives the message of `encode`, up to the last rounding.

        Args:
            message: (message_length(d),), contiguous; changed in place.
            carry: like message; changed in place. It keeps what rounding has left of the message from part to part.
            gradient: (d,), contiguous, the same dtype and device. None of the three may share memory with another.
            worker: from 0 to n - 1.
            part: a part that this worker computes.
            first: this is the worker's first part, which replaces what is in message and carry.

        Returns:
            message.
        """

    # ------------------------------------------------------------------------------------------ decoding

    @abc.abstractmethod
    def decode(
        self,
        messages: Tensor,
        *,
        missing: Tensor | None = None,
        expected: Tensor | None = None,
        reduction: str = "mean",
        atol: float = 0.0,
        rtol: float = 0.0,
        length: int | None = None,
        out: Tensor | None = None,
        seed: int | None = None,
    ) -> Decoded:
        """Decode the workers' messages; see `draco_ext.decode` for all arguments but one.

        Args:
            messages: see `draco_ext.decode`.
            missing: see `draco_ext.decode`.
            expected: see `draco_ext.decode`.
            reduction: see `draco_ext.decode`.
            atol: see `draco_ext.decode`.
            rtol: see `draco_ext.decode`.
            length: see `draco_ext.decode`.
            out: see `draco_ext.decode`.
            seed: of the random projections that the decoder draws, 64 bits. It must not be known to the workers before
                their messages are in. Ranks that each decode the same messages agree on one, so as to get the same
                bits. Default: from the operating system. A code without projections ignores it.
        """

    def project(self, messages: Tensor, seed: int | Tensor) -> tuple[Tensor, Tensor]:
        """Return random projections of messages and their norms, where the code `uses_projections`.

        Args:
            messages: (m, L), any messages of this code.
            seed: the same for all messages, 64 bits; not known to the workers before their messages are in. A tensor
                (1,) int64 on the messages' device, if the host need not know it.

        Returns:
            projections (m, tiles, k) complex128; norms (m, tiles) float64.
        """
        raise NotImplementedError(f"{type(self).__name__} does not use projections")

    def locate(
        self,
        projections: Tensor,
        norms: Tensor,
        length: int,
        *,
        dtype: torch.dtype,
        atol: float = 0.0,
        rtol: float = 0.0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Find the bad workers from the projections of all messages, where the code `uses_projections`.

        Args:
            projections: (n, tiles, k) complex128, from `project`.
            norms: (n, tiles) float64, from `project`.
            length: of the messages.
            dtype: of the messages.
            atol: see `draco_ext.decode`.
            rtol: see `draco_ext.decode`.

        Returns:
            weights (n,) complex128: the mean is their weighted sum of the messages, see `combine`. 1/n for all where
            nobody is left out; 0 for a worker that is left out; NaN where there is no gradient. With several `blocks`
            (blocks, n). suspects (n,) bool. failed () bool.
        """
        raise NotImplementedError(f"{type(self).__name__} does not use projections")

    def combine(self, messages: Tensor, weights: Tensor, out: Tensor | None = None) -> Tensor:
        """Return the weighted sum of messages, where the code `uses_projections`.

        Args:
            messages: (m, L), any messages of this code.
            weights: (m,) or (blocks, m) complex128, those of their workers, from `locate`.
            out: (blocks * L,), receives the sum, and is returned; as in `encode`.

        Returns:
            (blocks * L,), the messages' dtype. Sums over disjoint sets of workers add up to the gradient's mean.
        """
        raise NotImplementedError(f"{type(self).__name__} does not use projections")

    # ------------------------------------------------------------------------------------------ guarantees

    @abc.abstractmethod
    def error_bound(self, dtype: torch.dtype, *, length: int | None = None, probability: float = 1e-6) -> float:
        """Return a bound on the relative error of the decoded gradient, whatever up to s workers send.

        In a decode that did not fail, with at most s bad workers and nobody missing::

            norm(decoded mean - honest mean) <= error_bound * sqrt(sum_k norm(g_k)^2 + parts * d * t^2) / parts

        where g_k is the honest gradient of part k, and d the length of a message. Gradients whose elements have a root
        mean square below t (1.7e-36 in float32, 1.5e-45 in float64) count as if they were of that size. In larger ones
        t can be neglected, and the right side is the norm of the mean if the parts' gradients are orthogonal, and less
        if they agree. Derived in docs/guarantee.md from the worst that any messages can do, not fitted: what attacks
        reach is far below. Above 1 it says nothing.

        Args:
            dtype: of the messages.
            length: of the messages; those of few tiles are projected more often. Default: any.
            probability: that a decode exceeds the bound, over the randomness that it draws after the messages are in.
                No bound holds with certainty: an error can be orthogonal to all random projections.

        Raises:
            TypeError: an argument has the wrong type; the code does not take the dtype.
            ValueError: an argument has a wrong value.
        """

    def noise_amplification(self) -> float | None:
        """Return how much rounding noise of the messages grows in the gradient, compared with plain averaging.

        The worst case over the sets of s bad workers that are left out. None where it is not known.
        """
        return None

    # ------------------------------------------------------------------------------------------ checks, for subclasses

    def _check_bound(self, dtype: object, length: object, probability: object) -> None:
        _checks.check_dtype("dtype", dtype, self.dtypes)
        if length is not None:
            _checks.check_int("length", length, 0)
        if isinstance(probability, bool) or not isinstance(probability, (int, float)):
            raise TypeError(f"probability must be a float, got {type(probability).__name__}")
        if not 0 < probability <= 1:
            raise ValueError(f"probability must be above 0 and at most 1, got {probability}")

    def _check_decode(self, messages: object, reduction: object) -> None:
        """Raise unless there is a row for each worker, as far as messages is a matrix, and a known reduction."""
        if not isinstance(reduction, str) or reduction not in ("mean", "sum"):
            got = repr(reduction) if isinstance(reduction, str) else type(reduction).__name__
            raise ValueError(f"reduction must be 'mean' or 'sum', got {got}")
        if not isinstance(messages, Tensor) or messages.is_nested:
            return  # refused by the op
        if messages.dim() == 2 and messages.size(0) != self.workers:
            raise ValueError(
                f"messages must have a row for each of the {self.workers} workers, got shape {tuple(messages.shape)}"
            )

    def _check_part(self, part: object) -> None:
        _checks.check_int("part", part, 0, self.parts - 1)

    def _check_worker(self, worker: object) -> None:
        _checks.check_int("worker", worker, 0, self.workers - 1)


def groups_by_worker(groups: Iterable[Iterable[int]]) -> dict[int, int]:
    """Return for each worker the number of its group among `groups`, such as `Code.decoding_groups`."""
    return {worker: number for number, members in enumerate(groups) for worker in members}


def decode(
    messages: Tensor,
    code: Code,
    *,
    missing: Tensor | None = None,
    expected: Tensor | None = None,
    reduction: str = "mean",
    atol: float = 0.0,
    rtol: float = 0.0,
    length: int | None = None,
    out: Tensor | None = None,
) -> Decoded:
    """Decode the workers' messages into the gradient that honest workers would have given.

    Up to s bad workers, whatever they send, are left out and named. With the repetition code the gradient is
    bit-identical to the one without them; with the cyclic code equal up to rounding. Never synchronises with the host
    by itself. No autograd: messages are data.

    Args:
        messages: (n, code.message_length(d)), row j from worker j, on the CPU or a CUDA device, of one of
            `code.dtypes`. Rows must be contiguous, their stride is free.
        code: the code that the messages were encoded with.
        missing: (n,) bool on the same device: workers whose message did not come. They are erasures and cost half of
            what a bad worker costs: e bad and f missing ones are decoded while 2e + f <= 2s. Their rows are not read.
        expected: (n,) bool on the same device: workers that will probably be found bad, for instance the last step's
            suspects. Does not change a bit of the result; the cyclic code then needs no second sweep.
        reduction: "mean" or "sum" over the parts.
        atol: honest messages may differ by this much, for hardware that is not bit-reproducible. Repetition: a vote
            becomes a median, a member agrees within atol + rtol * abs(median) in every element. Cyclic: raises the
            noise floor.
        rtol: the same, relative.
        length: d, where the message is longer by padding (cyclic code, odd d); default: the message's length, times
            `code.blocks`.
        out: receives the gradient, and is its `Decoded.gradient`: contiguous, of the gradient's length and the
            messages' dtype and device, sharing no memory with the messages. Saves the new memory that the gradient
            otherwise takes, which for a large one costs as much as a good part of the decode. Changes no bit.

    Returns:
        `Decoded` with the gradient, the suspects and whether decoding failed. If so many messages of the cyclic
        code are not finite that 2 * nonfinite + missing > 2 * s, the gradient itself is not (overflow in mixed
        precision): it is NaN, nobody is suspected, and it is not a failure.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has a wrong value, shape, device or layout.
    """
    if not isinstance(code, Code):
        raise TypeError(f"code must be a RepetitionCode, CyclicCode or SolonCode, got {type(code).__name__}")
    return code.decode(
        messages,
        missing=missing,
        expected=expected,
        reduction=reduction,
        atol=atol,
        rtol=rtol,
        length=length,
        out=out,
    )
