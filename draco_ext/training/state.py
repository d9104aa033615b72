"""The state that is replicated on all ranks (parameters, buffers, optimizers): its digests, and whose is wrong.

All ranks have the same parameters, so those of the majority are the right ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from draco_ext import ops
from draco_ext.protocol.communicator import Communicator
from draco_ext.training.adapter import Adapter
from draco_ext.training.record import SECTIONS, Digest, majority

CHUNK = 2**20  # bytes; smaller tensors are digested and sent together

Number = int | float | None


class ReplicatedState:
    """The parameters and buffers of a model, and the states of watched optimizers.

    Of parameters and optimizer states that are sharded, this rank's shards are meant.

    Args:
        adapter: gives the parameters and buffers.
    """

    def __init__(self, adapter: Adapter) -> None:
        self._adapter = adapter
        self.device = adapter.device
        self._optimizers: list[torch.optim.Optimizer] = []

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """Add an optimizer's state and the numbers in its `param_groups`."""
        if all(optimizer is not other for other in self._optimizers):
            self._optimizers.append(optimizer)

    def digests(self, key: int) -> Tensor:
        """Return the digests (3, 2) of `SECTIONS`, on the parameters' device. This reads all state once."""
        return torch.stack([self.digest(section, key) for section in SECTIONS])

    def digest(self, section: str, key: int) -> Tensor:
        """Return the digest (2,) of one section; 0 if it is empty."""
        pieces = (_bytes(chunk, chunk[0].device) for chunk in chunks(self._of(section), CHUNK))
        return _join(pieces, key, self.device)

    def layout(self, section: str) -> Tensor:
        """Return a digest (2,) of a section's layout: its shapes, dtypes and structure."""
        text = repr([(tuple(t.shape), t.dtype) for t in self._of(section)])
        if section == "optimizer":
            text += "".join(_structure(optimizer) for optimizer in self._optimizers)
        return ops.digest(torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8), 0).to(self.device)

    def send(self, section: str, communicator: Communicator, worker: int) -> None:
        """Send a section to one worker."""
        for chunk in chunks(self._of(section), CHUNK):
            communicator.send(_bytes(chunk, self.device), worker)

    def receive(self, section: str, communicator: Communicator, worker: int) -> None:
        """Receive a section of the same layout from one worker, in place."""
        tensors = self._of(section)
        for chunk in chunks(tensors, CHUNK):
            arrived = torch.empty(_size(chunk), dtype=torch.uint8, device=self.device)
            communicator.receive(arrived, worker)
            _fill(chunk, arrived)
        self._put_numbers(section, tensors)

    def size(self, section: str) -> int:
        """Return the size of a section in bytes."""
        return _size(self._of(section))

    def to_bytes(self, section: str) -> Tensor:
        """Return a copy of a section as bytes on the CPU."""
        pieces = [_bytes(chunk, torch.device("cpu")) for chunk in chunks(self._of(section), CHUNK)]
        return torch.cat([torch.empty(0, dtype=torch.uint8), *pieces])

    def from_bytes(self, section: str, values: Tensor) -> None:
        """Set a section from the result of `to_bytes` on a rank with the same layout."""
        tensors = self._of(section)
        divided = list(chunks(tensors, CHUNK))
        for chunk, piece in zip(divided, values.split(list(map(_size, divided))), strict=True):
            _fill(chunk, piece)
        self._put_numbers(section, tensors)

    def digest_of_bytes(self, section: str, values: Tensor, key: int) -> Tensor:
        """Return the `digest` of a section that is given as bytes."""
        sizes = list(map(_size, chunks(self._of(section), CHUNK)))
        return _join((piece.clone() for piece in values.split(sizes)), key, self.device)

    def _of(self, section: str) -> list[Tensor]:
        if section == "parameters":
            return _strided(self._adapter.replicated_parameters())
        if section == "buffers":
            # Looked up every time, since a module may replace a buffer by another tensor.
            return _strided(self._adapter.replicated_buffers())
        tensors, numbers = [], []
        for leaf in (leaf for optimizer in self._optimizers for leaf in _leaves(optimizer)[0]):
            if isinstance(leaf, Tensor) and leaf.layout == torch.strided:
                tensors.append(own_shard(leaf))
            elif _is_number(leaf):
                numbers.append(leaf)
        # Adam's step counts may be on the CPU while its moments are on a GPU; sorting keeps each device together.
        tensors.sort(key=lambda tensor: tensor.device.type != "cpu")
        return [*tensors, _encode(numbers)] if numbers else tensors

    def _put_numbers(self, section: str, tensors: list[Tensor]) -> None:
        if section != "optimizer" or not self._optimizers:
            return
        numbers = iter(_decode(tensors[-1]))
        for optimizer in self._optimizers:
            leaves, structure = _leaves(optimizer)
            leaves = [next(numbers) if _is_number(leaf) else leaf for leaf in leaves]
            groups, states = pytree.tree_unflatten(leaves, structure)
            for group, values in zip(optimizer.param_groups, groups, strict=True):
                group.update(values)
            for parameter, values in zip(_parameters(optimizer), states, strict=True):
                if values:
                    optimizer.state[parameter].update(values)


