"""The cyclic code, from the worker's side to the decoder's."""

from __future__ import annotations

import torch
from torch import Tensor

from draco_ext import _checks
from draco_ext._extension import _C

CYCLIC_DTYPES = (torch.float32, torch.float64)
TILE: int = _C.TILE
"""Columns of a tile, the unit that has a noise floor of its own."""
_FEW_TILES: int = _C.FEW_TILES
_MOST_PROJECTIONS: int = _C.MOST_PROJECTIONS
_FEWEST_PROJECTIONS: int = _C.FEWEST_PROJECTIONS


def projections_shape(length: int) -> tuple[int, int]:
    """Return the number of tiles of a message and of random projections of each: four up to four tiles, else two."""
    _checks.check_int("length", length, 0)
    return (length + TILE - 1) // TILE, _MOST_PROJECTIONS if length <= _FEW_TILES * TILE else _FEWEST_PROJECTIONS


def message_length(length: int, compression: int = 1) -> int:
    """Return the length of a message for a gradient of this length: `length / compression`, rounded up to pairs."""
    return (length + 2 * compression - 1) // (2 * compression) * 2


def cyclic_encode(
    gradients: Tensor,
    workers: int,
    adversaries: int,
    worker: int,
    *,
    compression: int = 1,
    out: Tensor | None = None,
) -> Tensor:
    """Return one worker's message: the weighted sum of its parts' gradients, pairs of elements as complex numbers.

    The sum is rounded once: its error is relative to the message, also where gradients nearly cancel. What is below
    2^-44 (float64: 2^-95) of its terms counts as cancelled, and is 0; so are 16 columns that are below this part of the
    largest term of any. Reads (2s+k) x d elements, writes d / k. Deterministic.

    Args:
        gradients: (2 * adversaries + compression, d), float32 or float64, in the order of the code's
            `assignment(worker)`.
        workers: n.
        adversaries: s.
        worker: from 0 to n - 1.
        compression: k: gradients are cut into so many blocks, which are added up with a weight each (`SolonCode`).
        out: (L,), receives the message; see `draco_ext.ops`.

    Returns:
        (L,), the gradients' dtype; L is d / k rounded up to an even number. What the last blocks lack counts as 0.
    """
    _checks.check_tensor("gradients", gradients, 2, CYCLIC_DTYPES)
    _checks.check_rows("gradients", gradients)
    _checks.check_workers(workers, adversaries, compression=compression)
    _checks.check_int("worker", worker, 0, workers - 1)
    redundancy = 2 * adversaries + compression
    if gradients.size(0) != redundancy:
        added = "1" if compression == 1 else "compression"
        raise ValueError(f"gradients must have 2 * adversaries + {added} = {redundancy} rows, got {gradients.size(0)}")
    if out is None:
        result: Tensor = torch.ops.draco_ext.cyclic_encode(gradients, workers, adversaries, worker, compression)
        return result
    _checks.check_out(out, message_length(gradients.size(1), compression), "gradients", gradients)
    torch.ops.draco_ext.cyclic_encode_out(gradients, workers, adversaries, worker, out, compression)
    return out


@torch.library.register_fake("draco_ext::cyclic_encode")
def _(gradients, workers, adversaries, worker, compression=1):  # type: ignore[no-untyped-def]
    return gradients.new_empty((message_length(gradients.size(1), compression),))


@torch.library.register_fake("draco_ext::cyclic_encode_out")
def _(gradients, workers, adversaries, worker, out, compression=1):  # type: ignore[no-untyped-def]
    return None


