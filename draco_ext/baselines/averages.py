"""Plain and robust averages of messages."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from draco_ext import _checks, ops
from draco_ext.codes.robust import sorting_network

DTYPES = (torch.float32, torch.float64)

# Columns processed at once on a CPU: enough to use its threads, few enough to stay in its cache.
_TILE = 65536


def _check(messages: Tensor, adversaries: int = 0, spare: int = 1) -> None:
    """Raise unless messages is a matrix with at least 2 * adversaries + spare rows."""
    _checks.check_messages(messages, DTYPES)
    _checks.check_int("adversaries", adversaries, 0)
    needed = 2 * adversaries + spare
    if messages.size(0) < needed:
        raise ValueError(
            f"messages must have at least 2 * adversaries + {spare} = {needed} rows, got shape {tuple(messages.shape)}"
        )


def _tiles(messages: Tensor) -> tuple[Tensor, ...]:
    """Return the columns in tiles on a CPU, and all columns at once on other devices."""
    return messages.split(_TILE, dim=1) if messages.is_cpu else (messages,)


def mean(messages: Tensor) -> Tensor:
    """Return the plain average, which one bad worker can move anywhere.

    Args:
        messages: (n, d).

    Returns:
        (d,).
    """
    _check(messages)
    return messages.mean(dim=0)


def _sorted_rows(messages: Tensor) -> Iterator[list[Tensor]]:
    """Yield the n rows of each tile of columns, sorted within every column; a NaN makes its whole column NaN.

    A network of row-wise minima and maxima is several times faster than torch.sort or torch.median,
    which gather each column with a stride.
    """
    network = list(sorting_network(messages.size(0)))
    for tile in _tiles(messages):
        rows = list(tile)
        for i, j in network:
            rows[i], rows[j] = torch.minimum(rows[i], rows[j]), torch.maximum(rows[i], rows[j])
        yield rows


def coordinate_median(messages: Tensor) -> Tensor:
    """Return the median of every coordinate; with an even number of messages, the mean of the middle two.

    A coordinate in which any message is NaN is NaN.

    Source: Yin et al., "Byzantine-Robust Distributed Learning", 2018 (arXiv 1803.01498).

    Args:
        messages: (n, d).

    Returns:
        (d,).
    """
    _check(messages)
    low, high = (messages.size(0) - 1) // 2, messages.size(0) // 2
    if low == high:
        return torch.cat([rows[low] for rows in _sorted_rows(messages)])
    return torch.cat([(rows[low] + rows[high]) / 2 for rows in _sorted_rows(messages)])


def trimmed_mean(messages: Tensor, adversaries: int) -> Tensor:
    """Return the mean of every coordinate without its s smallest and s largest values.

    A coordinate in which any message is NaN is NaN.

    Source: Yin et al., "Byzantine-Robust Distributed Learning", 2018 (arXiv 1803.01498).

    Args:
        messages: (n, d), n >= 2s+1.
        adversaries: s.

    Returns:
        (d,).
    """
    _check(messages, adversaries)
    kept = slice(adversaries, messages.size(0) - adversaries)
    count = messages.size(0) - 2 * adversaries
    return torch.cat([sum(rows[kept], start=torch.zeros(())) / count for rows in _sorted_rows(messages)])


def _krum_scores(messages: Tensor, adversaries: int) -> Tensor:
    """Return, for each message, the sum of its squared distances to the n-s-2 nearest others.

    The distances come from the Gram matrix. In float32 its rounding hides distances below about
    3e-4 of the norms. A message that is not finite is infinitely far from all others.
    """
    gram = (messages @ messages.T).double()
    norms = gram.diagonal()
    squared = (norms[:, None] + norms - 2 * gram).clamp_min(0)
    squared.nan_to_num_(nan=math.inf, posinf=math.inf).fill_diagonal_(math.inf)
    neighbours = messages.size(0) - adversaries - 2
    return squared.topk(neighbours, dim=1, largest=False).values.sum(dim=1)


def krum(messages: Tensor, adversaries: int) -> Tensor:
    """Return the message that is nearest to its n-s-2 nearest others.

    Source: Blanchard et al., "Machine Learning with Adversaries", 2017 (arXiv 1703.02757).

    Args:
        messages: (n, d), n >= 2s+3.
        adversaries: s.

    Returns:
        (d,), a copy of one of the messages.
    """
    _check(messages, adversaries, spare=3)
    return messages[_krum_scores(messages, adversaries).argmin()].clone()


def multi_krum(messages: Tensor, adversaries: int, selected: int | None = None) -> Tensor:
    """Return the mean of the messages with the smallest Krum scores.

    Source: Blanchard et al., "Machine Learning with Adversaries", 2017 (arXiv 1703.02757).

    Args:
        messages: (n, d), n >= 2s+3.
        adversaries: s.
        selected: how many messages, from 1 (Krum) to n-s; n-s-2 by default.

    Returns:
        (d,).
    """
    _check(messages, adversaries, spare=3)
    honest = messages.size(0) - adversaries
    selected = honest - 2 if selected is None else selected
    _checks.check_int("selected", selected, 1, honest)
    scores = _krum_scores(messages, adversaries)
    weights = torch.zeros_like(scores)
    weights[scores.topk(selected, largest=False).indices] = 1 / selected
    return weighted_sum(messages, weights)


def weighted_sum(messages: Tensor, weights: Tensor) -> Tensor:
    """Return the sum of weights[i] * messages[i] over the weights that are not 0."""
    weights = weights.to(messages.dtype)
    total = weights @ messages
    used = weights != 0
    if used.all() or total.isfinite().all():
        return total
    # Messages of weight 0 are left out, since 0 * NaN is NaN; this costs a copy.
    return weights[used] @ messages[used]


def _inverse_distances(distances: Tensor, usable: Tensor, floor: float) -> Tensor:
    """Return Weiszfeld's weights, which add up to 1; 0 for messages that are not usable."""
    weights = torch.where(usable, 1 / distances.clamp_min(floor), 0.0)
    return weights / weights.sum()


