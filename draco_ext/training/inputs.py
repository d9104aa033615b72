"""Whether ranks that share a part compute it from the same inputs; and if not, why not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from draco_ext.codes import Code
from draco_ext.training.reproducibility import odd_ones_out

# What is known of a mini-batch of which only the model's inputs were seen.
UNKNOWN = torch.zeros(2, dtype=torch.int64)


@dataclass(frozen=True)
class OtherInputs:
    """Holders of a part whose inputs are not those of most holders.

    Attributes:
        part: the part.
        workers: the holders.
        cause: what is to be done about it.
    """

    part: int
    workers: tuple[int, ...]
    cause: str


_SAMPLER = (
    "give ranks that share a part the same mini-batches of it, those of a RedundantBatchSampler with the same seed "
    "and data"
)
_DRAWS = (
    "draw random numbers between mini-batch and forward pass from the global generators of torch, numpy or random, "
    "which the guard seeds alike on ranks that share a part"
)
BATCHES = f"loader must {_SAMPLER}"
DRAWS = f"the mini-batches are the same, but what was made of them is not: {_DRAWS}"
EITHER = f"loader must {_SAMPLER}, and the loop must {_DRAWS}"


def compare_inputs(rows: Tensor, code: Code, ranks: Sequence[int]) -> list[OtherInputs]:
    """Compare what every rank had of each of its parts.

    Args:
        rows: (ranks, parts of a rank, 2, 2): fingerprints of the mini-batch as it was handed out, or `UNKNOWN`, and of
            the model's inputs.
        code: who computes which part.
        ranks: of every worker.

    Returns:
        One entry for each part whose holders do not agree.
    """
    holders: list[list[tuple[int, Tensor]]] = [[] for _ in range(code.parts)]
    for worker in range(code.workers):
        for i, part in enumerate(code.assignment(worker)):
            holders[part].append((worker, rows[ranks[worker], i]))
    found = []
    for part, of_part in enumerate(holders):
        batches, inputs = torch.stack([row for _, row in of_part]).unbind(1)
        odd = odd_ones_out(inputs)
        if not odd:
            continue
        others = set(odd) & set(odd_ones_out(batches))
        cause = EITHER if (batches == UNKNOWN).all() else BATCHES if others else DRAWS
        found.append(OtherInputs(part, tuple(of_part[i][0] for i in odd), cause))
    return found