def cyclic_encode_add_(
    message: Tensor,
    carry: Tensor,
    gradient: Tensor,
    workers: int,
    adversaries: int,
    worker: int,
    part: int,
    *,
    first: bool = False,
    compression: int = 1,
) -> Tensor:
    """Add one part's weighted gradient to a message, in place: encoding as the gradients come, without keeping them.

    The message and what rounding has left of it, the carry, hold the sum together, in about twice the dtype's
    precision: the message may be used at any time. Adding all parts of the worker's assignment gives `cyclic_encode`'s
    message, or an element next to it where the exact sum is nearly half-way between two. Reads d + 2 d / k elements, d
    for the first part, writes 2 d / k. Deterministic.

    Args:
        message: (L,), contiguous, float32 or float64; changed in place. L is d / k rounded up to an even number.
        carry: like message; changed in place.
        gradient: (d,), contiguous, the same dtype and device. None of the three may share memory with another.
        workers: n.
        adversaries: s.
        worker: from 0 to n - 1.
        part: a part that this worker computes.
        first: whether this is the first part, which replaces what is in message and carry instead of adding to it.
        compression: k, see `cyclic_encode`.

    Returns:
        message.
    """
    _checks.check_tensor("message", message, 1, CYCLIC_DTYPES)
    _checks.check_tensor("carry", carry, 1, (message.dtype,), like=message)
    _checks.check_tensor("gradient", gradient, 1, (message.dtype,), like=message)
    _checks.check_workers(workers, adversaries, compression=compression)
    _checks.check_int("worker", worker, 0, workers - 1)
    _checks.check_int("part", part, 0, workers - 1)
    length = message_length(gradient.size(0), compression)
    for name, vector in (("message", message), ("carry", carry)):
        _checks.check_writable(name, vector, length)
    _checks.check_contiguous("gradient", gradient)
    _checks.check_apart("carry", carry, "message", message)
    _checks.check_apart("gradient", gradient, "message", message)
    _checks.check_apart("gradient", gradient, "carry", carry)
    r = 2 * adversaries + compression
    if all((part + (2 * t * workers + r) // (2 * r)) % workers != worker for t in range(r)):
        raise ValueError(f"part must be one that worker {worker} computes, got {part}")
    _checks.check_bool("first", first)
    torch.ops.draco_ext.cyclic_encode_add_(
        message, carry, gradient, workers, adversaries, worker, part, first, compression
    )
    return message


@torch.library.register_fake("draco_ext::cyclic_encode_add_")
def _(  # type: ignore[no-untyped-def]
    message, carry, gradient, workers, adversaries, worker, part, first=False, compression=1
):
    return None


def cyclic_project(messages: Tensor, seed: int | Tensor, *, missing: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Project the messages at random, a few times for every tile of `TILE` columns (see `projections_shape`).

    The weights are products of two numbers of +-[1, 2), drawn by Philox4x32-10 from the seed (csrc/core/random.h). They
    must not be known to the workers before their messages are in. Reads n x d elements. Deterministic for a given seed
    and instruction set.

    Args:
        messages: (n, L), L even, float32 or float64.
        seed: key of the random weights, 64 bits. A tensor (1,) int64 on the messages' device is one that the host need
            not know, and does not wait for.
        missing: (n,) bool, rows that are not to be read; their projections are 0.

    Returns:
        projections (n, tiles, k) complex128, in units in which those of no finite message overflow; norms (n, tiles)
        float64, of each worker's tiles, in the same units.
    """
    _checks.check_messages(messages, CYCLIC_DTYPES)
    _checks.check_pairs(messages)
    _checks.check_mask("missing", missing, messages)
    result: tuple[Tensor, Tensor]
    if isinstance(seed, Tensor):
        _checks.check_seeds("seed", seed, messages, 1)
        result = torch.ops.draco_ext.cyclic_project_by_key(messages, missing, seed)
        return result
    _checks.check_int("seed", seed, -(2**63), 2**63 - 1)
    result = torch.ops.draco_ext.cyclic_project(messages, missing, seed)
    return result


@torch.library.register_fake("draco_ext::cyclic_project_by_key")
@torch.library.register_fake("draco_ext::cyclic_project")
def _(messages, missing, seed):  # type: ignore[no-untyped-def]
    n, (tiles, k) = messages.size(0), projections_shape(messages.size(1))
    return (
        messages.new_empty((n, tiles, k), dtype=torch.complex128),
        messages.new_empty((n, tiles), dtype=torch.float64),
    )


def cyclic_locate(
    projections: Tensor,
    norms: Tensor,
    adversaries: int,
    length: int,
    *,
    missing: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    atol: float = 0.0,
    rtol: float = 0.0,
    mean: bool = True,
    compression: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Find the bad workers from projections, and the weights that decode without them.

    Looks for the smallest set of workers without which the others' projections satisfy the code's checks up to rounding
    (csrc/core/locator.h), all in double precision, in O(n s^2) per projection. Deterministic.

    Source: the decoder of DRACO, arXiv 1803.09877, section 4.2 and appendix, with all projections stacked.

    Args:
        projections: (n, tiles, k) complex128, from `cyclic_project`.
        norms: (n, tiles) float64, from `cyclic_project`.
        adversaries: s.
        length: columns of the messages that were projected.
        missing: (n,) bool, workers without a message; their projections are 0.
        dtype: of the messages: sets the rounding to expect.
        atol: raises the noise floor: honest messages may differ from the exact ones by this much per element (root mean
            square).
        rtol: the same, relative to the messages.
        mean: scale the weights by 1 / n.
        compression: k, see `cyclic_encode`.

    Returns:
        weights (n,) complex128, with compression > 1 (k, n), of each block: 0 for workers left out, NaN where there is
        no gradient; suspects (n,) bool; failed () bool, whether no set of as many workers as may be bad explains the
        projections. More non-finite messages than could be put right (2 * nonfinite + missing > 2 * s) give NaN
        weights, no suspects and no failure: then the gradient itself is not finite.
    """
    _checks.check_tensor("projections", projections, 3, (torch.complex128,))
    _checks.check_workers(projections.size(0), adversaries, "projections' rows", compression)
    _checks.check_int("length", length, 0)
    shape = projections_shape(length)
    if projections.shape[1:] != shape or not projections.is_contiguous():
        raise ValueError(
            f"projections must be contiguous, of shape (n, {shape[0]}, {shape[1]}) for length {length}, got "
            f"{tuple(projections.shape)}"
        )
    _checks.check_tensor("norms", norms, 2, (torch.float64,), like=projections)
    if norms.shape != projections.shape[:2] or not norms.is_contiguous():
        raise ValueError(f"norms must be contiguous, of shape {tuple(projections.shape[:2])}, got {tuple(norms.shape)}")
    _checks.check_mask("missing", missing, projections)
    _checks.check_dtype("dtype", dtype, CYCLIC_DTYPES)
    _checks.check_tolerance("atol", atol)
    _checks.check_tolerance("rtol", rtol)
    _checks.check_bool("mean", mean)
    result: tuple[Tensor, Tensor, Tensor] = torch.ops.draco_ext.cyclic_locate(
        projections,
        norms,
        missing,
        adversaries,
        length,
        dtype == torch.float64,
        float(atol),
        float(rtol),
        mean,
        compression,
    )
    return result


@torch.library.register_fake("draco_ext::cyclic_locate")
def _(  # type: ignore[no-untyped-def]
    projections, norms, missing, adversaries, length, float64, atol, rtol, mean, compression=1
):
    n = projections.size(0)
    return (
        projections.new_empty((n,) if compression == 1 else (compression, n)),
        projections.new_empty((n,), dtype=torch.bool),
        projections.new_empty((), dtype=torch.bool),
    )


def cyclic_combine(
    messages: Tensor, weights: Tensor, *, length: int | None = None, out: Tensor | None = None
) -> Tensor:
    """Return the weighted sum of the messages, pairs of elements taken as complex numbers.

    Rows whose weight is exactly 0 are not read. Reads the others once, however many blocks are made of them (on a GPU
    once for eight blocks), writes d elements. Deterministic.

    Args:
        messages: (n, L), L even, float32 or float64.
        weights: (n,) complex128; or (k, n), of k blocks of the result, which follow each other.
        length: L or L - 1; the default L keeps the padding of an odd gradient. With k blocks k * L, or less than 2 * k
            below.
        out: (length,), receives the sum; see `draco_ext.ops`.

    Returns:
        (length,), the messages' dtype.
    """
    _checks.check_messages(messages, CYCLIC_DTYPES)
    _checks.check_pairs(messages)
    several = isinstance(weights, Tensor) and weights.dim() == 2
    _checks.check_tensor("weights", weights, 2 if several else 1, (torch.complex128,), like=messages)
    if weights.size(-1) != messages.size(0) or not weights.is_contiguous():
        raise ValueError(f"weights must be contiguous with {messages.size(0)} entries, got {weights.size(-1)}")
    compression = weights.size(0) if several else 1
    if not 0 < compression <= _checks.MOST_WORKERS:
        raise ValueError(f"weights must have from 1 to {_checks.MOST_WORKERS} rows, got {compression}")
    length = compression * messages.size(1) if length is None else length
    _checks.check_length(length, messages, compression)
    if out is None:
        result: Tensor = torch.ops.draco_ext.cyclic_combine(messages, weights, length)
        return result
    _checks.check_out(out, length, "messages", messages)
    torch.ops.draco_ext.cyclic_combine_out(messages, weights, out)
    return out


@torch.library.register_fake("draco_ext::cyclic_combine")
def _(messages, weights, length):  # type: ignore[no-untyped-def]
    return messages.new_empty((length,))


@torch.library.register_fake("draco_ext::cyclic_combine_out")
def _(messages, weights, out):  # type: ignore[no-untyped-def]
    return None


def cyclic_decode(
    messages: Tensor,
    adversaries: int,
    *,
    missing: Tensor | None = None,
    expected: Tensor | None = None,
    length: int | None = None,
    atol: float = 0.0,
    rtol: float = 0.0,
    mean: bool = True,
    seed: int | None = None,
    compression: int = 1,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Decode the cyclic code in one sweep over the messages, two if there are suspects that were not expected.

    On a GPU always two with compression > 1. On the CPU the second one is of the first sixteenth alone, unless a
    suspect shows only after that. Equivalent to `cyclic_project`, `cyclic_locate` and `cyclic_combine`. To the last bit
    the gradient is that of who is left out: it depends on the seed only through which errors at the noise floor are
    noticed, and not on `expected`.

    Args:
        messages: (n, L), L even, float32 or float64.
        adversaries: s, 2 * s + 1 <= n.
        missing: (n,) bool, workers without a message: erasures, 2 * bad + missing <= 2 * s is decoded.
        expected: (n,) bool, workers that are probably bad, say because they were in the last step. Only saves time.
        length: L or L - 1, default L; with compression k * L, the default, or less than 2 * k below.
        atol: see `cyclic_locate`.
        rtol: see `cyclic_locate`.
        mean: divide by the number of parts, n.
        seed: of the random projection; None, the only safe choice in production, draws one from the operating system.
        compression: k, see `cyclic_encode`; 2 * s + k <= n.
        out: (length,), receives the gradient; see `draco_ext.ops`.

    Returns:
        gradient (length,), NaN everywhere if failed or if 2 * nonfinite + missing > 2 * s; suspects (n,) bool; failed
        () bool; left_out (n,) bool, all whose messages the gradient does not contain: the suspects, and those who may
        be bad as well as others. Not the missing ones; nobody where the gradient is NaN.
    """
    _checks.check_messages(messages, CYCLIC_DTYPES)
    _checks.check_pairs(messages)
    _checks.check_workers(messages.size(0), adversaries, "messages' rows", compression)
    _checks.check_mask("missing", missing, messages)
    _checks.check_mask("expected", expected, messages)
    length = compression * messages.size(1) if length is None else length
    _checks.check_length(length, messages, compression)
    _checks.check_tolerance("atol", atol)
    _checks.check_tolerance("rtol", rtol)
    _checks.check_bool("mean", mean)
    if seed is not None:
        _checks.check_int("seed", seed, -(2**63), 2**63 - 1)
    options = (float(atol), float(rtol), mean, seed)
    if out is None:
        result: tuple[Tensor, Tensor, Tensor, Tensor] = torch.ops.draco_ext.cyclic_decode(
            messages, missing, expected, adversaries, length, *options, compression
        )
        return result
    _checks.check_out(out, length, "messages", messages)
    flags = torch.ops.draco_ext.cyclic_decode_out(messages, missing, expected, adversaries, *options, out, compression)
    return out, *flags


@torch.library.register_fake("draco_ext::cyclic_decode_out")
def _(  # type: ignore[no-untyped-def]
    messages, missing, expected, adversaries, atol, rtol, mean, seed, out, compression=1
):
    n = messages.size(0)
    return tuple(messages.new_empty(shape, dtype=torch.bool) for shape in ((n,), (), (n,)))


@torch.library.register_fake("draco_ext::cyclic_decode")
def _(  # type: ignore[no-untyped-def]
    messages, missing, expected, adversaries, length, atol, rtol, mean, seed, compression=1
):
    n = messages.size(0)
    flags = (messages.new_empty(shape, dtype=torch.bool) for shape in ((n,), (), (n,)))
    return messages.new_empty((length,)), *flags