def _check_weiszfeld(messages: Tensor, iterations: int, tolerance: float, smoothing: float) -> None:
    _check(messages)
    _checks.check_int("iterations", iterations, 1)
    _checks.check_tolerance("tolerance", tolerance)
    _checks.check_tolerance("smoothing", smoothing)


# The smallest distance, so that the sum of inverse distances is finite.
_TINY = 1e-150


def geometric_median(
    messages: Tensor,
    *,
    iterations: int = 100,
    tolerance: float = 1e-6,
    smoothing: float = 1e-6,
) -> Tensor:
    """Return the point with the smallest sum of distances to the messages, by Weiszfeld's algorithm.

    Starts from the mean. Each iteration reads the messages twice: once for their distances to the
    point, once for their mean weighted by the inverse distances, which is the next point.
    Messages whose norm is not finite are left out; if all are, the result is NaN.

    Source: Weiszfeld, "Sur le point pour lequel la somme des distances de n points donnés est
    minimum", 1937; smoothed as by Pillutla et al., 2019 (arXiv 1912.13445).

    Args:
        messages: (n, d).
        iterations: the most iterations.
        tolerance: stop when the point moves by no more than this, relative to the median norm of
            the messages.
        smoothing: smallest distance to count with, relative to the median norm of the messages.

    Returns:
        (d,).
    """
    _check_weiszfeld(messages, iterations, tolerance, smoothing)
    norms = torch.linalg.vector_norm(messages, dim=1).double()
    usable = norms.isfinite()
    if not usable.any():
        return messages.new_full((messages.size(1),), math.nan)
    scale = norms[usable].median().item()
    floor = max(smoothing * scale, _TINY)

    point = weighted_sum(messages, usable.double() / usable.sum())
    for _ in range(iterations):
        # Row by row, so that the differences do not need a second matrix.
        distances = torch.stack([torch.dist(row, point) for row in messages]).double()
        weights = _inverse_distances(distances, usable, floor)
        previous, point = point, weighted_sum(messages, weights)
        if torch.dist(previous, point) <= tolerance * scale:
            break
    return point


