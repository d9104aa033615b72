"""Every op of `draco_ext.ops` again in plain float64 torch: slow, short, and the oracle that tests compare with.

Written from the mathematics (DRACO, arXiv 1803.09877), not from the kernels: the vote counts, the tables come from the
definition of Lagrange weights, and suspects are found by trying every set of workers, smallest first.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

_INTEGERS = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}


def majority_vote(
    messages: Tensor,
    group_sizes: Sequence[int],
    adversaries: int,
    *,
    missing: Tensor | None = None,
    atol: float = 0.0,
    rtol: float = 0.0,
    mean: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `ops.majority_vote`, the gradient in float64: per element the most frequent bits, or the median."""
    bits = messages.view(_INTEGERS[messages.dtype])
    present = ~missing if missing is not None else torch.ones(len(messages), dtype=torch.bool)
    suspects = torch.zeros(len(messages), dtype=torch.bool)
    failed, winners, first = False, [], 0
    for size in group_sizes:
        members = [j for j in range(first, first + size) if present[j]]
        first += size
        if not members:
            return _failed(messages.size(1), suspects)
        own = messages[members].double()
        if atol > 0 or rtol > 0:
            key = torch.where(bits[members] < 0, bits[members] ^ torch.iinfo(bits.dtype).max, bits[members])
            middle = key.sort(0).indices[(len(members) - 1) // 2]
            winner = own.gather(0, middle[None])[0]
            same = bits[members] == bits[members].gather(0, middle[None])
            gap = (own - winner).abs()
            close = same | (own.isnan() & winner.isnan()) | ((gap <= atol + rtol * winner.abs()) & gap.isfinite())
        else:
            winner_bits = bits[members].mode(0).values
            winner = winner_bits.view(messages.dtype).double()
            close = bits[members] == winner_bits
        agree = close.all(1)
        suspects[members] = ~agree
        tolerated = min(adversaries, (len(members) - 1) // 2)
        failed |= int(agree.sum()) < len(members) - tolerated
        winners.append(winner)
    if failed:
        return _failed(messages.size(1), suspects)
    total = torch.stack(winners).sum(0)
    return total / len(winners) if mean else total, suspects, torch.tensor(False)


def vector_mean(vectors: Sequence[Tensor]) -> Tensor:
    """As `ops.vector_mean`, in float64."""
    return torch.stack([vector.double() for vector in vectors]).mean(0)


def robust_mean(winners: Tensor, lost: Tensor, trim: int | None) -> Tensor:
    """As `codes.robust.robust_mean` with the factor 1, in float64: sorts the rows that are not lost.

    Where an odd number is lost, a trimmed mean is that of two windows, which have the odd one at either end.
    """
    present, count = winners[~lost].double(), len(winners)
    if int(lost.sum()) > ((count - 1) // 2 if trim is None else trim):
        return torch.full_like(winners[0], math.nan, dtype=torch.float64)
    if trim is None:
        infinity = torch.full_like(present[:1], math.inf)
        rows = [present, torch.cat([present, infinity])] if len(present) % 2 == 0 else [present]
        return torch.stack([_lower_median(each) for each in rows]).mean(0)
    ordered = present.nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf).sort(0).values
    low, high = trim - (count - len(present)) // 2, trim - (count - len(present) + 1) // 2
    windows = ordered[low : len(present) - high], ordered[high : len(present) - low]
    return torch.stack(windows).mean((0, 1))


def _lower_median(rows: Tensor) -> Tensor:
    """Return the lower median; NaN everywhere if half of the rows or more are infinitely far from it somewhere."""
    most = (len(rows) - 1) // 2
    middle = rows.nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf).sort(0).values[most]
    apart = ~(rows.isfinite() & middle.isfinite()) & (rows != middle)
    return torch.full_like(middle, math.nan) if int(apart.any(1).sum()) > most else middle


def _failed(d: int, suspects: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.full((d,), math.nan, dtype=torch.float64), suspects, torch.tensor(True)


# ------------------------------------------------------------------------------------------------------ digest


def digest(values: Tensor, seed: int | Sequence[int]) -> Tensor:
    """As `ops.digest`, in numpy's unsigned integers."""
    if isinstance(seed, Sequence):
        return torch.stack([digest(values, one) for one in seed]) if seed else torch.zeros(0, 2, dtype=torch.int64)
    data = values.contiguous().view(torch.uint8).numpy() if len(values) else np.zeros(0, np.uint8)
    line, columns, groups, rows, lanes = 16, 8, 16, 8, 4  # words in a line
    row_cells, low, high = columns + 1, np.uint64(0xFFFFFFFF), np.uint64(32)
    words = np.frombuffer(np.pad(data, (0, -len(data) % (4 * line * columns))).tobytes(), "<u4")
    cells = (rows + 1) * row_cells
    lines = cells - 1 + groups
    key = philox(seed, np.arange(4 * lines + (2 * cells + 2) // 4 + lanes - 1), 4).flatten()
    totals = np.zeros(lanes, np.uint64)

    def nh(parts: np.ndarray, key: np.ndarray) -> np.uint64:
        keyed = (parts.flatten() + key[: parts.size]).astype(np.uint64)
        total: np.uint64 = (keyed[::2] * keyed[1::2]).sum(dtype=np.uint64)
        return total

    def weigh(number: int, sums: np.ndarray) -> np.ndarray:
        w = philox(seed, number * lanes + np.arange(lanes), 5).astype(np.uint64)
        weighed: np.ndarray = (sums & low) * (w[:, 1] << high | w[:, 0]) + (sums >> high) * (w[:, 3] << high | w[:, 2])
        return weighed

    row_words = groups * columns * line
    for number, begin in enumerate(range(0, len(words), rows * row_words)):
        block = words[begin:][: rows * row_words]
        parts = [block[at : at + row_words].reshape(-1, columns, line) for at in range(0, len(block), row_words)]
        extra = np.zeros_like(parts[0])
        for part in parts:
            extra[: len(part)] ^= part
        hashes: list[np.uint64] = []
        for part in (*parts, extra):
            columns_of_part = [*part.swapaxes(0, 1), np.bitwise_xor.reduce(part, axis=1)]
            hashes += [nh(column, key[(len(hashes) + j) * line :]) for j, column in enumerate(columns_of_part)]
        halves = np.array(hashes, "<u8").view("<u4")
        sums = [nh(halves, key[lines * line + 4 * i :]) for i in range(lanes)]
        totals += weigh(number, np.array(sums))
    totals += weigh(2**60, np.full(lanes, len(data), np.uint64))
    return torch.from_numpy((totals >> high).astype("<u4").view("<i8").copy())


def digest_and_stats(values: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """As `ops.digest_and_stats`."""
    rows = []
    for tile in values.cpu().split(32768) if len(values) else ():
        finite = tile[tile.isfinite()].double()
        largest = finite.abs().max().item() if len(finite) else 0.0
        rows.append([finite.square().sum().item(), largest, len(tile) - len(finite), int((tile == 0).sum())])
    return digest(values, seed), torch.tensor(rows, dtype=torch.float64).reshape(-1, 4)


def digest_stats_and_scale_(values: Tensor, seed: int, factor: float) -> tuple[Tensor, Tensor]:
    """As `ops.digest_stats_and_scale_`."""
    found = digest_and_stats(values, seed)
    values.mul_(factor)
    return found


# ------------------------------------------------------------------------------------------------ cyclic code


@functools.lru_cache(maxsize=16)
def cyclic_tables(workers: int, adversaries: int, compression: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Nodes (n,), supports (n, r) and weights from their definitions.

    The weights are (n, n), in long double: hundreds of factors. With `compression` k > 1 they are (n, n, k), solutions
    of the Vandermonde systems of the supports. The arrays are read-only, since calls share them.
    """
    r = 2 * adversaries + compression
    nodes = np.exp(2j * np.arccos(np.longdouble(-1)) * np.arange(workers) / workers)
    offsets = np.array([math.floor(t * workers / r + 0.5) for t in range(r)])
    supports = (np.arange(workers)[:, None] + offsets) % workers
    weights = np.zeros((workers, workers), dtype=np.complex128)
    if compression > 1:
        moments = solon_moments(adversaries, compression)
        window = np.arange(min(moments), min(moments) + r)
        weights = np.zeros((workers, workers, compression), dtype=np.complex128)
        for part, support in enumerate(supports):
            system = np.exp(2j * np.pi * (np.outer(window, support) % workers) / workers)
            weights[support, part] = np.linalg.solve(system, window[:, None] == np.array(moments))
    for part, support in enumerate(supports if compression == 1 else ()):
        for worker in support:
            others = nodes[[i for i in support if i != worker]]
            weights[worker, part] = np.prod(others / (others - nodes[worker]))
    tables = nodes.astype(np.complex128), supports, weights
    for table in tables:
        table.flags.writeable = False
    return tables


def solon_moments(adversaries: int, compression: int) -> list[int]:
    """Return the moments of the messages that are the blocks of the gradient, beside those of the checks 1 .. 2s."""
    below = (compression + 1) // 2
    return [-b for b in range(below)] + [2 * adversaries + 1 + b for b in range(compression - below)]


def _pairs(vectors: Tensor) -> Tensor:
    padded = torch.nn.functional.pad(vectors.double(), (0, vectors.size(-1) % 2))
    return torch.view_as_complex(padded.unflatten(-1, (-1, 2)))


def cyclic_encode(gradients: Tensor, workers: int, adversaries: int, worker: int, *, compression: int = 1) -> Tensor:
    """As `ops.cyclic_encode`, in float64."""
    _, supports, weights = cyclic_tables(workers, adversaries, compression)
    parts = np.flatnonzero((supports == worker).any(1))
    padded = torch.nn.functional.pad(gradients.double(), (0, -gradients.size(1) % (2 * compression)))
    blocks = _pairs(padded.reshape(len(parts), compression, -1))
    own = torch.from_numpy(weights[worker, parts].reshape(len(parts), compression))
    return torch.view_as_real(torch.einsum("pb,pbl->l", own, blocks)).flatten()


def philox(key: int, counter: np.ndarray, domain: int) -> np.ndarray:
    """Philox4x32-10: four words for each counter, (len(counter), 4) uint32."""
    mask, counter = np.uint64(0xFFFFFFFF), counter.astype(np.uint64)
    shift = np.uint64(32)
    c = [counter & mask, counter >> shift, np.full_like(counter, domain), np.zeros_like(counter)]
    k = [key & 0xFFFFFFFF, (key >> 32) & 0xFFFFFFFF]
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [
            (p1 >> shift) ^ c[1] ^ np.uint64(k[0]),
            p1 & mask,
            (p0 >> shift) ^ c[3] ^ np.uint64(k[1]),
            p0 & mask,
        ]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return np.stack(c, 1).astype(np.uint32)


PHI_SCALE = {torch.float32: 2.0**-8, torch.float64: 2.0**-64}


def projection_weights(length: int, seed: int, dtype: torch.dtype) -> Tensor:
    """(projections, length): the random weight of every column of this dtype, the same for both columns of a pair."""

    def signed(words: np.ndarray) -> np.ndarray:
        return np.asarray((words & np.uint32(0x807FFFFF)) | np.uint32(0x3F800000)).view(np.float32)

    chunk, projections = 1024, 4 if length <= 131072 else 2
    columns = np.arange(length)
    phi = signed(philox(seed, columns % chunk // 2, 1))[:, :projections].astype(np.float64)
    psi = signed(philox(seed, columns // chunk, 2))[:, :projections].astype(np.float64)
    return torch.from_numpy((phi * psi).T.copy() * PHI_SCALE[dtype])


def cyclic_project(
    messages: Tensor, seed: int, *, missing: Tensor | None = None, tile: int = 32768
) -> tuple[Tensor, Tensor]:
    """As `ops.cyclic_project`."""
    n, length = messages.shape
    if length == 0:
        return torch.zeros(n, 0, 4, dtype=torch.complex128), torch.zeros(n, 0, dtype=torch.float64)
    present = messages.double().clone()
    if missing is not None:
        present[missing] = 0
    weighted = present[:, None, :] * projection_weights(length, seed, messages.dtype)
    projections, norms = [], []
    for part in weighted.split(tile, dim=2):
        projections.append(_pairs(part).sum(2))
        chunks = torch.nn.functional.pad(part, (0, -part.size(2) % 1024)).unflatten(2, (-1, 64, 16))
        norms.append((chunks.sum(3) ** 2).sum((2, 3)).mean(1).sqrt())
    return torch.stack(projections, 1), torch.stack(norms, 1)


def cyclic_locate(
    projections: Tensor, adversaries: int, noise: Tensor, *, missing: Tensor | None = None, tolerance: float = 6.0
) -> set[int] | None:
    """Return the smallest set of workers without which every check is at the noise, or None; tries all sets.

    Args:
        projections: (n, tiles, k) complex128.
        adversaries: s.
        noise: (tiles,) standard deviation of an honest projection.
        missing: (n,) bool.
        tolerance: how many times the noise a check may reach, as a root mean square.
    """
    n, s = len(projections), adversaries
    absent = set() if missing is None else set(missing.nonzero().flatten().tolist())
    powers = np.outer(np.arange(1, 2 * s + 1), np.arange(n)) % n
    checks = np.exp(2j * np.pi * powers / n) / math.sqrt(n)
    scaled = (projections / noise[:, None]).reshape(n, -1).numpy()
    others = [j for j in range(n) if j not in absent]
    for size in range((2 * s - len(absent)) // 2 + 1):
        for bad in itertools.combinations(others, size):
            erased = sorted(absent | set(bad))
            left = 2 * s - len(erased)
            if left == 0:
                return set(bad)
            basis = np.linalg.qr(checks[:, erased], mode="complete")[0][:, len(erased) :] if erased else np.eye(2 * s)
            check = basis.conj().T @ checks
            check[:, erased] = 0
            energy = (np.abs(check @ scaled) ** 2).sum(0)
            if (energy <= tolerance**2 * left).all():
                return set(bad)
    return None


def decoding_weights(workers: int, adversaries: int, erased: Iterable[int], moment: int = 0) -> np.ndarray:
    """(n,) complex128: b = x^moment + X q, zero on the erased workers, of minimal norm, by least squares."""
    nodes = np.exp(2j * np.pi * np.arange(workers) / workers)
    powers = nodes[:, None] ** np.arange(1, 2 * adversaries + 1)
    answer: np.ndarray = np.exp(2j * np.pi * (np.arange(workers) * moment % workers) / workers)
    erased = sorted(erased)
    if not erased:
        return answer
    q = np.linalg.lstsq(powers[erased], -answer[erased], rcond=None)[0]
    b: np.ndarray = answer + powers @ q
    b[erased] = 0
    return b


def cyclic_combine(messages: Tensor, weights: Tensor, *, length: int | None = None) -> Tensor:
    """As `ops.cyclic_combine`, in float64."""
    rows = weights.reshape(-1, len(messages))
    used = (rows != 0).any(0)
    total = rows[:, used] @ _pairs(messages[used])
    return torch.view_as_real(total).flatten()[: len(rows) * messages.size(1) if length is None else length]
