"""Digests of vectors, which ranks compare instead of the vectors, and statistics of their values."""

from __future__ import annotations

import torch
from torch import Tensor

from draco_ext import _checks
from draco_ext.ops.cyclic import TILE
from draco_ext.ops.vote import VOTE_DTYPES

DIGEST_DTYPES = (*VOTE_DTYPES, torch.uint8)


def digest(values: Tensor, seed: int) -> Tensor:
    """Return 128 bits that stand for all bits of a vector: ranks compare them instead of whole messages.

    Vectors of the same bits and seed have the same digest, on every device and machine; -0 and +0 differ, so do NaNs of
    different bits. Over a random seed two vectors that differ in any bit or in length, chosen without knowing the seed,
    have the same digest with a probability of at most 2^-121; who knows the seed can make such vectors. Reads d
    elements. Deterministic, whatever the number of threads.

    Source: NH with a Toeplitz key (Black, Halevi, Krawczyk, Krovetz and Rogaway, UMAC, CRYPTO 1999) over the nine
    chunks that an erasure code makes of every eight (encode, hash, combine: Nandi, FSE 2014), joined by multilinear
    hashing (Carter and Wegman, 1979) with weights from Philox4x32-10.

    Args:
        values: (d,) contiguous; float32, float64, float16, bfloat16, or uint8, as which other types can be viewed.
        seed: the key, 64 bits.

    Returns:
        (2,) int64.
    """
    _checks.check_tensor("values", values, 1, DIGEST_DTYPES)
    _checks.check_contiguous("values", values)
    _checks.check_int("seed", seed, -(2**63), 2**63 - 1)
    result: Tensor = torch.ops.draco_ext.digest(values, seed)
    return result


@torch.library.register_fake("draco_ext::digest")
def _(values, seed):  # type: ignore[no-untyped-def]
    return values.new_empty((2,), dtype=torch.int64)


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
