"""The parts that colluders spoil, and the colluders themselves, found by who agrees with whom on shared parts."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Iterator

import torch
from torch import Tensor

from draco_ext import _checks, ops
from draco_ext.codes.base import Code


def worst_colluders(code: Code, count: int) -> tuple[int, ...]:
    """Return a set of workers that spoils the most parts; see `Code.distorted_parts`.

    Tries all sets, but for those that cannot spoil more than the best one so far. The time grows quickly with `count`:
    seconds for 7 of 25 workers, minutes for 10.

    Args:
        code: the code.
        count: how many workers collude, from 0 to n.
    """
    _checks.check_int("count", count, 0, code.workers)
    need = code.adversaries + 1
    holders = [code.holders(part) for part in range(code.parts)]
    masks = [sum(1 << part for part in code.assignment(worker)) for worker in range(code.workers)]
    most_parts = max(map(int.bit_count, masks))
    best: tuple[int, tuple[int, ...]] = (-1, ())

    def search(chosen: tuple[int, ...], levels: tuple[int, ...]) -> None:
        """Extend a set by later workers; bits of levels[t] are the parts of which t or more have been chosen."""
        nonlocal best
        spoilt, left = levels[need].bit_count(), count - len(chosen)
        if left == 0:
            best = max(best, (spoilt, chosen), key=lambda found: found[0])
            return
        # Parts that lack fewest workers first, as if each worker could be spent on any of them.
        bound, budget = spoilt, left * most_parts
        for lacking in range(1, min(need, left) + 1):
            parts = (levels[need - lacking] & ~levels[need - lacking + 1]).bit_count()
            added = min(parts, budget // lacking)
            bound, budget = bound + added, budget - added * lacking
        if bound <= best[0]:
            return
        for worker in range(chosen[-1] + 1 if chosen else 0, code.workers - left + 1):
            mask = masks[worker]
            raised = (levels[0], *(levels[t] | (levels[t - 1] & mask) for t in range(1, need + 1)))
            search((*chosen, worker), raised)

    search((), ((1 << len(holders)) - 1, *(0 for _ in range(need))))
    return best[1]


def agreement(messages: Tensor, code: Code, *, missing: Tensor | None = None) -> Tensor:
    """Return which workers sent the same gradients, bit for bit, of all parts that they share.

    Compares digests under a key of the operating system's; reads the messages once. Waits for the device.

    Args:
        messages: (n, code.message_length(d)), the messages of a code that sends gradients as they are, in the order of
            the assignment.
        code: a `RepetitionCode` or `ByzShieldCode`.
        missing: (n,) bool; a missing worker agrees with all.

    Returns:
        (n, n) bool on the CPU.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: an argument has a wrong value, or the code combines gradients.
    """
    if not isinstance(code, Code):
        raise TypeError(f"code must be a RepetitionCode or ByzShieldCode, got {type(code).__name__}")
    parts = {worker: code.assignment(worker) for worker in range(code.workers)}
    if not code.exact or code.message_length(1) != len(parts[0]):
        raise ValueError(f"code must be a RepetitionCode or ByzShieldCode, whose messages are gradients, got {code!r}")
    code._check_decode(messages, "mean")
    _checks.check_messages(messages, code.dtypes)
    _checks.check_mask("missing", missing, messages)
    if messages.size(1) % len(parts[0]):
        raise ValueError(f"messages must have {len(parts[0])} gradients in a row, got {messages.size(1)} columns")
    key = secrets.randbits(63)
    rows = messages.unflatten(1, (len(parts[0]), -1)) if messages.size(1) else messages[:, None]
    digests = torch.stack([torch.stack([ops.digest(vector, key) for vector in row]) for row in rows]).tolist()
    sent = {worker: dict(zip(parts[worker], digests[worker], strict=True)) for worker in parts}
    absent = set() if missing is None else set(missing.nonzero().flatten().tolist())
    agrees = torch.ones(code.workers, code.workers, dtype=torch.bool)
    for i, j in itertools.combinations([worker for worker in parts if worker not in absent], 2):
        agrees[i, j] = agrees[j, i] = all(sent[i][part] == sent[j][part] for part in sent[i].keys() & sent[j].keys())
    return agrees


def certain_colluders(agrees: Tensor, count: int) -> tuple[int, ...]:
    """Return the workers that are certainly bad if at most `count` are, from who agrees with whom.

    Honest workers agree with each other. So they are a clique of at least `n - count` workers in the graph of
    agreement, and a worker that is in no such clique is bad. Nobody honest is ever named. Colluders are not named if
    they disagree with so few honest workers that these could be the bad ones.

    Source: Aspis, arXiv 2108.02416, which takes all outside the largest clique for bad if there is a single one. That
    can be honest workers: colluders who disagree with fewer than they are themselves, are in the largest one.

    Args:
        agrees: (n, n) bool, symmetric; see `agreement`.
        count: how many workers may be bad.

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: an argument has a wrong value.
    """
    _checks.check_tensor("agrees", agrees, 2, (torch.bool,))
    n = agrees.size(0)
    if agrees.size(1) != n or not torch.equal(agrees, agrees.T):
        raise ValueError(f"agrees must be a symmetric matrix, got shape {tuple(agrees.shape)}")
    _checks.check_int("count", count, 0, n)
    rows = agrees.tolist()
    neighbours = [sum(1 << j for j in range(n) if j != i and row[j]) for i, row in enumerate(rows)]
    possible = 0
    for clique in _cliques(neighbours, n - count):
        possible |= clique
    return tuple(worker for worker in range(n) if not possible >> worker & 1)


def _cliques(neighbours: list[int], least: int) -> Iterator[int]:
    """Yield the maximal cliques of at least so many workers, as bits: Bron and Kerbosch's algorithm with a pivot."""
    stack = [(0, (1 << len(neighbours)) - 1, 0)]
    while stack:
        clique, candidates, excluded = stack.pop()
        if not candidates | excluded:
            if clique.bit_count() >= least:
                yield clique
            continue
        if clique.bit_count() + candidates.bit_count() < least:
            continue
        pivot = max(_bits(candidates | excluded), key=lambda i: (candidates & neighbours[i]).bit_count())
        for i in _bits(candidates & ~neighbours[pivot]):
            stack.append((clique | 1 << i, candidates & neighbours[i], excluded & neighbours[i]))
            candidates &= ~(1 << i)
            excluded |= 1 << i


def _bits(mask: int) -> Iterator[int]:
    while mask:
        yield (mask & -mask).bit_length() - 1
        mask &= mask - 1
