"""The choice of the adapter that fits a model."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch.nn.parallel import DistributedDataParallel

from draco_ext.training.adapter import Adapter
from draco_ext.training.ddp import DDPAdapter

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule


def is_fsdp(model: object) -> TypeGuard[FSDPModule]:
    """Return whether a model was made by ``fully_shard``, without importing FSDP, which takes long."""
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    return kind is not None and isinstance(model, kind)


def make_adapter(model: torch.nn.Module, *, audit: bool) -> Adapter:
    """Return the adapter for a model: an `AuditAdapter` for an audit.

    Raises:
        TypeError: the model is not data-parallel.
    """
    if is_fsdp(model):
        from draco_ext.training.fsdp import FSDPAdapter
        from draco_ext.training.fsdp_audit import FSDPAuditAdapter

        return FSDPAuditAdapter(model) if audit else FSDPAdapter(model)
    if not isinstance(model, DistributedDataParallel):
        raise TypeError(f"model must be a DistributedDataParallel or made by fully_shard, got {type(model).__name__}")
    return DDPAdapter(model)