def geometric_median_gram(
    messages: Tensor,
    *,
    iterations: int = 100,
    tolerance: float = 1e-6,
    smoothing: float = 1e-6,
) -> Tensor:
    """Return the result of `geometric_median`, computed from the Gram matrix of the messages.

    Every point that Weiszfeld's algorithm visits is a weighted mean w of the messages X, and its
    distances to them follow from the n x n matrix G = X X^T: the square of the i-th is
    G_ii - 2 (G w)_i + w^T G w. So the algorithm runs on n numbers in float64, and the messages are
    read only twice: for G and for the final weighted sum. In float32, G resolves distances down
    to about 3e-4 of the norms.

    Source: see `geometric_median`.

    Args:
        messages: (n, d).
        iterations: the most iterations.
        tolerance: stop when the point moves by no more than this, relative to the median norm of
            the messages.
        smoothing: smallest distance to count with, relative to the median norm of the messages.

    Returns:
        (d,).
    """
    _check_weiszfeld(messages, iterations, tolerance, smoothing)
    gram = (messages @ messages.T).double()
    usable = gram.diagonal().isfinite()
    if not usable.any():
        return messages.new_full((messages.size(1),), math.nan)
    gram = torch.where(usable[:, None] & usable, gram, 0.0)
    squared_norms = gram.diagonal()
    scale = squared_norms[usable].median().sqrt().item()
    floor = max(smoothing * scale, _TINY)

    weights = usable.double() / usable.sum()
    for _ in range(iterations):
        products = gram @ weights
        distances = (squared_norms - 2 * products + weights @ products).clamp_min(0).sqrt()
        previous, weights = weights, _inverse_distances(distances, usable, floor)
        step = weights - previous
        if (step @ gram @ step).clamp_min(0).sqrt() <= tolerance * scale:
            break
    return weighted_sum(messages, weights)


def vote_torch(messages: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Return the majority vote of the repetition code, in plain torch, for comparison.

    In each group of consecutive workers, the message that most members sent, bit for bit, wins.

    Source: DRACO (arXiv 1803.09877), the repetition code.

    Args:
        messages: (n, d), any floating dtype of 16, 32 or 64 bits.
        group_size: members of each group; divides n.

    Returns:
        gradient (d,), the mean of the groups' winners; suspects (n,) bool, the workers that sent another message.

    Raises:
        ValueError: in some group no message has a majority, or an argument is wrong.
    """
    _checks.check_messages(messages, ops.VOTE_DTYPES)
    _checks.check_int("group_size", group_size, 1)
    n = messages.size(0)
    if n % group_size:
        raise ValueError(f"group_size must divide the {n} messages, got {group_size}")
    # Integers compare by bits: NaN equals itself, and -0 differs from 0.
    bits = messages.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[messages.element_size()])
    agree: list[bool] = []
    gradient = torch.zeros_like(messages[0])
    for group in torch.arange(n).split(group_size):
        for winner in group.tolist():
            same = [torch.equal(bits[winner], bits[member]) for member in group.tolist()]
            if 2 * sum(same) > group_size:
                break
        else:
            raise ValueError(f"messages must have a majority in group {group.tolist()}, got none")
        agree += same
        gradient += messages[winner]
    return gradient.div_(n // group_size), ~torch.tensor(agree, device=messages.device)


AGGREGATORS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "mean": lambda messages, adversaries: mean(messages),
    "coordinate-median": lambda messages, adversaries: coordinate_median(messages),
    "trimmed-mean": trimmed_mean,
    "krum": krum,
    "multi-krum": multi_krum,
    "geometric-median": lambda messages, adversaries: geometric_median(messages),
    "geometric-median-gram": lambda messages, adversaries: geometric_median_gram(messages),
}
"""The rules by name, all to be called with the messages and the number of adversaries."""
