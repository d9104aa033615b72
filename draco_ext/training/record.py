"""The record of a step: a few numbers about its inputs and state, gathered from every rank in every step."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from draco_ext import ops
from draco_ext.codes import Code
from draco_ext.training.reproducibility import fingerprint

T = TypeVar("T")
Claim = TypeVar("Claim", bound=Hashable)
Digest = tuple[int, int]
# The kinds of state that are replicated on ranks; each has a digest of its own.
SECTIONS = ("parameters", "buffers", "optimizer")


def majority(claims: Mapping[int, Claim]) -> Claim | None:
    """Return the value of more than half of the claims, or None if there is no majority."""
    if not claims:
        return None
    claim, votes = Counter(claims.values()).most_common(1)[0]
    return claim if 2 * votes > len(claims) else None


@dataclass(frozen=True)
class Claims:
    """The records of all ranks in one step; a bad rank's record may contain anything.

    Attributes:
        code: the code.
        inputs: digests of the inputs of each of a worker's parts, by worker.
        state: digests of each of `SECTIONS`, by worker; empty if they were not compared in this step.
        used: whether autograd reached each parameter in each of a worker's parts, by worker; empty if not recorded.
        steps: the number of the step, by worker.
    """

    code: Code
    inputs: dict[int, tuple[Digest, ...]]
    state: dict[int, tuple[Digest, ...]]
    used: dict[int, list[list[bool]]]
    steps: dict[int, int]

    def of_part(self, claims: Mapping[int, Sequence[T]], part: int) -> dict[int, T]:
        """Return the claims of a part's holders about it, by worker."""
        holders = ((j, self.code.assignment(j)) for j in claims)
        return {j: claims[j][parts.index(part)] for j, parts in holders if part in parts}

    def with_other_data(self) -> set[int]:
        """Return the workers whose inputs of a part differ from those of the majority of its holders."""
        odd = set()
        for part in range(self.code.parts):
            inputs = self.of_part(self.inputs, part)
            usual = majority(inputs)
            odd |= {j for j, own in inputs.items() if usual is not None and own != usual}
        return odd

    def used_parameters(self) -> list[bool]:
        """Return whether each parameter is used by any part, according to the majority of the part's holders.

        Without a majority, when more ranks are bad than the code corrects, it counts as used.
        """
        used = [False] * len(next(iter(self.used.values()))[0])
        for part in range(self.code.parts):
            claims = list(self.of_part(self.used, part).values())
            for i, votes in enumerate(map(sum, zip(*claims, strict=True))):
                used[i] |= 2 * votes >= len(claims)
        return used


class StepRecord:
    """This rank's record of a step, while it is being collected.

    Args:
        code: the code.
        worker: this rank's worker number.
        parameters: the parameters that DistributedDataParallel reduces, in the same order on all ranks.
        usage: whether to record which of them autograd reaches.
    """

    def __init__(self, code: Code, worker: int, parameters: Sequence[Tensor], *, usage: bool) -> None:
        self._code = code
        self._parts = len(code.assignment(worker))
        self._parameters = len(parameters) if usage else 0
        self._reached = bytearray(self._parameters)  # in the current part
        if usage:
            for i, parameter in enumerate(parameters):
                # The hook runs when autograd has made a gradient, also within no_sync, but not for the zeros that DDP
                # makes for unused parameters. It must not refer to the model.
                parameter.register_post_accumulate_grad_hook(functools.partial(_reach, self._reached, i))
        self.begin()

    def begin(self) -> None:
        """Begin a step."""
        self._inputs: list[list[Tensor]] = [[] for _ in range(self._parts)]
        self._used: list[bytes] = []
        self._reached[:] = bytes(self._parameters)

    def see(self, part: int, inputs: Any, device: torch.device) -> None:
        """Add the inputs of one forward pass to those of this rank's `part`-th part."""
        self._inputs[part].append(fingerprint(inputs, device))

    def begin_part(self, part: int) -> None:
        """Forget the record of a part."""
        self._inputs[part] = []
        self._reached[:] = bytes(self._parameters)

    def end_part(self, used: bytes | None = None) -> None:
        """End a part after all of its gradients are computed.

        Args:
            used: for each parameter 1 if it is used, else 0; default: if autograd has reached it.
        """
        self._used.append(self.reached() if used is None else used)
        self._reached[:] = bytes(self._parameters)

    def reached(self) -> bytes:
        """Return for each parameter 1 if autograd has reached it in the current part, else 0; empty if not recorded."""
        return bytes(self._reached)

    def is_reached(self, parameter: int) -> bool:
        """Return whether autograd has reached a parameter in the current part."""
        return bool(self._reached[parameter])

    def vector(self, step: int, state: Tensor | None, device: torch.device) -> Tensor:
        """Return the record as a vector; `state` holds the digests of `SECTIONS` if they are compared in this step.

        The length is the same in every step: otherwise a rank at another step would break the others' exchange.
        """
        numbers = [torch.tensor([step, state is not None], device=device)]
        numbers += [_join(digests, device) for digests in self._inputs]
        state = torch.zeros(len(SECTIONS), 2, dtype=torch.int64) if state is None else state
        numbers.append(state.flatten().to(device))
        if self._parameters:
            numbers.append(_pack(b"".join(self._used)).to(device))
        return torch.cat(numbers)

    def read(self, rows: Tensor, missing: Sequence[int]) -> Claims:
        """Return the claims in the gathered records, without those of the missing workers.

        State is compared if a majority has sent it, which is the same decision on all ranks.
        """
        present = [j for j in range(self._code.workers) if j not in missing]
        steps = {j: int(rows[j, 0]) for j in present}
        with_state = majority({j: int(rows[j, 1]) for j in present}) == 1
        inputs, state, used = {}, {}, {}
        for j in present:
            pairs, state_pairs, row = rows[j, 2:].split_with_sizes(
                [2 * self._parts, 2 * len(SECTIONS), rows.shape[1] - 2 - 2 * self._parts - 2 * len(SECTIONS)]
            )
            inputs[j] = digests_in(pairs)
            if with_state:
                state[j] = digests_in(state_pairs)
            if self._parameters:
                bits = _unpack(row, self._parts * self._parameters)
                used[j] = [bits[i : i + self._parameters] for i in range(0, len(bits), self._parameters)]
        return Claims(self._code, inputs, state, used, steps)


def _reach(reached: bytearray, i: int, parameter: Tensor) -> None:
    reached[i] = 1


def _join(digests: list[Tensor], device: torch.device) -> Tensor:
    if not digests:
        return torch.zeros(2, dtype=torch.int64, device=device)
    return digests[0] if len(digests) == 1 else ops.digest(torch.cat(digests).view(torch.uint8), 0)


def digests_in(numbers: Tensor) -> tuple[Digest, ...]:
    """Return the digests that are concatenated in a vector."""
    return tuple((first, second) for first, second in numbers.view(-1, 2).tolist())


_WEIGHTS = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)


def _pack(flags: bytes) -> Tensor:
    """Pack flags (bytes 0 or 1) into the bits of an int64 vector."""
    padded = bytearray(flags) + bytes(-len(flags) % 64)
    bits = torch.frombuffer(padded, dtype=torch.uint8).view(-1, 8) * _WEIGHTS
    return bits.sum(1, dtype=torch.uint8).view(torch.int64)


def _unpack(words: Tensor, count: int) -> list[bool]:
    bits = words.contiguous().view(torch.uint8)[:, None] & _WEIGHTS
    return (bits != 0).flatten()[:count].tolist()
