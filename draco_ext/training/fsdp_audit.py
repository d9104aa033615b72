"""The adapter for an audit of a model made by ``fully_shard`` (FSDP2, HSDP).

A worker is a rank. FSDP gives a module's gradients, as this rank has computed them, to a reduce-scatter, which an
adapter may replace. There the gradients are measured, and then added up as FSDP does. In a pass that only measures,
nothing is communicated, and the output is filled with -0.0, since x + -0.0 is x to the last bit.

Names with an underscore are those of torch 2.11 to 2.13.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_common import HSDPMeshInfo

from draco_ext.codes import Code
from draco_ext.protocol.messages import GradientBuffer
from draco_ext.training.adapter import AuditAdapter, Bucket
from draco_ext.training.fsdp import FSDPAdapter, GuardedReduceScatter, Unit, check_units, units_of
from draco_ext.training.reproducibility import fingerprint

if TYPE_CHECKING:
    from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter

ACCUMULATE = "accumulate with guard.steps(loader, accumulate=...)"


def check_audited_model(model: FSDPModule, code: Code) -> int:
    """Refuse a model made by ``fully_shard`` if some of its gradients would not pass through an audit's guard.

    Returns:
        The number of ranks.

    Raises:
        TypeError: a gradient has a dtype that cannot be compared.
        ValueError: FSDP would not reduce a gradient, or would reduce it without the guard.
    """
    mesh = check_units(model, code)
    for unit in units_of(model):  # type: ignore[arg-type]
        comm = unit.group._reduce_scatter_comm
        if not type(comm).__module__.startswith("torch.distributed.fsdp."):
            raise ValueError(
                f"{unit.name} must not have a reduce-scatter of your own, got {type(comm).__name__}: the guard takes "
                "its place"
            )
        if unit.group.mesh_info.shard_mesh_size == 1:  # type: ignore[attr-defined]
            raise ValueError(
                f"{unit.name} must be sharded over two ranks or more, got a mesh with one shard, for which FSDP calls "
                "no reduce-scatter: take DistributedDataParallel"
            )
        if not unit.group.reduce_grads or not unit.group.all_reduce_grads:
            raise ValueError(
                f"set_requires_gradient_sync and set_requires_all_reduce must be left to the guard, got False for "
                f"{unit.name}: {ACCUMULATE}"
            )
    return mesh.numel()


class FSDPAuditAdapter(FSDPAdapter, AuditAdapter):
    """The adapter for an audit of a model that `check_audited_model` accepts.

    Attributes: see `AuditAdapter`.
    """

    unit = "rank"
    buckets_in_all_passes = True
    ways_to_accumulate = "set_requires_gradient_sync"
    broadcasts_buffers = False
    buckets_are_final = True

    def __init__(self, model: FSDPModule) -> None:
        super().__init__(model)
        shards = self._info.shard_mesh_size
        # For each unit a tensor without memory, of the size of what is given to the reduce-scatter.
        self._pieces = [
            torch.empty(unit.elements * shards, dtype=unit.dtype or torch.float32, device="meta")
            for unit in self._all_units
        ]
        self._syncs = True  # whether backward passes reduce, as the guard has set it
        self._reduces = True  # whether the current pass adds to the gradients
        self._ended = False  # whether the current pass has ended in buckets
        self._change: Callable[[Tensor], Tensor] | None = None

    def _set_workers(self) -> None:
        self.group = self.world
        self.members = tuple((rank,) for rank in range(dist.get_world_size()))
        self.state_is_replicated = isinstance(self._info, HSDPMeshInfo)
        if self.state_is_replicated:
            self.alike = self._columns
        else:  # only parameters that FSDP ignores are on several ranks
            self._columns = [tuple(range(dist.get_world_size()))]

    def _groups_of_fsdp(self) -> list[dist.ProcessGroup]:
        # What FSDP does on the group of shards, which may be that of all ranks, does not count; see `_AllGather`.
        return [self._info.replicate_process_group] if isinstance(self._info, HSDPMeshInfo) else []

    def _hook_unit(self, unit: Unit) -> None:
        group = unit.group
        group._reduce_scatter_comm = cast("ReduceScatter", _ReduceScatter(self, unit, group._reduce_scatter_comm))
        group._all_gather_comm = cast("AllGather", _AllGather(self.own_collectives, group._all_gather_comm))

    # --------------------------------------------------------------------------------------------- the model

    def pieces(self) -> Sequence[Tensor]:
        """See `AuditAdapter.pieces`."""
        return [piece for piece in self._pieces if piece.numel()]

    def flatten_gradients(self, pieces: Sequence[Tensor]) -> Tensor:
        """See `AuditAdapter.flatten_gradients`.

        Raises:
            RuntimeError: always, since buckets are gone once FSDP has reduced them.
        """
        raise RuntimeError("FSDP keeps no gradients that are not reduced")

    def replicated_parameters(self) -> Iterable[Tensor]:
        """Return the parameters that several ranks have: without replicas only those that FSDP ignores."""
        return super().replicated_parameters() if self.state_is_replicated else self._ignored

    def buffers_of_this_rank(self) -> set[str]:
        """See `AuditAdapter.buffers_of_this_rank`: all, since FSDP broadcasts none."""
        return {name for name, _ in self._module.named_buffers()}

    def change_gradients(self, change: Callable[[Tensor], Tensor]) -> None:
        """See `AuditAdapter.change_gradients`."""
        self._change = change

    # ------------------------------------------------------------------------------------------------ a pass

    def synchronise(self, on: bool) -> None:
        """See `AuditAdapter.synchronise`."""
        self._syncs = on
        for unit in self._all_units:
            unit.group.reduce_grads = on

    def begin_pass(self, *, broadcast_buffers: bool, reduces: bool) -> None:
        """See `AuditAdapter.begin_pass`.

        Raises:
            RuntimeError: see `_resume_after_abort`.
        """
        if self._is_interrupted():  # the guard has given up that step
            self._in_pass, self._aborted = False, True
            self._resume_after_abort()
        self.begin_part()
        self._reduces = reduces
        self._ended = False
        for unit in self._all_units:
            unit.group.all_reduce_grads = reduces  # then FSDP does not add up -0.0 over replicas

    def drop_gradients(self) -> None:
        """See `Adapter.drop_gradients`."""
        super().drop_gradients()
        for unit in self._all_units:
            unit.group._partial_reduce_output = None

    def _check_unit_switches(self, unit: Unit) -> None:
        group = unit.group
        if (group.reduce_grads, group.all_reduce_grads) != (self._syncs, self._reduces):
            self._stop(
                "set_requires_gradient_sync and set_requires_all_reduce must be left to the guard, got a change for "
                f"{unit.name}: {ACCUMULATE}"
            )
        comm = group._reduce_scatter_comm
        if not isinstance(comm, _ReduceScatter) or comm.adapter is not self or group._all_reduce_hook is not None:
            self._stop(f"{unit.name} has another reduce-scatter or all-reduce hook than the guard has set")
        if unit.elements * self._info.shard_mesh_size != self._pieces[unit.index].numel():
            self._stop(f"{unit.name} must have the same parameters that require a gradient as when protect was called")

    def _after_forward(self, module: torch.nn.Module, arguments: Any, output: Any) -> None:
        super()._after_forward(module, arguments, output)
        if self._change is None:
            return
        for unit in self._all_units:
            for parameter in unit.trained:
                # FSDP makes the parameter that autograd sees when it gathers it for the first time.
                whole = getattr(parameter, "_unsharded_param", None)
                if whole is not None and not hasattr(whole, "_changed_by_guard"):
                    whole._changed_by_guard = whole.register_hook(self._change)

    def reduce(
        self, unit: Unit, output: Tensor, values: Tensor, run: Callable[[], dist.Work | None]
    ) -> dist.Work | None:
        """Measure a module's gradients, and let FSDP add them up unless the pass only measures.

        Args:
            unit: the module.
            output: where this rank's shard of the sum is put.
            values: this rank's gradients.
            run: starts the reduce-scatter of these two.
        """
        if self._probed is not None:
            self._probed[unit.name] = fingerprint(values)
            output.fill_(-0.0)
            return None
        started: list[dist.Work | None] = []

        def add_up(factor: float) -> None:
            started.append(run())
            if factor != 1:
                output.mul_(factor)

        buffer = GradientBuffer(values, (values.numel(),), (self._pieces[unit.index],), unit.name)
        self._take_bucket(unit, buffer, self._pieces[unit.index].numel(), at_once=True, reduce=add_up)
        if not started:
            output.fill_(-0.0)
            return None
        return started[0]

    def _begin_pass(self) -> None:
        if self._ended:
            raise RuntimeError("each mini-batch of a step must be passed backward once, got another backward pass")
        super()._begin_pass()

    def _last_bucket(self) -> Bucket:
        self._ended = True
        empty = torch.empty(0, device=self.device)
        return Bucket(GradientBuffer(empty, (), (), "end of the pass"), len(self._seen), True, _nothing, False, _no_sum)


class _ReduceScatter(GuardedReduceScatter):
    """A reduce-scatter of a module, in place of the one that FSDP had, which it calls after the measurement."""

    def __init__(self, adapter: FSDPAuditAdapter, unit: Unit, replaced: ReduceScatter) -> None:
        self.adapter = adapter
        self.allocate = replaced.allocate
        self._unit = unit
        self._replaced = replaced

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> dist.Work | None:
        run = functools.partial(self._replaced, output_tensor, input_tensor, group, op, async_op)
        return self.adapter.reduce(self._unit, output_tensor, input_tensor, run)


class _AllGather:
    """An all-gather of a module that does not count as a collective of the script."""

    def __init__(self, own: Callable[[], contextlib.AbstractContextManager[None]], replaced: AllGather) -> None:
        self.allocate = replaced.allocate
        self._own = own
        self._replaced = replaced

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        with self._own():
            return self._replaced(output_tensor, input_tensor, group, async_op)


def _nothing() -> None:
    """Do nothing: FSDP itself completes a bucket."""


def _no_sum(factor: float) -> None:
    """Do nothing: there is nothing to add up."""