def own_shard(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a DTensor; any other tensor is returned as it is."""
    local: Tensor = getattr(tensor, "_local_tensor", tensor)
    return local


def _strided(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor.layout == torch.strided]


def chunks(
    tensors: Iterable[Tensor], limit: int, kind: Callable[[Tensor], object] = lambda tensor: tensor.device
) -> Iterator[list[Tensor]]:
    """Divide tensors into lists. Each list is of one kind, and has a single tensor or at most `limit` bytes.

    Every tensor is in a list, in the given order, also one without elements.
    """
    chunk: list[Tensor] = []
    length = 0
    for tensor in tensors:
        if chunk and (length + tensor.nbytes > limit or kind(tensor) != kind(chunk[0])):
            yield chunk
            chunk, length = [], 0
        chunk.append(tensor)
        length += tensor.nbytes
    if chunk:
        yield chunk


def _join(pieces: Iterable[Tensor], key: int, device: torch.device) -> Tensor:
    digests = [ops.digest(piece, (key + 1 + i) % 2**63).to(device) for i, piece in enumerate(pieces)]
    if not digests:
        return torch.zeros(2, dtype=torch.int64, device=device)
    return ops.digest(torch.cat(digests).view(torch.uint8), key)


def _size(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _bytes(chunk: list[Tensor], device: torch.device) -> Tensor:
    pieces = [tensor.detach().contiguous().view(-1).view(torch.uint8) for tensor in chunk]
    return (torch.cat(pieces) if len(pieces) > 1 else pieces[0]).to(device)


@torch.no_grad()
def _fill(chunk: list[Tensor], arrived: Tensor) -> None:
    for tensor, piece in zip(chunk, arrived.split([tensor.nbytes for tensor in chunk]), strict=True):
        # Cloned, since a view with longer elements needs an aligned start.
        tensor.detach().copy_(piece.clone().view(tensor.dtype).view(tensor.shape))


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _leaves(optimizer: torch.optim.Optimizer) -> tuple[list[Any], pytree.TreeSpec]:
    groups = [{name: group[name] for name in sorted(group) if name != "params"} for group in optimizer.param_groups]
    states = [optimizer.state.get(parameter, {}) for parameter in _parameters(optimizer)]
    states = [{name: state[name] for name in sorted(state)} for state in states]
    return pytree.tree_flatten([groups, states])


def _structure(optimizer: torch.optim.Optimizer) -> str:
    leaves, structure = _leaves(optimizer)
    kinds = [
        leaf if isinstance(leaf, str) else "number" if _is_number(leaf) else type(leaf).__name__ for leaf in leaves
    ]
    return f"{structure} {kinds}"


def _is_number(leaf: object) -> bool:
    return leaf is None or isinstance(leaf, float) or (isinstance(leaf, int) and abs(leaf) < 2**63)


def _encode(numbers: Sequence[Number]) -> Tensor:
    """Return numbers as int64, two for each: its type and its bits."""
    pairs = torch.zeros(len(numbers), 2, dtype=torch.int64)
    for pair, number in zip(pairs, numbers, strict=True):
        if isinstance(number, float):
            pair[0], pair[1] = 1, torch.tensor(number, dtype=torch.float64).view(torch.int64)
        elif number is not None:
            pair[0], pair[1] = 3 if isinstance(number, bool) else 2, int(number)
    return pairs


def _decode(pairs: Tensor) -> list[Number]:
    numbers: list[Number] = []
    for (kind, value), pair in zip(pairs.tolist(), pairs, strict=True):
        numbers.append({1: pair[1].view(torch.float64).item(), 2: value, 3: bool(value)}.get(kind))
    return numbers


# -------------------------------------------------------------------------------------------------- verdict


@dataclass(frozen=True)
class StateVerdict:
    """The workers whose state is wrong, and those whose state is right.

    Attributes:
        wrong: the wrong sections of each worker that has any.
        right: by section and worker, the workers of the majority in its pool.
        undecided: the sections without a majority.
    """

    wrong: dict[int, tuple[str, ...]]
    right: dict[tuple[str, int], tuple[int, ...]]
    undecided: tuple[str, ...]

    def with_wrong(self, section: str) -> set[int]:
        """Return the workers for which this section is wrong."""
        return {j for j, sections in self.wrong.items() if section in sections}


# By section and worker, the workers that have the same state, itself included.
Pools = Mapping[str, Mapping[int, tuple[int, ...]]]


def judge(claims: Mapping[int, Sequence[Digest]], pools: Pools) -> StateVerdict:
    """Compare digests of `SECTIONS`.

    Args:
        claims: the digests of each worker that is not missing.
        pools: with whom each worker is compared. If a pool has no majority of buffers, for instance because a module
            keeps data of its own rank in a buffer, no buffer is wrong.
    """
    wrong: dict[int, list[str]] = {}
    right: dict[tuple[str, int], tuple[int, ...]] = {}
    undecided = []
    for i, section in enumerate(SECTIONS):
        for j in claims:
            pool = {k: claims[k][i] for k in pools[section][j] if k in claims}
            usual = majority(pool)
            if usual is None:
                if section != "buffers" and section not in undecided:
                    undecided.append(section)
            elif claims[j][i] != usual:
                wrong.setdefault(j, []).append(section)
                right[section, j] = tuple(k for k, digest in pool.items() if digest == usual)
    return StateVerdict({j: tuple(wrong[j]) for j in sorted(wrong)}, right, tuple(undecided))
