"""Majority votes: the decoder of the repetition code."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from draco_ext import _checks
from draco_ext._extension import _C

VOTE_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
MOST_GROUP_MEMBERS: int = _C.MOST_GROUP_MEMBERS
MOST_VECTORS = _checks.MOST_WORKERS


def majority_vote(
    messages: Tensor,
    group_sizes: Sequence[int],
    adversaries: int,
    *,
    missing: Tensor | None = None,
    atol: float = 0.0,
    rtol: float = 0.0,
    mean: bool = True,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Vote in each group of consecutive workers and average the winners.

    Bitwise (both tolerances 0): every bit of every element is decided by the majority, so the winner is the honest
    vector whenever `m - adversaries` of a group's m present members are bit-identical; NaN compares by bits, -0 and
    +0 differ.
    Tolerant: the winner is the coordinate-wise lower median in the total order of floats, and a member agrees where it
    is within `atol + rtol * abs(winner)`, up to rounding: this is compared in float32 (float64 for float64). One
    sweep: n x d elements read, d written. Deterministic.

    Source: DRACO, arXiv 1803.09877, section 4.1 (repetition code, majority vote decoder).

    Args:
        messages: (n, d), float32, float64, float16 or bfloat16.
        group_sizes: members of each group, adding up to n, each from 2 * adversaries + 1 to 511.
        adversaries: s, how many workers may be bad.
        missing: (n,) bool, workers whose row is to be ignored.
        atol: absolute tolerance.
        rtol: relative tolerance.
        mean: divide by the number of groups; otherwise the sum over groups. Sums are taken in float32 (float64 for
            float64), in the order of the groups.
        out: (d,), receives the gradient; see `draco_ext.ops`.

    Returns:
        gradient (d,), NaN everywhere if failed; suspects (n,) bool, the present members that differ from their group's
        winner; failed () bool, whether too few members of some group agree for the guarantee to hold.
    """
    _checks.check_messages(messages, VOTE_DTYPES)
    _checks.check_int("adversaries", adversaries, 0)
    if not isinstance(group_sizes, (tuple, list)):
        raise TypeError(f"group_sizes must be a tuple or list of ints, got {type(group_sizes).__name__}")
    least = 2 * adversaries + 1
    for size in group_sizes:
        if type(size) is not int or not least <= size <= MOST_GROUP_MEMBERS:  # calls cost as much as a vote
            _checks.check_int("group_sizes", size, least, MOST_GROUP_MEMBERS)
    if sum(group_sizes) != messages.size(0):
        raise ValueError(f"group_sizes must add up to the {messages.size(0)} messages, got {sum(group_sizes)}")
    _checks.check_mask("missing", missing, messages)
    _checks.check_tolerance("atol", atol)
    _checks.check_tolerance("rtol", rtol)
    _checks.check_bool("mean", mean)
    options = (list(group_sizes), adversaries, float(atol), float(rtol), mean)
    if out is None:
        result: tuple[Tensor, Tensor, Tensor] = torch.ops.draco_ext.majority_vote(messages, missing, *options)
        return result
    _checks.check_out(out, messages.size(1), "messages", messages)
    return out, *torch.ops.draco_ext.majority_vote_out(messages, missing, *options, out)


def vector_mean(vectors: Sequence[Tensor], *, out: Tensor | None = None) -> Tensor:
    """Return the mean of vectors that lie apart, such as those that groups have voted on.

    Has the bits that `majority_vote` gives for groups of one: sums are taken in float32 (float64 for float64), in the
    order of the vectors; a single vector's bits stay as they are. Reads all vectors once, writes d elements.
    Deterministic.

    Args:
        vectors: (d,) each, contiguous; float32, float64, float16 or bfloat16, all alike.
        out: (d,), receives the mean; see `draco_ext.ops`. It may also be one of the vectors.

    Returns:
        The mean, (d,).
    """
    if not isinstance(vectors, (tuple, list)):
        raise TypeError(f"vectors must be a tuple or list of Tensors, got {type(vectors).__name__}")
    if not 1 <= len(vectors) <= MOST_VECTORS:
        raise ValueError(f"vectors must be from 1 to {MOST_VECTORS}, got {len(vectors)}")
    first = vectors[0]
    for i, vector in enumerate(vectors):
        _checks.check_tensor(f"vectors[{i}]", vector, 1, (first.dtype,) if i else VOTE_DTYPES, first if i else None)
        _checks.check_contiguous(f"vectors[{i}]", vector)
        if vector.size(0) != first.size(0):
            raise ValueError(f"vectors[{i}] must have {first.size(0)} elements as vectors[0], got {vector.size(0)}")
    if out is None:
        out = torch.empty_like(first)
    else:
        _checks.check_tensor("out", out, 1, (first.dtype,), first)
        _checks.check_writable("out", out, first.size(0))
        for i, vector in enumerate(vectors):
            if vector.data_ptr() != out.data_ptr():
                _checks.check_apart("out", out, f"vectors[{i}]", vector)
    torch.ops.draco_ext.vector_mean_out(list(vectors), out)
    return out


@torch.library.register_fake("draco_ext::vector_mean_out")
def _(vectors, out):  # type: ignore[no-untyped-def]
    return None


@torch.library.register_fake("draco_ext::majority_vote_out")
def _(messages, missing, group_sizes, adversaries, atol, rtol, mean, out):  # type: ignore[no-untyped-def]
    n = messages.size(0)
    return messages.new_empty((n,), dtype=torch.bool), messages.new_empty((), dtype=torch.bool)


@torch.library.register_fake("draco_ext::majority_vote")
def _(messages, missing, group_sizes, adversaries, atol, rtol, mean):  # type: ignore[no-untyped-def]
    n, d = messages.shape
    flags = messages.new_empty((n,), dtype=torch.bool), messages.new_empty((), dtype=torch.bool)
    return messages.new_empty((d,)), *flags
