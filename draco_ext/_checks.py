"""Checks of arguments.

Each raises TypeError or ValueError that names the argument, what came and what was expected.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from draco_ext._extension import _C

MOST_WORKERS: int = _C.MOST_WORKERS


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def check_int(name: str, value: Any, low: int, high: int | None = None) -> int:
    """Return value if it is an int (not a bool) from low to high, both included; raise otherwise."""
    # torch.compile may give a SymInt.
    if not isinstance(value, (int, torch.SymInt)) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < low or (high is not None and value > high):
        expected = f"at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"{name} must be {expected}, got {value}")
    return value  # type: ignore[return-value]


def check_workers(workers: Any, adversaries: Any, name: str = "workers", compression: Any = 1) -> None:
    """Raise unless 2 * adversaries + compression <= workers; `name` names the workers' argument."""
    check_int(name, workers, 1, MOST_WORKERS)
    check_int("adversaries", adversaries, 0)
    check_int("compression", compression, 1)
    if workers < 2 * adversaries + compression:
        added = "1" if compression == 1 else "compression"
        raise ValueError(
            f"{name} must be at least 2 * adversaries + {added} = {2 * adversaries + compression}, got {workers}"
        )


def check_number(name: str, value: Any) -> None:
    """Raise unless value is an int or a float."""
    if not isinstance(value, (int, float, torch.SymFloat)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")


def check_tolerance(name: str, value: Any) -> None:
    """Raise unless value is a finite number >= 0."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not 0 <= value <= sys.float_info.max:  # ints may be larger than any float
        raise ValueError(f"{name} must be finite and at least 0, got {value}")


def check_dtype(name: str, dtype: Any, dtypes: Sequence[torch.dtype]) -> None:
    """Raise unless dtype is one of these."""
    if not isinstance(dtype, torch.dtype) or dtype not in dtypes:
        got = dtype if isinstance(dtype, torch.dtype) else type(dtype).__name__
        raise TypeError(f"{name} must be {_names(dtypes)}, got {got}")


def check_bool(name: str, value: Any) -> None:
    """Raise unless value is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__}")


def check_tensor(name: str, tensor: Any, dim: int, dtypes: Sequence[torch.dtype], like: Tensor | None = None) -> None:
    """Raise unless tensor is a plain real tensor of this dimension, of one of the dtypes, on like's device."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} must have dtype {_names(dtypes)}, got {_names([tensor.dtype])}")
    if tensor.layout != torch.strided or tensor.is_nested:
        got = "a nested tensor" if tensor.is_nested else f"layout {tensor.layout}"
        raise ValueError(f"{name} must be a dense tensor, got {got}")
    if tensor.dim() != dim:
        raise ValueError(f"{name} must have {dim} dimension(s), got shape {tuple(tensor.shape)}")
    if tensor.requires_grad:
        raise ValueError(f"{name} must not require grad (decoding has no gradient): detach it first")
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None:  # within jvp
        raise ValueError(f"{name} must not have a forward-mode tangent (decoding has no gradient): detach it first")
    if like is not None and tensor.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, got {tensor.device}")
    if like is None and not tensor.is_cpu:  # quicker than to ask for the device
        if not tensor.is_cuda:
            raise ValueError(f"{name} must be on the CPU or a CUDA device, got {tensor.device}")
        if not _C.build_info()["cuda"]:
            raise ValueError(
                f"{name} is on {tensor.device}, but this draco_ext was built without CUDA: "
                "reinstall it with DRACO_CUDA=on and nvcc on PATH"
            )


def check_rows(name: str, matrix: Tensor) -> None:
    """Raise unless each row of the matrix is contiguous."""
    if matrix.stride(1) != 1 and matrix.size(1) > 1:
        raise ValueError(
            f"{name} must have contiguous rows (stride 1 along dimension 1), got strides "
            f"{tuple(matrix.stride())}: call .contiguous()"
        )


def check_messages(messages: Any, dtypes: Sequence[torch.dtype]) -> None:
    """Raise unless messages is a matrix with a row for each worker."""
    check_tensor("messages", messages, 2, dtypes)
    check_rows("messages", messages)
    if messages.size(0) == 0:
        raise ValueError(f"messages must have at least one row, got shape {tuple(messages.shape)}")


def check_seeds(name: str, seeds: Tensor, like: Tensor, count: int | None = None) -> None:
    """Raise unless seeds are a contiguous int64 vector, of this many elements if given, on like's device."""
    check_tensor(name, seeds, 1, (torch.int64,), like=like)
    check_contiguous(name, seeds)
    if count is not None and seeds.size(0) != count:
        raise ValueError(f"{name} must have {count} element(s), got {seeds.size(0)}")


def check_mask(name: str, mask: Any, messages: Tensor) -> None:
    """Raise unless mask is None or a bool vector with an entry for each message."""
    if mask is None:
        return
    check_tensor(name, mask, 1, (torch.bool,), like=messages)
    if mask.size(0) != messages.size(0):
        raise ValueError(f"{name} must have {messages.size(0)} entries, got {mask.size(0)}")


def check_pairs(messages: Tensor) -> None:
    """Raise unless the rows are pairs of real and imaginary parts."""
    if messages.size(1) % 2:
        raise ValueError(
            f"messages must have an even number of columns (pairs are complex numbers), got {messages.size(1)}"
        )


def check_length(length: Any, messages: Tensor, compression: int = 1) -> None:
    """Raise unless messages of pairs can be those of a gradient of this length."""
    longest = compression * messages.size(1)
    check_int("length", length, max(0, longest - 2 * compression + 1), longest)


def check_contiguous(name: str, vector: Tensor) -> None:
    """Raise unless the vector is contiguous."""
    if not vector.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got stride {vector.stride(0)}: call .contiguous()")


def check_writable(name: str, vector: Tensor, length: int) -> None:
    """Raise unless a result of this length can be written into the vector."""
    # Torch cannot write to a view that stands for the negative of its memory, nor compile the question.
    if not torch.compiler.is_compiling() and vector.is_neg():
        raise ValueError(f"{name} must not be a negated view (such as z.conj().imag): call .resolve_neg()")
    if not vector.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got stride {vector.stride(0)}")
    if vector.size(0) != length:
        raise ValueError(f"{name} must have {length} elements, got {vector.size(0)}")


def check_apart(name: str, vector: Tensor, other_name: str, other: Tensor) -> None:
    """Raise where a contiguous vector and another tensor of the same dtype share elements of a storage.

    Args:
        name: of the vector.
        vector: contiguous.
        other_name: of the other tensor.
        other: a contiguous vector, or a matrix of contiguous rows.
    """
    if torch.compiler.is_compiling():  # where no tensor has a storage
        return
    if vector.untyped_storage()._cdata != other.untyped_storage()._cdata:
        return
    begin = vector.storage_offset() - other.storage_offset()
    rows, width = (1, other.size(0)) if other.dim() == 1 else other.shape
    stride = max(1, other.stride(0)) if rows > 1 else 1
    rows = 1 if other.stride(0) == 0 else rows
    # Row k has the elements from k * stride to before k * stride + width.
    first = max(0, (begin - width) // stride + 1)
    last = min(rows - 1, (begin + vector.size(0) - 1) // stride)
    if first <= last and width and vector.size(0):
        raise ValueError(f"{name} must not share memory with {other_name}")


def check_out(out: Any, length: int, source_name: str, source: Tensor) -> None:
    """Raise unless out can receive a result of this length that is computed from the source."""
    check_tensor("out", out, 1, (source.dtype,), like=source)
    check_writable("out", out, length)
    check_apart("out", out, source_name, source)
