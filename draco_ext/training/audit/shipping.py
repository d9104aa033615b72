"""The inputs of a part (mini-batches, random numbers, buffers) as bytes, and their way to other ranks."""

from __future__ import annotations

import copy as copying
import json
import random
import sys
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from draco_ext.protocol.communicator import Communicator
from draco_ext.training.ddp import has_no_gaps

ALIGNMENT = 16  # bytes; a view with longer elements needs an aligned start
_PLAIN = (bool, int, float, str, type(None))


def generator_states(device: torch.device) -> dict[str, Any]:
    """Return the states of the global generators of torch, Python and, if it is loaded, numpy; of one GPU at most."""
    numpy = sys.modules.get("numpy")
    version, words, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "python": [version, torch.tensor(words), gauss],
        "numpy": None if numpy is None else numpy.random.get_state(legacy=False),
    }


def set_generator_states(states: Mapping[str, Any], device: torch.device) -> None:
    """Set the global generators to the states that `generator_states` has returned, on this rank or on another."""
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    if states["numpy"] is not None and (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.set_state(states["numpy"])


# ------------------------------------------------------------------------------------------------ as bytes


def pack(value: Any) -> Tensor:
    """Return nested data as bytes on the CPU: tensors, arrays, numbers, strings and None in containers.

    Raises:
        TypeError: something else is among the data.
    """
    leaves, structure = pytree.tree_flatten(_with_plain_mappings(value))
    described, pieces, length = [], [], 0
    for leaf in leaves:
        entry, tensor = _describe(leaf)
        described.append(entry)
        if tensor is not None:
            piece = tensor.view(-1).view(torch.uint8)
            padding = -piece.numel() % ALIGNMENT
            pieces += [piece, torch.zeros(padding, dtype=torch.uint8)]
            length += piece.numel() + padding
    header = json.dumps([str(structure), _serialised(structure), described]).encode()
    header += b" " * (-(len(header) + 8) % ALIGNMENT)
    begin = len(header).to_bytes(8, "little") + header
    return torch.cat([torch.frombuffer(bytearray(begin), dtype=torch.uint8), *pieces])


def unpack(data: Tensor, like: Any, device: torch.device) -> Any:
    """Return what `pack` was given on another rank.

    Args:
        data: the bytes.
        like: this rank's own value, in whose containers the data are put if they have the same structure.
        device: where tensors that are on a GPU of the other rank are put.

    Raises:
        TypeError: the data are in containers that this rank does not know.
    """
    data = data.cpu()
    length = int.from_bytes(bytes(data[:8].tolist()), "little")
    structure_name, serialised, described = json.loads(bytes(data[8 : 8 + length].tolist()))
    place = 8 + length
    leaves = []
    for entry in described:
        if "value" in entry:
            leaves.append(entry["value"])
            continue
        dtype, shape = getattr(torch, entry["dtype"]), entry["shape"]
        size = dtype.itemsize * torch.Size(shape).numel()
        tensor = data[place : place + size].clone().view(dtype)
        place += size + -size % ALIGNMENT
        if entry["kind"] == "array":
            leaves.append(tensor.view(shape).numpy())
        else:
            tensor = _as_strided(tensor, shape, entry["strides"])
            tensor = tensor.to(device if entry["device"] != "cpu" else "cpu")
            leaves.append(tensor.requires_grad_(entry["requires_grad"]))
    own = pytree.tree_flatten(_with_plain_mappings(like))[1]
    if str(own) == structure_name:
        return _with_mappings_of(like, pytree.tree_unflatten(leaves, own))
    if serialised is None:
        raise TypeError(_unknown(structure_name))
    return pytree.tree_unflatten(leaves, pytree.treespec_loads(serialised))


def copy(value: Any) -> Any:
    """Return a copy of nested data that `pack` takes, so that neither changes with the other."""
    return _map(_copy_of_leaf, value)


def _copy_of_leaf(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return _as_strided(_dense(leaf), leaf.shape, leaf.stride()).requires_grad_(leaf.requires_grad)
    return leaf if type(leaf) in _PLAIN else leaf.copy()


def _map(function: Callable[[Any], Any], value: Any) -> Any:
    """Apply a function to all leaves, also of mappings that pytree does not know, as tokenizers return them."""

    def on_leaf(leaf: Any) -> Any:
        if not isinstance(leaf, Mapping):
            return function(leaf)
        return _mapping_like(leaf, {key: _map(function, inner) for key, inner in leaf.items()})

    return pytree.tree_map(on_leaf, value)


def _with_plain_mappings(value: Any) -> Any:
    """Return a value in which mappings that pytree does not know are dicts."""
    return pytree.tree_map(lambda leaf: _with_plain_mappings(dict(leaf)) if isinstance(leaf, Mapping) else leaf, value)


def _with_mappings_of(like: Any, value: Any) -> Any:
    """Return a value, in which mappings are dicts, with the types of mappings of another one of the same structure."""

    def on_leaf(own: Any, leaf: Any) -> Any:
        if not isinstance(own, Mapping):
            return leaf
        return _mapping_like(own, {key: _with_mappings_of(own[key], inner) for key, inner in leaf.items()})

    return pytree.tree_map(on_leaf, like, value)


def _mapping_like(like: Mapping[Any, Any], items: dict[Any, Any]) -> Mapping[Any, Any]:
    """Return a mapping of the same type with other values; a dict if it cannot be changed."""
    if not isinstance(like, MutableMapping):
        return items
    made = copying.copy(like)
    made.update(items)
    return made


def _dense(values: Tensor) -> Tensor:
    """Return a copy of a tensor's elements without gaps: in the order of memory if it has none, else row by row."""
    values = values.detach().resolve_conj().resolve_neg()
    if has_no_gaps(values):
        return values.as_strided((values.numel(),), (1,), values.storage_offset()).clone()
    return values.flatten().clone()


def _as_strided(dense: Tensor, shape: Sequence[int], strides: Sequence[int]) -> Tensor:
    """Return the tensor whose elements `_dense` has returned.

    It has the same strides: an operation may round differently with others.
    """
    if has_no_gaps(torch.empty_strided(shape, strides, device="meta")):
        return dense.as_strided(shape, strides)
    made = torch.empty_strided(shape, strides, dtype=dense.dtype, device=dense.device)
    once = tuple(slice(1) if stride == 0 else slice(None) for stride in strides)  # the rest is the same memory
    made[once] = dense.view(shape)[once]
    return made


def _describe(leaf: Any) -> tuple[dict[str, Any], Tensor | None]:
    """Return a leaf's entry in the header, and its data if it is a tensor or an array."""
    if type(leaf) in _PLAIN:
        return {"value": leaf}, None
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(leaf, numpy.ndarray | numpy.generic):
        try:
            tensor = torch.from_numpy(numpy.array(leaf, order="C"))
        except TypeError:
            raise TypeError(_unknown(f"an array of {leaf.dtype}")) from None
        return {"kind": "array", "dtype": _dtype(tensor), "shape": list(tensor.shape)}, tensor
    if type(leaf) is Tensor and leaf.layout == torch.strided and not leaf.is_quantized:
        entry = {
            "kind": "tensor",
            "dtype": _dtype(leaf),
            "shape": list(leaf.shape),
            "strides": list(leaf.stride()),
            "device": leaf.device.type,
            "requires_grad": leaf.requires_grad,
        }
        return entry, _dense(leaf).cpu()
    raise TypeError(_unknown(type(leaf).__name__))


def _unknown(what: str) -> str:
    return (
        "loader must yield tensors, arrays, numbers, strings or None in containers, which another rank can be sent; "
        f"got {what}: give protect() batch_of=f(step, part), which returns the mini-batch of any part"
    )


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _serialised(structure: pytree.TreeSpec) -> str | None:
    try:
        return pytree.treespec_dumps(structure)
    except (NotImplementedError, ValueError, TypeError):
        return None  # another rank can only put the data into containers of its own


# ------------------------------------------------------------------------------------------------ on the way


def shift(data: Tensor, distance: int, communicator: Communicator, device: torch.device) -> Tensor:
    """Return the bytes of worker j + distance on worker j. All workers must call it."""
    n, own = communicator.workers, communicator.worker
    lengths = communicator.all_gather(torch.tensor([data.numel()], device=device)).wait().flatten().tolist()
    source, to = (own + distance) % n, (own - distance) % n
    received = torch.empty(lengths[source], dtype=torch.uint8, device=device)
    communicator.exchange([(data.to(device), to)], [(received, source)]).wait()
    return received


def send(data: Tensor, communicator: Communicator, worker: int, device: torch.device) -> None:
    """Send bytes to one worker, which calls `receive`."""
    communicator.send(torch.tensor([data.numel()], device=device), worker)
    communicator.send(data.to(device), worker)


def receive(communicator: Communicator, worker: int, device: torch.device) -> Tensor:
    """Receive bytes from one worker."""
    length = torch.zeros(1, dtype=torch.int64, device=device)
    communicator.receive(length, worker)
    values = torch.empty(int(length), dtype=torch.uint8, device=device)
    communicator.receive(values, worker)
    return values


def broadcast(data: Tensor | None, source: int, communicator: Communicator, device: torch.device) -> Tensor:
    """Return the bytes of one worker on all. All workers must call it; only the source's data are used."""
    length = torch.tensor([0 if data is None else data.numel()], device=device)
    communicator.broadcast(length, source).wait()
    values = torch.empty(int(length), dtype=torch.uint8, device=device) if data is None else data.to(device)
    return communicator.broadcast(values, source).wait()
