"""The repetition code: groups of workers compute the same part and vote."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from draco_ext import _checks, ops
from draco_ext.codes.base import Decoded
from draco_ext.codes.robust import check_beyond
from draco_ext.codes.votes import VotingCode


@dataclass(frozen=True)
class RepetitionCode(VotingCode):
    """Workers are cut into floor(n / (2s+1)) groups of consecutive workers; each group computes one part.

    Where 2s+1 does not divide n, the first groups have more members. Decoding is a bitwise majority vote in each group,
    exact to the last bit. Source: DRACO, arXiv 1803.09877, section 4.1.

    `beyond` says what becomes of the groups' winners. A group with more than s bad members is *corrupted*: if they
    collude they win its vote, which nobody can notice, and otherwise it may have no majority. With "fail" the gradient
    is the mean of the winners: exact while no group is corrupted, and `failed` if a group has no majority. The other
    two are a second stage (DETOX, arXiv 1907.12205). It takes a robust mean of the winners, coordinate by coordinate,
    in every step, since a group that colluders have won looks like any other:

    * Each element is between the smallest and the largest of the groups that are not corrupted, as long as at most
      `corruptible` groups are: (G - 1) // 2 of G with "median", and `trim` with "trimmed-mean". It is not their mean,
      also if nobody is bad: `Decoded.bounded` is set. With more corrupted groups it may be anything.
    * A group without a majority is left out, as is one whose members are all missing. All its members are in
      `left_out`, and none is a suspect. With e such groups and c that colluders have won, the median's promise holds
      while 2c + e < G.
    * Suspects differ from their group's winner. In a group that colluders have won these are its honest members.
    * `failed` is set if more than `corruptible` groups have no majority, and only then. As without a second stage,
      groups that are not finite, after an overflow, are no failure; with "median" and too many of these it is all NaN.

    Args:
        workers: n.
        adversaries: s.
        beyond: "fail", or the second stage: "median" or "trimmed-mean". A second stage needs at least three groups.
        trim: with "trimmed-mean", how many winners are left out at each end of a coordinate; default: G // 4, at
            least 1.
    """

    message_is_gradient: ClassVar[bool] = True

    group_sizes: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        groups = self.workers // self.redundancy
        size, larger = divmod(self.workers, groups)
        if size + (larger > 0) > ops.MOST_GROUP_MEMBERS:
            raise ValueError(
                f"workers must make groups of at most {ops.MOST_GROUP_MEMBERS}, got {self.workers} in {groups}"
            )
        sizes = (size + 1,) * larger + (size,) * (groups - larger)
        object.__setattr__(self, "group_sizes", sizes)
        check_beyond(self.beyond, self.trim, groups)

    def __repr__(self) -> str:
        """Return the constructor's call, with the arguments that are not left out."""
        second = "" if self.beyond == "fail" else f", beyond={self.beyond!r}"
        second += "" if self.trim is None else f", trim={self.trim}"
        return f"RepetitionCode(workers={self.workers}, adversaries={self.adversaries}{second})"

    @property
    def parts(self) -> int:
        """The number of parts of a batch: one for each group."""
        return len(self.group_sizes)

    def assignment(self, worker: int) -> tuple[int, ...]:
        """Return the one part that this worker's group computes."""
        self._check_worker(worker)
        larger = self.workers % self.parts
        size = self.workers // self.parts
        in_larger = larger * (size + 1)
        if worker < in_larger:
            return (worker // (size + 1),)
        return (larger + (worker - in_larger) // size,)

    def holders(self, part: int) -> tuple[int, ...]:
        """Return the workers of the part's group, in ascending order."""
        self._check_part(part)
        return self.replica_groups[part]

    @functools.cached_property
    def replica_groups(self) -> tuple[tuple[int, ...], ...]:
        """The groups; the group of part k is the k-th."""
        ends = itertools.accumulate(self.group_sizes)
        return tuple(tuple(range(end - size, end)) for end, size in zip(ends, self.group_sizes, strict=True))

    @property
    def decoding_groups(self) -> tuple[tuple[int, ...], ...]:
        """The groups: each votes by itself."""
        return self.replica_groups

    def message_length(self, d: int) -> int:
        """Return `d`: a message is the gradient itself."""
        _checks.check_int("d", d, 0)
        return d

    def encode(self, worker: int, gradients: Tensor, out: Tensor | None = None) -> Tensor:
        """Return the worker's one gradient, not copied unless into `out`; see `Code.encode`."""
        self._check_worker(worker)
        _checks.check_tensor("gradients", gradients, 2, ops.VOTE_DTYPES)
        _checks.check_rows("gradients", gradients)
        if gradients.size(0) != 1:
            raise ValueError(
                f"gradients must have 1 row, for part {self.assignment(worker)[0]}, got {gradients.size(0)}"
            )
        if out is None:
            return gradients[0]
        _checks.check_out(out, gradients.size(1), "gradients", gradients)
        return out.copy_(gradients[0])

    def encode_add_(
        self, message: Tensor, carry: Tensor, gradient: Tensor, worker: int, part: int, *, first: bool = False
    ) -> Tensor:
        """Copy the worker's one gradient into its message; see `Code.encode_add_`. The carry is not used."""
        own = self.assignment(worker)[0]
        _checks.check_int("part", part, own, own)
        _checks.check_bool("first", first)
        if not first:
            raise ValueError(f"first must be True, got False: worker {worker} computes one part")
        _checks.check_tensor("message", message, 1, ops.VOTE_DTYPES)
        _checks.check_tensor("gradient", gradient, 1, (message.dtype,), like=message)
        if gradient.size(0) != message.size(0):
            raise ValueError(f"gradient must have {message.size(0)} elements, got {gradient.size(0)}")
        return message.copy_(gradient)

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
        """Vote in each group and average the winners; see `Code.decode`. Nothing is drawn: the seed is not used.

        With a second stage the winners of all groups are kept in memory at once, and "sum" is the robust mean times
        the number of groups.
        """
        self._check_decode(messages, reduction)
        if expected is not None or length is not None:  # the vote has no use for them
            _checks.check_messages(messages, ops.VOTE_DTYPES)
            _checks.check_mask("expected", expected, messages)
        if length is not None:
            _checks.check_int("length", length, messages.size(1), messages.size(1))
        if self.bounded:
            _checks.check_messages(messages, ops.VOTE_DTYPES)
            _checks.check_mask("missing", missing, messages)
            if out is not None:
                _checks.check_out(out, messages.size(1), "messages", messages)
            return self._decode_by_votes(
                self._ballots(messages, missing),
                messages.new_empty(messages.size(1)) if out is None else out,
                missing=missing,
                reduction=reduction,
                atol=atol,
                rtol=rtol,
            )
        gradient, suspects, failed = ops.majority_vote(
            messages,
            self.group_sizes,
            self.adversaries,
            missing=missing,
            atol=atol,
            rtol=rtol,
            mean=reduction == "mean",
            out=out,
        )
        return Decoded(gradient, suspects, failed, suspects, self)

    def _ballots(self, messages: Tensor, missing: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield the messages of each group, and which of them are missing."""
        end = 0
        for size in self.group_sizes:
            begin, end = end, end + size
            yield messages[begin:end], None if missing is None else missing[begin:end]

    def _of_workers(self, flags: Sequence[Tensor]) -> Tensor:
        return torch.cat(tuple(flags))
