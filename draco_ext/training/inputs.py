"""The comparison of inputs in the first step: ranks that share a part must compute it from the same inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from draco_ext.codes import Code
from draco_ext.protocol.groups import gather
from draco_ext.reporting.recorder import Recorder
from draco_ext.training.reproducibility import fingerprint, odd_ones_out

# The fingerprint of a mini-batch that was not seen, when only the model's inputs are known.
UNKNOWN = torch.zeros(2, dtype=torch.int64)


@dataclass(frozen=True)
class OtherInputs:
    """The holders of a part whose inputs differ from those of most holders.

    Attributes:
        part: the part.
        workers: the holders.
        cause: the probable mistake, as an instruction for the user.
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
    """Compare the inputs that every rank had for each of its parts.

    Args:
        rows: (ranks, parts of a rank, 2, 2): fingerprints of the mini-batch as it was yielded, or `UNKNOWN`, and of the
            model's inputs.
        code: the assignment of parts to workers.
        ranks: the rank of every worker.

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


class InputCheck:
    """A comparison between ranks of fingerprints of a step's mini-batches and of the model's inputs.

    Args:
        code: the assignment of parts to workers.
        ranks: the rank of every worker.
    """

    def __init__(self, code: Code, ranks: Sequence[int]) -> None:
        self._code = code
        self._ranks = ranks
        self._seen: dict[int, list[Tensor]] = {}  # by part: fingerprints of the mini-batch and the inputs

    def see_batch(self, index: int, batch: Any) -> None:
        """Note the mini-batch of this rank's `index`-th part when it is yielded."""
        self._seen[index] = [fingerprint(batch), UNKNOWN]

    def see_inputs(self, index: int, inputs: Any) -> None:
        """Note the inputs of the first forward pass of this rank's `index`-th part."""
        batch, _ = self._seen.get(index, (UNKNOWN, UNKNOWN))
        self._seen[index] = [batch, fingerprint(inputs)]

    def compare(self, group: dist.ProcessGroup, device: torch.device, recorder: Recorder) -> str | None:
        """Compare with the other ranks.

        Up to s ranks that differ may be bad. They are logged, but cannot stop the others.

        Returns:
            An error message if more than s ranks differ in one part, which means a mistake in the script, else None.
        """
        own = torch.stack([torch.stack(self._seen[i]) for i in range(len(self._seen))])
        for other in compare_inputs(gather(own, group, device), self._code, self._ranks):
            ranks = sorted(self._ranks[j] for j in other.workers)
            if len(ranks) > self._code.adversaries:
                return f"{other.cause}; got others of part {other.part} on {recorder.unit}s {ranks}"
            for rank in ranks:
                recorder.log(
                    "%s has other inputs of part %d than others: %s", recorder.name(rank), other.part, other.cause
                )
        return None
