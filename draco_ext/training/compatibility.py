"""Checks that refuse models whose gradients DistributedDataParallel would not put into its buckets."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from draco_ext.codes import Code


def check_model(model: DistributedDataParallel, code: Code) -> None:
    """Refuse a model if some of its gradients would not pass through the guard.

    Raises:
        TypeError: a parameter has a type or dtype that the code does not take.
        ValueError: DistributedDataParallel would not reduce a gradient, or would reduce it without the guard.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    _check_options(model, names)
    for name, module in model.named_modules():
        check_module(name, module, code, model)
    for parameter, name in names.items():
        if _is_a(parameter, "torch.distributed.tensor", "DTensor"):
            raise TypeError(f"parameters must be plain tensors, got a DTensor for {name}: no code spans its shards")
        if parameter.requires_grad and parameter.dtype not in code.dtypes:
            raise TypeError(f"parameters must have a dtype that {code!r} takes, got {parameter.dtype} for {name}")
    reduced = reduced_parameters(model)
    for name in unreduced(model, reduced):
        raise ValueError(
            f"{name} requires a gradient that DistributedDataParallel does not reduce: make it require one, or leave "
            "the model as it is, before DistributedDataParallel is made"
        )


def _check_options(model: DistributedDataParallel, names: dict[nn.Parameter, str]) -> None:
    for parameter in model._delay_all_reduce_params:
        raise ValueError(
            f"delay_all_reduce_named_params must be left out, got {names[parameter]}: "
            "DistributedDataParallel would average it without the guard"
        )
    for parameter, name in names.items():
        if name.removeprefix("module.") in model.parameters_to_ignore and parameter.requires_grad:
            raise ValueError(f"{name} must not be ignored by DistributedDataParallel: nothing would protect it")
        if hasattr(parameter, "_in_backward_optimizers"):
            raise ValueError(f"{name} must not have an optimizer that steps in backward(), before it is decoded")
    if model.mixed_precision is not None:
        raise ValueError("mixed_precision of DistributedDataParallel must be None; use torch.autocast instead")
    if model._use_python_reducer:
        raise ValueError("torch._dynamo.config.optimize_ddp must not be 'python_reducer', which goes round the guard")
    if getattr(model, "skip_all_reduce_unused_params", False):
        raise ValueError(
            "skip_all_reduce_unused_params must be False: a rank with other unused parameters would stop all"
        )
    mesh = getattr(model, "device_mesh", None)
    if mesh is not None and mesh._get_root_mesh() != mesh:
        raise ValueError("device_mesh must not be part of a larger mesh: tensor parallelism is not protected")
    if model.logger is not None and (hook := model._get_ddp_logging_data().get("comm_hook")):
        raise ValueError(
            "model must not be guarded already"
            if "DDPAdapter." in hook
            else f"model must not have a communication hook already, got {hook}: the guard takes its place"
        )


def check_module(name: str, module: nn.Module, code: Code, model: nn.Module | None) -> None:
    """Refuse a module that a guard cannot protect.

    Args:
        name: its name.
        module: the module.
        code: the code.
        model: the DistributedDataParallel model that it is in; None in one of FSDP, whose modules may contain others.

    Raises:
        ValueError: the module is one of those.
    """
    if isinstance(module, nn.SyncBatchNorm):
        raise ValueError(
            f"{name} must not be a SyncBatchNorm: one rank's wrong activations would change everybody's gradient; use "
            "BatchNorm or GroupNorm"
        )
    if module is not model and (
        isinstance(module, DistributedDataParallel)
        or _is_a(module, "torch.distributed.fsdp", "FullyShardedDataParallel")
        or (model is not None and _is_a(module, "torch.distributed.fsdp", "FSDPModule"))
    ):
        raise ValueError(
            f"{name} must not be a {type(module).__name__} within the model: it reduces gradients without the guard"
        )
    if not isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return
    if module.sparse and module.weight.requires_grad:
        raise ValueError(f"{name} must not be an {type(module).__name__} with sparse=True: codes take dense gradients")
    if module.max_norm is not None and code.parts > 1:
        raise ValueError(
            f"{name} must not have max_norm: it changes weights in forward(), on ranks with other parts other ones"
        )


def _is_a(value: object, module: str, name: str) -> bool:
    """Return whether a value is an instance of this class, without importing the class's module, which takes long."""
    kind = getattr(sys.modules.get(module), name, None)
    return kind is not None and isinstance(value, kind)


def reduced_parameters(model: DistributedDataParallel) -> frozenset[torch.Tensor]:
    """Return the parameters whose gradients DistributedDataParallel puts into its buckets."""
    # The reducer has no other way to return them.
    buckets = model.reducer._get_zeros_like_grad_buckets()
    return frozenset(parameter for bucket in buckets for parameter in bucket.parameters())


def unreduced(model: DistributedDataParallel, reduced: frozenset[torch.Tensor]) -> Iterator[str]:
    """Yield the names of parameters that require a gradient and are not among the reduced ones."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter not in reduced:
            yield name
