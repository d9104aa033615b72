"""What a code is, and `decode`."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from draco_ext import _checks


class DecodingError(RuntimeError):
    """The code's guarantee does not cover the messages that came in."""


@dataclass(frozen=True)
class Decoded:
    """What `decode` returns.

    Attributes:
        gradient: (d,), the messages' dtype and device: mean (or sum) over the parts. NaN everywhere if `failed`.
        suspects: (n,) bool: the workers whose messages were certainly wrong, and left out; never missing ones. With the
            cyclic code errors near the noise may be left out with nobody named: others could have caused them as well.
        failed: () bool: the code's guarantee does not cover what came in, the gradient must not be used.
        left_out: (n,) bool: all whose messages the gradient does not contain, suspects included, missing ones not. Who
            is left out again and again, without being a suspect, probably is bad.
        code: the code that was decoded.
    """

    gradient: Tensor
    suspects: Tensor
    failed: Tensor
    left_out: Tensor
    code: Code

    def raise_if_failed(self) -> Decoded:
        """Returns self, or raises DecodingError. Waits for the device to finish decoding."""
        if not self.failed:
            return self
        named = self.suspects.nonzero().flatten().tolist()
        raise DecodingError(
            f"no gradient: more of the {self.code.workers} workers are bad or missing than {self.code!r} can correct "
            f"({self.code.adversaries} bad, or {2 * self.code.adversaries} missing); {len(named)} worker(s) differ "
            f"from what can be reconstructed: {named}"
        )


@dataclass(frozen=True)
class Code(abc.ABC):
    """Who computes which part of a batch, what each worker sends, and how the messages are decoded.

    Args:
        workers: n.
        adversaries: s, how many workers may be bad; 2 * s + 1 <= n.

    Raises:
        TypeError: an argument is not an int.
        ValueError: s < 0 or n < 2 * s + 1.
    """

    workers: int
    adversaries: int

    def __post_init__(self) -> None:
        _checks.check_workers(self.workers, self.adversaries)

    @property
    def redundancy(self) -> int:
        """How many workers compute each part: 2s+1 (at least, where groups are uneven)."""
        return 2 * self.adversaries + 1

    @property
    @abc.abstractmethod
    def parts(self) -> int:
        """How many parts a batch is cut into."""

    @abc.abstractmethod
    def assignment(self, worker: int) -> tuple[int, ...]:
        """The parts that this worker computes, in the order in which `encode` takes their gradients."""

    @abc.abstractmethod
    def message_length(self, d: int) -> int:
        """Length of a message for a gradient of d elements."""

    @abc.abstractmethod
    def encode(self, worker: int, gradients: Tensor) -> Tensor:
        """What the worker sends.

        Args:
            worker: from 0 to n - 1.
            gradients: (len(assignment(worker)), d), a gradient for each of its parts, in that order.

        Returns:
            The message, (message_length(d),).
        """

    @abc.abstractmethod
    def error_bound(self, dtype: torch.dtype, *, length: int | None = None, probability: float = 1e-6) -> float:
        """A bound on the relative error of the decoded gradient, whatever up to s workers send.

        In a decode that did not fail, with at most s bad workers and nobody missing::

            norm(decoded mean - honest mean) <= error_bound * sqrt(sum_k norm(g_k)^2) / parts

        where g_k is the honest gradient of part k. The norm on the right is that of the mean if the parts' gradients
        are orthogonal, and less if they agree. Derived in docs/guarantee.md from the worst that any messages can do,
        not fitted: what attacks reach is far below. Above 1 it says nothing.

        Args:
            dtype: of the messages.
            length: of the messages; those of few tiles are projected more often. Default: any.
            probability: that a decode exceeds the bound, over the randomness that it draws after the messages are in.
                No bound holds with certainty: an error can be orthogonal to all random projections.

        Raises:
            TypeError: an argument has the wrong type; the code does not take the dtype.
            ValueError: an argument has a wrong value.
        """

    @abc.abstractmethod
    def _decode(
        self,
        messages: Tensor,
        *,
        missing: Tensor | None,
        expected: Tensor | None,
        mean: bool,
        atol: float,
        rtol: float,
        length: int | None,
        seed: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradient, suspects, failed and left_out; see `decode`.

        Ranks that decode the same messages each by itself need the same bits: they agree on the seed of what the
        decoder draws. Default: from the operating system.
        """

    def _check_bound(self, dtype: object, dtypes: Sequence[torch.dtype], length: object, probability: object) -> None:
        _checks.check_dtype("dtype", dtype, dtypes)
        if length is not None:
            _checks.check_int("length", length, 0)
        if isinstance(probability, bool) or not isinstance(probability, (int, float)):
            raise TypeError(f"probability must be a float, got {type(probability).__name__}")
        if not 0 < probability <= 1:
            raise ValueError(f"probability must be above 0 and at most 1, got {probability}")

    def _check_worker(self, worker: int) -> None:
        _checks.check_int("worker", worker, 0, self.workers - 1)


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
) -> Decoded:
    """Decodes the workers' messages into the gradient that honest workers would have given.

    Up to s bad workers, whatever they send, are left out and named. With the repetition code the gradient is
    bit-identical to the one without them; with the cyclic code equal up to rounding. Never synchronises with the host
    by itself. No autograd: messages are data.

    Args:
        messages: (n, code.message_length(d)), row j from worker j, on the CPU or a CUDA device; float32 or float64, for
            the repetition code also float16 and bfloat16. Rows must be contiguous, their stride is free.
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
        length: d, where the message is longer by padding (cyclic code, odd d); default: the message's length.

    Returns:
        `Decoded` with the gradient, the suspects and whether decoding failed. If so many messages of the cyclic
        code are not finite that 2 * nonfinite + missing > 2 * s, the gradient itself is not (overflow in mixed
        precision): it is NaN, nobody is suspected, and it is not a failure.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has a wrong value, shape, device or layout.
    """
    if not isinstance(code, Code):
        raise TypeError(f"code must be a RepetitionCode or CyclicCode, got {type(code).__name__}")
    if not isinstance(reduction, str) or reduction not in ("mean", "sum"):
        got = repr(reduction) if isinstance(reduction, str) else type(reduction).__name__
        raise ValueError(f"reduction must be 'mean' or 'sum', got {got}")
    plain = isinstance(messages, Tensor) and not messages.is_nested
    if plain and messages.dim() == 2 and messages.size(0) != code.workers:
        raise ValueError(
            f"messages must have a row for each of the {code.workers} workers, got shape {tuple(messages.shape)}"
        )
    result = code._decode(
        messages,
        missing=missing,
        expected=expected,
        mean=reduction == "mean",
        atol=atol,
        rtol=rtol,
        length=length,
    )
    return Decoded(*result, code)
