"""Digests of vectors, which ranks compare instead of the vectors, and statistics of their values."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from draco_ext import _checks
from draco_ext.ops.cyclic import TILE
from draco_ext.ops.vote import VOTE_DTYPES

DIGEST_DTYPES = (*VOTE_DTYPES, torch.uint8)


def digest(values: Tensor, seed: int | Sequence[int] | Tensor) -> Tensor:
    """Return 128 bits that stand for all bits of a vector: ranks compare them instead of whole messages.

    Vectors of the same bits and seed have the same digest, on every device and machine; -0 and +0 differ, so do NaNs of
    different bits. Over a random seed two vectors that differ in any bit or in length, chosen without knowing the seed,
    have the same digest with a probability of at most 2^-123; who knows the seed can make such vectors. Reads d
    elements, with several seeds once (on CUDA once for every 16). Deterministic, whatever the number of threads.

    Source: NH with a Toeplitz key (Black, Halevi, Krawczyk, Krovetz and Rogaway, UMAC, CRYPTO 1999) over the 81 cells
    that an erasure code makes of every 64 (encode, hash, combine: Nandi, FSE 2014), and over the hashes of the cells;
    blocks are joined by multilinear hashing (Carter and Wegman, 1979) with weights from Philox4x32-10.

    Args:
        values: (d,) contiguous; float32, float64, float16, bfloat16, or uint8, as which other types can be viewed.
        seed: the key, 64 bits, or a sequence of keys. A tensor (k,) int64 on the values' device is a sequence that the
            host need not know, and does not wait for.

    Returns:
        (2,) int64; for a sequence of k seeds (k, 2), in row i the digest under seed i.
    """
    _checks.check_tensor("values", values, 1, DIGEST_DTYPES)
    _checks.check_contiguous("values", values)
    if isinstance(seed, Tensor):
        _checks.check_seeds("seed", seed, values)
        by_keys: Tensor = torch.ops.draco_ext.digest_by_keys(values, seed)
        return by_keys
    if isinstance(seed, Sequence):
        for i, one in enumerate(seed):
            _checks.check_int(f"seed[{i}]", one, -(2**63), 2**63 - 1)
        rows: Tensor = torch.ops.draco_ext.digest(values, list(seed))
        return rows
    _checks.check_int("seed", seed, -(2**63), 2**63 - 1)
    result: Tensor = torch.ops.draco_ext.digest(values, [seed])[0]
    return result


@torch.library.register_fake("draco_ext::digest_by_keys")
def _(values, seeds):  # type: ignore[no-untyped-def]
    return values.new_empty((seeds.size(0), 2), dtype=torch.int64)


@torch.library.register_fake("draco_ext::digest")
def _(values, seed):  # type: ignore[no-untyped-def]
    return values.new_empty((len(seed), 2), dtype=torch.int64)


def digest_and_stats(values: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Return the digest of a vector, and statistics of the values of each of its tiles, from one read of them.

    The digest is that of `digest`. Squares are summed in float64, in which those of float64 values can overflow: the
    sum is then inf. Reads d elements. Deterministic, whatever the number of threads; between devices, and for float64
    between processors with and without fused multiply-add, the sums of squares may differ in their last bits, and
    nothing else does.

    Args:
        values: (d,) contiguous; float32, float64, float16 or bfloat16.
        seed: the digest's key, 64 bits.

    Returns:
        The digest, (2,) int64, and the statistics, (tiles, 4) float64: a row for each tile of `TILE` elements, the last
        of which may be shorter. Its columns are the sum of squares of the finite values, the largest absolute finite
        value, the number of values that are infinite or NaN, and the number of zeros, +0 and -0.
    """
    _checks.check_tensor("values", values, 1, VOTE_DTYPES)
    _checks.check_contiguous("values", values)
    _checks.check_int("seed", seed, -(2**63), 2**63 - 1)
    result: tuple[Tensor, Tensor] = torch.ops.draco_ext.digest_and_stats(values, seed)
    return result


@torch.library.register_fake("draco_ext::digest_and_stats")
def _(values, seed):  # type: ignore[no-untyped-def]
    tiles = (values.size(0) + TILE - 1) // TILE
    return values.new_empty((2,), dtype=torch.int64), values.new_empty((tiles, 4), dtype=torch.float64)


def digest_stats_and_scale_(values: Tensor, seed: int, factor: float) -> tuple[Tensor, Tensor]:
    """Multiply a vector in place, and return its digest and statistics as they were before, from one read of it.

    Digest and statistics are those of `digest_and_stats`. Products have the bits of ``values.mul_(factor)``, with two
    exceptions: subnormal numbers are kept, whatever `torch.set_flush_denormal` says, and a NaN of 16 bits may be
    another one, as it may be in `mul_`, where it depends on its place. Reads and writes d elements.

    Args:
        values: (d,) contiguous; float32, float64, float16 or bfloat16.
        seed: the digest's key, 64 bits.
        factor: what the values are multiplied by, in float64 for float64 values and in float32 for others.

    Returns:
        The digest, (2,) int64, and the statistics, (tiles, 4) float64; see `digest_and_stats`.
    """
    _checks.check_tensor("values", values, 1, VOTE_DTYPES)
    _checks.check_contiguous("values", values)
    _checks.check_int("seed", seed, -(2**63), 2**63 - 1)
    _checks.check_number("factor", factor)
    result: tuple[Tensor, Tensor] = torch.ops.draco_ext.digest_stats_and_scale_(values, seed, float(factor))
    return result


@torch.library.register_fake("draco_ext::digest_stats_and_scale_")
def _(values, seed, factor):  # type: ignore[no-untyped-def]
    tiles = (values.size(0) + TILE - 1) // TILE
    return values.new_empty((2,), dtype=torch.int64), values.new_empty((tiles, 4), dtype=torch.float64)
