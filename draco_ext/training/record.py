"""The record of a step: a few numbers from every rank, gathered in every step, about what it has computed from what."""

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
# What is replicated on ranks, each with a digest of its own.
SECTIONS = ("parameters", "buffers", "optimizer")


def majority(claims: Mapping[int, Claim]) -> Claim | None:
    """Return what more than half of the claims say, or None where there is no such thing."""
    if not claims:
        return None
    claim, votes = Counter(claims.values()).most_common(1)[0]
    return claim if 2 * votes > len(claims) else None


@dataclass(frozen=True)
class Claims:
    """The records of all ranks in one step, as claimed: a bad rank's may say anything.

    Attributes:
        inputs: digests of the inputs of each of its parts, by worker.
        state: digests of each of `SECTIONS`, by worker; empty where they were not compared in this step.
        used: for each of its parts and each parameter, whether autograd reached it, by worker; empty where not asked.
        steps: the number of the step, by worker.
    """

    code: Code
    inputs: dict[int, tuple[Digest, ...]]
    state: dict[int, tuple[Digest, ...]]
    used: dict[int, list[list[bool]]]
    steps: dict[int, int]

    def of_part(self, claims: Mapping[int, Sequence[T]], part: int) -> dict[int, T]:
        """Return what the holders of a part claim about it."""
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
        """Return for each parameter whether a part uses it, by the majority of the part's holders.

        Without a majority, where more ranks are bad than the code corrects, it counts as used.
        """
        used = [False] * len(next(iter(self.used.values()))[0])
        for part in range(self.code.parts):
            claims = list(self.of_part(self.used, part).values())
            for i, votes in enumerate(map(sum, zip(*claims, strict=True))):
                used[i] |= 2 * votes >= len(claims)
        return used


class StepRecord:
    """Collects this rank's record of a step.

    Args:
        code: the code.
        worker: the worker that this rank is.
        parameters: those that DistributedDataParallel reduces, in an order that is the same on all ranks.
        usage: whether to find out which of them autograd reaches.
    """

    def __init__(self, code: Code, worker: int, parameters: Sequence[Tensor], *, usage: bool) -> None:
        self._code = code
        self._parts = len(code.assignment(worker))
        self._parameters = len(parameters) if usage else 0
        self._reached = bytearray(self._parameters)  # in the part that runs
        if usage:
            for i, parameter in enumerate(parameters):
                # Runs where autograd has made a gradient, also within no_sync; DDP's zeros for unused parameters do
                # not come this way. The hook must not hold the model.
                parameter.register_post_accumulate_grad_hook(functools.partial(_reach, self._reached, i))
        self.begin()

    def begin(self) -> None:
        """Begins a step."""
        self._inputs: list[list[Tensor]] = [[] for _ in range(self._parts)]
        self._used: list[bytes] = []
        self._reached[:] = bytes(self._parameters)

    def see(self, part: int, inputs: Any, device: torch.device) -> None:
        """Adds the inputs of one forward pass to those of this rank's `part`-th part; its first begins the part."""
        self._inputs[part].append(fingerprint(inputs, device))

    def begin_part(self, part: int) -> None:
        """Forgets what was seen of a part."""
        self._inputs[part] = []
        self._reached[:] = bytes(self._parameters)

    def end_part(self) -> None:
        """Ends a part: all of its gradients are there."""
        self._used.append(bytes(self._reached))
        self._reached[:] = bytes(self._parameters)

    def is_reached(self, parameter: int) -> bool:
        """Return whether autograd has reached a parameter in the part that runs."""
        return bool(self._reached[parameter])

    def vector(self, step: int, state: Tensor | None, device: torch.device) -> Tensor:
        """Return the record as numbers; `state` is the digests of `SECTIONS`, where they are compared.

        Always as many: a rank that counts the steps otherwise would break the others' exchange.
        """
        numbers = [torch.tensor([step, state is not None], device=device)]
        numbers += [_join(digests, device) for digests in self._inputs]
        state = torch.zeros(len(SECTIONS), 2, dtype=torch.int64) if state is None else state
        numbers.append(state.flatten().to(device))
        if self._parameters:
            numbers.append(_pack(b"".join(self._used)).to(device))
        return torch.cat(numbers)

    def read(self, rows: Tensor, missing: Sequence[int]) -> Claims:
        """Return what the gathered records say, but for those of the missing workers.

        State is compared where a majority says so, on all ranks alike.
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
    """Return the digests that stand behind each other in a vector."""
    return tuple((first, second) for first, second in numbers.view(-1, 2).tolist())


_WEIGHTS = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)


def _pack(flags: bytes) -> Tensor:
    """Return flags, each a byte 0 or 1, as bits of int64."""
    padded = bytearray(flags) + bytes(-len(flags) % 64)
    bits = torch.frombuffer(padded, dtype=torch.uint8).view(-1, 8) * _WEIGHTS
    return bits.sum(1, dtype=torch.uint8).view(torch.int64)


def _unpack(words: Tensor, count: int) -> list[bool]:
    bits = words.contiguous().view(torch.uint8)[:, None] & _WEIGHTS
    return (bits != 0).flatten()[:count].tolist()
