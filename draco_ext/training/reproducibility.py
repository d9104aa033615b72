"""A test that honest ranks compute the same bits: a vote on bits accuses any rank that differs."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, is_dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import _pytree as pytree

from draco_ext import ops
from draco_ext.protocol.groups import gather
from draco_ext.training.seeding import kept_generators, seed_generators

SAME_RANK = (
    "switch on torch.use_deterministic_algorithms(True), torch.backends.cudnn.benchmark = False and "
    "CUBLAS_WORKSPACE_CONFIG=:4096:8 in the environment, and draw in the model from the global generators only"
)
ACROSS_RANKS = (
    "within a group use the same kind of processor, the same torch and libraries, and the same number of threads "
    "(OMP_NUM_THREADS); or accept small deviations with transport='verified' or 'server' and atol=, rtol="
)


@dataclass(frozen=True)
class SelfTest:
    """The result of `Guard.self_test`; the same on all ranks.

    Attributes:
        reproducible: whether all gradients agree in all bits.
        parameter: the first parameter whose gradient differs.
        ranks: the ranks on which its gradient differs between two runs; if there are none, the ranks in the minority.
        advice: the setting that may help.
    """

    reproducible: bool
    parameter: str | None = None
    ranks: tuple[int, ...] = ()
    advice: str | None = None

    def __str__(self) -> str:
        if self.reproducible:
            return "gradients are bit-reproducible, on each rank and across ranks"
        return f"the gradient of {self.parameter} is not bit-reproducible on ranks {list(self.ranks)}: {self.advice}"


def fingerprint(values: Any, device: torch.device | None = None) -> Tensor:
    """Return a digest (2,) int64 of the bits of all data in nested containers and dataclasses.

    Data are tensors of any layout, arrays, numbers and strings. In objects of other types only tensors and arrays
    count, since their numbers and strings may differ between hosts.

    Args:
        values: the nested data.
        device: the device of the result, the CPU by default. If it is not the CPU, the call is asynchronous.
    """
    device = torch.device("cpu") if device is None else device
    text = bytearray()
    digests: list[Tensor] = []
    _add(values, text, digests, frozenset(), is_data=True)
    digests = [digest.to(device) for digest in (*digests, _digest_of_bytes(text))]
    return _digest(torch.stack(digests))


def _add(value: Any, text: bytearray, digests: list[Tensor], above: frozenset[int], *, is_data: bool) -> None:
    """Add the data in a value; `above` are the objects that contain it."""
    if isinstance(value, Tensor):
        for piece in _strided_pieces(value.detach()):
            text += f"{piece.dtype} {tuple(piece.shape)};".encode()
            digests.append(_digest(piece))
    elif isinstance(value, (str, bytes, bool, int, float, complex, type(None))):
        text += f"{value!r};".encode() if is_data else b";"
    elif hasattr(value, "__array_interface__") and not _holds_objects(value):  # numpy's, images
        interface = value.__array_interface__
        text += f"{interface['typestr']} {interface['shape']};".encode()
        digests.append(_digest_of_bytes(value.tobytes()))
    else:
        text += f"{type(value).__qualname__};".encode()
        held: Iterable[Any] = ()
        if isinstance(value, Mapping):
            held = (*value.keys(), *value.values())
        elif isinstance(value, (list, tuple, deque)):
            held = value
        elif isinstance(value, (set, frozenset)):
            held = sorted(value, key=repr)
        elif _holds_objects(value):
            held = value.tolist()
        elif hasattr(value, "__dict__") and not callable(value):
            held = vars(value).values()
            is_data = is_data and is_dataclass(value)
        if id(value) not in above:
            for item in held:
                _add(item, text, digests, above | {id(value)}, is_data=is_data)


def _holds_objects(value: Any) -> bool:
    return getattr(getattr(value, "dtype", None), "kind", None) == "O"


def _strided_pieces(values: Tensor) -> list[Tensor]:
    """Return the strided tensors of which a tensor of any layout consists."""
    if values.is_meta:
        return []
    if values.is_nested:
        return list(values.unbind())
    if values.layout == torch.sparse_coo:
        return [values._indices(), values._values()]
    if values.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [values.crow_indices(), values.col_indices(), values.values()]
    if values.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [values.ccol_indices(), values.row_indices(), values.values()]
    if values.layout != torch.strided:
        return [values.to_dense()]
    return [values.int_repr() if values.is_quantized else values.resolve_conj().resolve_neg()]


def _digest(values: Tensor) -> Tensor:
    bits = values.detach().contiguous().view(-1).view(torch.uint8)
    return ops.digest(bits if bits.is_cuda else bits.cpu(), 0)


def _digest_of_bytes(data: bytes | bytearray) -> Tensor:
    return _digest(torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8))


def odd_ones_out(rows: Tensor) -> list[int]:
    """Return the indices of the rows that differ from the most frequent one."""
    keys = [tuple(row.flatten().tolist()) for row in rows]
    usual = max(keys, key=keys.count)
    return [i for i, key in enumerate(keys) if key != usual]


def share_batch(batch: Any, group: dist.ProcessGroup, device: torch.device) -> Any:
    """Return rank 0's batch, on every rank.

    Raises:
        ValueError: the batch's shapes or dtypes differ between ranks.
    """
    leaves, structure = pytree.tree_flatten(batch)
    # Check the shapes first, since gloo would abort if rank 0's tensor were longer.
    shapes = repr([(tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else None for leaf in leaves])
    bits = torch.frombuffer(bytearray(shapes.encode()), dtype=torch.uint8)
    if odd := odd_ones_out(gather(fingerprint(bits), group, device)):
        raise ValueError(f"batch must have the same shapes and dtypes on all ranks, got others on ranks {odd}")
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor):
            leaves[i] = leaf.to(device, copy=True).contiguous()
            dist.broadcast(leaves[i], group=group, group_src=0)
    return pytree.tree_unflatten(leaves, structure)


def self_test(
    module: torch.nn.Module,
    group: dist.ProcessGroup,
    batch: Any,
    loss: Callable[[torch.nn.Module, Any], Tensor] | None = None,
) -> SelfTest:
    """Run rank 0's batch twice on every rank and compare all gradients; see `Guard.self_test`."""
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    device = next(iter(parameters.values())).device
    batch = share_batch(batch, group, device)
    if odd := odd_ones_out(gather(fingerprint(list(parameters.values())), group, device)):
        return SelfTest(False, "(the parameters themselves)", tuple(odd), "start all ranks from the same parameters")

    runs = []
    buffers = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
    with kept_generators(device):
        for _ in range(2):
            seed_generators(0, 0, 0, 0)
            value = (loss or sum_of_squares)(module, batch)
            gradients = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
            runs.append(torch.stack([fingerprint(gradient) for gradient in gradients]))
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)
    rows = gather(torch.stack(runs), group, device)  # (ranks, runs, parameters, 2)
    for i, name in enumerate(parameters):
        if unstable := [rank for rank, row in enumerate(rows) if not torch.equal(row[0, i], row[1, i])]:
            return SelfTest(False, name, tuple(unstable), SAME_RANK)
        if odd := odd_ones_out(rows[:, 0, i]):
            return SelfTest(False, name, tuple(odd), ACROSS_RANKS)
    return SelfTest(True)


def sum_of_squares(module: torch.nn.Module, batch: Any) -> Tensor:
    """Return the sum of mean squares of the model's outputs for a batch, or for its first element if it is a tuple."""
    inputs = batch[0] if isinstance(batch, (list, tuple)) else batch
    outputs = module(**inputs) if isinstance(inputs, Mapping) else module(inputs)
    leaves = [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.requires_grad]
    return torch.stack([leaf.float().square().mean() for leaf in leaves]).sum()
