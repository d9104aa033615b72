"""ByzShield's placement: every part has other workers than every other one, and any two workers share at most one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from draco_ext import _checks, ops
from draco_ext.codes.base import Decoded
from draco_ext.codes.robust import check_beyond
from draco_ext.codes.votes import VotingCode


@dataclass(frozen=True)
class ByzShieldCode(VotingCode):
    """The batch has l * l parts, of which each of (2s+1) * l workers computes l, and any two share at most one.

    Each part has 2s+1 workers, whose gradients of it are put to a vote, as in a group of the repetition code. Compute
    is the same, 2s+1 times that of plain training. The difference is what colluders reach: a group of the repetition
    code is lost to s+1 of them, and with it a whole part of the few there are. Here s+1 colluders win at most one part
    of l * l, and it takes many more to win half of them. `distorted_parts` says which parts a set of colluders wins.

    The parts are the points (i, j) of a plane over the field of l elements, l a prime: the k-th of 2s+1 classes of
    workers has one for each line with the slope -(k+1). These are mutually orthogonal Latin squares for 2s+1 < l, and
    for 2s+1 = l the Ramanujan bigraph of the paper's case 2 with m = s. Source: ByzShield, arXiv 2010.04902.

    A worker sends the gradients of all its parts, one after another: l times as much as with the other codes. This is
    for `draco_ext.decode` in a loop of your own; `draco_ext.protect` refuses it.

    The winners of the votes go into a second stage, in every step, as colluders that win a part are not noticed. What
    is said of "groups" in `RepetitionCode` holds for parts: with "median" at most `corruptible` = (l * l - 1) // 2 of
    them may have more than s bad workers. With "fail" the mean of the winners is returned, exact with up to s bad
    workers anywhere, and `failed` is set where a part has no majority.

    In `Decoded`, a suspect differs from the winner of one of its parts, and is certainly wrong only while no part is
    won by colluders, so with up to s bad workers. `left_out` also has all workers of a part without a majority.

    Args:
        workers: n = (2s+1) * l.
        adversaries: s.
        beyond: "median", "trimmed-mean" or "fail"; see `RepetitionCode`.
        trim: with "trimmed-mean", how many winners are left out at each end of a coordinate; default: a quarter.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: workers / (2s+1) is not a prime of at least 2s+1, or an argument has a wrong value.
    """

    sliceable: ClassVar[bool] = False

    beyond: str = "median"

    def __post_init__(self) -> None:
        super().__post_init__()
        load, rest = divmod(self.workers, self.redundancy)
        if rest or not _is_prime(load) or load < self.redundancy:
            raise ValueError(
                f"workers must be 2 * adversaries + 1 = {self.redundancy} times a prime of at least {self.redundancy}, "
                f"got {self.workers}"
            )
        check_beyond(self.beyond, self.trim, self.parts)

    @property
    def load(self) -> int:
        """The number of parts of each worker: l."""
        return self.workers // self.redundancy

    @property
    def parts(self) -> int:
        """The number of parts of a batch: l * l."""
        return self.load**2

    def assignment(self, worker: int) -> tuple[int, ...]:
        """Return the l parts of this worker, in ascending order."""
        self._check_worker(worker)
        kind, line = divmod(worker, self.load)
        return tuple(i * self.load + (line - (kind + 1) * i) % self.load for i in range(self.load))

    def holders(self, part: int) -> tuple[int, ...]:
        """Return the 2s+1 workers that compute a part, in ascending order: one of each class."""
        self._check_part(part)
        i, j = divmod(part, self.load)
        return tuple(kind * self.load + ((kind + 1) * i + j) % self.load for kind in range(self.redundancy))

    def message_length(self, d: int) -> int:
        """Return l times `d`: a message holds the gradients of all parts of its worker."""
        _checks.check_int("d", d, 0)
        return self.load * d

    def encode(self, worker: int, gradients: Tensor, out: Tensor | None = None) -> Tensor:
        """Return the worker's gradients one after another, not copied where they are so already; see `Code.encode`."""
        self._check_worker(worker)
        _checks.check_tensor("gradients", gradients, 2, ops.VOTE_DTYPES)
        _checks.check_rows("gradients", gradients)
        if gradients.size(0) != self.load:
            raise ValueError(f"gradients must have {self.load} rows, one for each part, got {gradients.size(0)}")
        if out is None:
            return gradients.reshape(-1)
        _checks.check_out(out, gradients.numel(), "gradients", gradients)
        out.view(gradients.shape).copy_(gradients)
        return out

    def encode_add_(
        self, message: Tensor, carry: Tensor, gradient: Tensor, worker: int, part: int, *, first: bool = False
    ) -> Tensor:
        """Copy one part's gradient to its place in a message; see `Code.encode_add_`. The carry is not used."""
        own = self.assignment(worker)
        if _checks.check_int("part", part, 0, self.parts - 1) not in own:
            raise ValueError(f"part must be one of worker {worker}, {own}, got {part}")
        _checks.check_bool("first", first)
        _checks.check_tensor("message", message, 1, ops.VOTE_DTYPES)
        _checks.check_contiguous("message", message)
        _checks.check_tensor("gradient", gradient, 1, (message.dtype,), like=message)
        if self.load * gradient.size(0) != message.size(0):
            raise ValueError(f"message must have {self.load * gradient.size(0)} elements, got {message.size(0)}")
        message.view(self.load, -1)[own.index(part)].copy_(gradient)
        return message

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
        """Vote on each part, and take a robust mean of the winners; see `Code.decode`. The seed is not used.

        The winners of all parts are in memory at once, and "sum" is the (robust) mean times the number of parts.
        """
        self._check_decode(messages, reduction)
        _checks.check_messages(messages, ops.VOTE_DTYPES)
        _checks.check_mask("missing", missing, messages)
        _checks.check_mask("expected", expected, messages)
        if messages.size(1) % self.load:
            raise ValueError(f"messages must have {self.load} gradients in a row, got {messages.size(1)} columns")
        d = messages.size(1) // self.load
        if length is not None:
            _checks.check_int("length", length, d, d)
        if out is not None:
            _checks.check_tensor("out", out, 1, (messages.dtype,), like=messages)
            _checks.check_writable("out", out, d)
            _checks.check_apart("out", out, "messages", messages)
        return self._decode_by_votes(
            self._ballots(messages.unflatten(1, (self.load, d)), missing),
            messages.new_empty(d) if out is None else out,
            missing=missing,
            reduction=reduction,
            atol=atol,
            rtol=rtol,
        )

    def _ballots(self, messages: Tensor, missing: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield what each part's workers have sent of it, in the same memory, and which of them are missing."""
        absent = None if missing is None else self._by_part(missing)
        ballot = messages.new_empty(self.redundancy, messages.size(2))
        for part in range(self.parts):
            for vote, worker in zip(ballot, self.holders(part), strict=True):
                vote.copy_(messages[worker, part // self.load])
            yield ballot, None if absent is None else absent[part]

    def _by_part(self, mask: Tensor) -> Tensor:
        """Return for each part the entries of its workers: (l * l, 2s+1) of (n,)."""
        load, classes = self.load, mask.view(self.redundancy, self.load)
        by_row = [torch.stack([row.roll(-(k + 1) * i) for k, row in enumerate(classes)], 1) for i in range(load)]
        return torch.cat(by_row)

    def _of_workers(self, flags: Sequence[Tensor]) -> Tensor:
        table = torch.stack(tuple(flags)).view(self.load, self.load, self.redundancy)
        lines = [
            torch.stack([table[i, :, k].roll((k + 1) * i) for i in range(self.load)]).any(0)
            for k in range(self.redundancy)
        ]
        return torch.cat(lines)


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % factor for factor in range(2, math.isqrt(number) + 1))
