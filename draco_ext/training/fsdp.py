"""The adapter for models made by ``fully_shard`` over replicas and shards (FSDP2, HSDP).

A worker of the code is a replica: the ranks among which a copy of the parameters is sharded. FSDP adds up a module's
gradients within the replica, and its all-reduce hook is given this rank's shard of the sum. Shards are exchanged among
the ranks of all replicas that have the same one, and are decoded in place.

FSDP calls the hook in time only if it does not itself reduce over replicas. Therefore the description of the mesh that
each module keeps is replaced by that of the shards alone. Names with an underscore are those of torch 2.11 to 2.13.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo, HSDPMeshInfo
from torch.optim.optimizer import Optimizer

from draco_ext.codes import Code
from draco_ext.protocol.groups import Rendezvous, gather
from draco_ext.protocol.messages import GradientBuffer
from draco_ext.training.adapter import Adapter, Bucket
from draco_ext.training.compatibility import check_module
from draco_ext.training.handshake import sha256_of
from draco_ext.training.optimizer_steps import before_optimizer_steps
from draco_ext.training.reproducibility import (
    ACROSS_RANKS,
    SAME_RANK,
    SelfTest,
    fingerprint,
    odd_ones_out,
    share_batch,
    sum_of_squares,
)
from draco_ext.training.seeding import kept_generators, seed_generators
from draco_ext.training.state import own_shard
from draco_ext.training.watch import Collectives

if TYPE_CHECKING:
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

ABORT_TIMEOUT = 60.0  # seconds that a rank waits for the others after an error in a backward pass


@dataclass(frozen=True)
class Unit:
    """A module whose parameters FSDP gathers and reduces together.

    Attributes:
        index: its number, in the order of the model's modules.
        name: its name in the model.
        group: FSDP's object for its parameters.
    """

    index: int
    name: str
    group: FSDPParamGroup

    @property
    def trained(self) -> list[Any]:
        """The parameters that require a gradient, as FSDP's objects."""
        return [parameter for parameter in self.group.fsdp_params if parameter.sharded_param.requires_grad]

    @property
    def elements(self) -> int:
        """The number of elements of a shard of their gradients, padding included."""
        return sum(parameter.padded_sharded_param_size.numel() for parameter in self.trained)

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype in which their gradients are reduced; None if none requires a gradient."""
        policy = self.group.mp_policy
        own = {parameter.sharded_param.dtype for parameter in self.trained}
        return policy.reduce_dtype or policy.param_dtype or next(iter(own), None)


def units_of(model: torch.nn.Module) -> Iterator[Unit]:
    """Yield the units of a model.

    Raises:
        ValueError: a module has several groups of parameters.
    """
    seen = set()
    number = 0
    for name, module in model.named_modules():
        if not isinstance(module, FSDPModule):
            continue
        state: Any = module._get_fsdp_state()
        if id(state) in seen:  # fully_shard([a, b]) gives several modules one state
            continue
        seen.add(id(state))
        groups = state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else [state._fsdp_param_group]
        if len(groups) > 1:
            raise ValueError(
                f"{_named(name)} must have one group of parameters, got {len(groups)}: shard_placement_fn must not "
                "return other meshes"
            )
        for group in groups:
            if group is not None:
                yield Unit(number, _named(name), group)
                number += 1


def _named(name: str) -> str:
    return name or "the model"


def check_sharded_model(model: FSDPModule, code: Code) -> int:
    """Refuse a model made by ``fully_shard`` if some of its gradients would not pass through a code's guard.

    Returns:
        The number of replicas.

    Raises:
        TypeError: a parameter or its gradient has a type or dtype that the code does not take.
        ValueError: FSDP would not reduce a gradient, or would reduce it without the guard.
    """
    for unit in units_of(cast(torch.nn.Module, model)):
        info = unit.group.mesh_info
        if isinstance(info, FSDPMeshInfo) and not isinstance(info, HSDPMeshInfo) and not is_guarded(unit.group):
            raise ValueError(
                f"{unit.name} must be sharded over a mesh of replicas and shards, got a mesh of shards alone, in which "
                "no rank repeats what another one computes: give fully_shard mesh=init_device_mesh(device, (replicas, "
                'shards), mesh_dim_names=("replicate", "shard")), with as many replicas as the code has workers; or '
                "take an Audit"
            )
    return int(check_units(model, code).shape[0])


def check_units(model: FSDPModule, code: Code) -> Tensor:
    """Refuse a model made by ``fully_shard`` if some of its gradients would not pass through a guard.

    Returns:
        The ranks of the model's mesh.

    Raises:
        TypeError, ValueError: see `check_sharded_model`.
    """
    module = cast(torch.nn.Module, model)
    managed = set()
    meshes: list[Tensor] = []
    for unit in units_of(module):
        group = unit.group
        info: Any = group.mesh_info
        if not isinstance(info, FSDPMeshInfo):
            raise ValueError(f"{unit.name} must be sharded by fully_shard, got replicate(), which calls no hook")
        if is_guarded(group):
            raise ValueError("model must not be guarded already")
        if group._all_reduce_hook is not None:
            raise ValueError(f"{unit.name} must not have an all-reduce hook already: the guard takes its place")
        meshes.append(info.mesh.mesh)
        if getattr(info, "is_spmd_mesh", False) or any(parameter.is_dtensor for parameter in group.fsdp_params):
            raise ValueError(
                f"{unit.name} must not have parameters that are sharded already: tensor parallelism is not protected"
            )
        if unit.trained and unit.dtype not in code.dtypes:
            raise TypeError(
                f"gradients must have a dtype that {code!r} takes, got {unit.dtype} for {unit.name}: set reduce_dtype "
                "of its MixedPrecisionPolicy"
            )
        for parameter in group.fsdp_params:
            name = f"a parameter of {unit.name}"
            managed.add(parameter.sharded_param)
            if parameter.sharded_param.device.type == "meta":
                raise ValueError(f"{name} must have values, got one on the meta device: materialise the model before")
    if not meshes:
        raise ValueError("model must have parameters that fully_shard has sharded")
    if any(not torch.equal(mesh, meshes[0]) for mesh in meshes):
        raise ValueError("all modules must be sharded over the same mesh")
    if meshes[0].numel() != dist.get_world_size():
        raise ValueError(
            f"the mesh must contain all {dist.get_world_size()} ranks, got one of {meshes[0].numel()}: other kinds of "
            "parallelism are not protected"
        )
    for name, own in module.named_parameters():
        if own.requires_grad and own not in managed:
            raise ValueError(f"{name} must not be among ignored_params, or not require a gradient: nothing reduces it")
    for name, each in module.named_modules():
        check_module(name, each, code, None)
    return meshes[0]


class FSDPAdapter(Adapter):
    """The adapter for a model that `check_sharded_model` accepts.

    Attributes: see `Adapter`.
    """

    unit = "replica"
    how_to_accumulate = (
        "cut a mini-batch into pieces, and pass all but the last one with set_requires_gradient_sync(False)"
    )

    def __init__(self, model: FSDPModule) -> None:
        self.model = model
        self._module = cast(torch.nn.Module, model)
        self._all_units = tuple(units_of(self._module))
        self._info = cast("Any", self._all_units[0].group.mesh_info)
        self.world = dist.distributed_c10d._get_default_group()
        self.device = self._all_units[0].group.device
        self._mesh = self._info.mesh.mesh
        # The ranks that have the same shards.
        self._columns = [tuple(ranks) for ranks in self._mesh.view(-1, self._info.shard_mesh_size).T.tolist()]
        self._set_workers()
        managed = {p.sharded_param for unit in self._all_units for p in unit.group.fsdp_params}
        self._ignored = [parameter for parameter in self._module.parameters() if parameter not in managed]
        self._trained: list[Unit] = []  # those with gradients, in the current pass
        self._after_backward: Callable[[], None] | None = None
        self._in_pass = False  # from the first bucket of a backward pass to the end of the pass
        self._undecoded = False  # from the first bucket of a step to its end
        self._seen: list[int] = []  # the units of the current pass whose buckets were taken
        self._taken = 0  # the number of buckets in all passes
        self._aborted = False  # whether the last pass has ended with an error
        self._baseline: int | None = None  # the number of collectives when the step's first forward pass began
        self._stream: torch.cuda.Stream | None = None  # the one on which FSDP calls the hook
        self._probed: dict[str, Tensor] | None = None  # during a self-test: fingerprints, by module

    def _set_workers(self) -> None:
        """Say which ranks are a worker, and which have the same shards or gradients."""
        info = self._info
        self.group = info.replicate_process_group
        self.shards, self.shard = info.shard_mesh_size, info.shard_mesh_rank
        self.shard_group = info.shard_process_group if self.shards > 1 else None
        self.members = tuple(map(tuple, self._mesh.tolist()))

    @property
    def module(self) -> torch.nn.Module:
        """See `Adapter.module`."""
        return self._module

    def setup(self) -> dict[str, Any]:
        """See `Adapter.setup`."""
        named = [(name, list(p.shape), str(p.dtype)) for name, p in self._module.named_parameters()]
        units = [
            (unit.name, unit.elements, str(unit.dtype), isinstance(unit.group.offload_policy, CPUOffloadPolicy))
            for unit in self._all_units
        ]
        return {
            "the names, sizes and dtypes of the model's parameters (their digest)": sha256_of(named),
            "the modules that fully_shard was called on, and their policies (their digest)": sha256_of(units),
            "the mesh": self._mesh.tolist(),
        }

    def attach(
        self,
        *,
        take: Callable[[Bucket], None],
        before_forward: Callable[[torch.nn.Module, Any, Any], None],
        abort: Callable[[], None],
        watch_collectives: bool,
        steps_after: str,
    ) -> None:
        """See `Adapter.attach`.

        Raises:
            ValueError: the replicas do not begin with the same parameters. All ranks raise it together.
        """
        self._check_replicas()
        self._take, self._abort, self._prepare = take, abort, before_forward
        self._steps_after = steps_after
        self._rendezvous = Rendezvous(self.world)
        groups = {group.group_name: group for group in (self.group, self.world)}
        for group in self._groups_of_fsdp():
            groups.pop(group.group_name, None)
        self._collectives = Collectives(groups.values() if watch_collectives else ())
        for unit in self._all_units:
            self._hook_unit(unit)
        # Before FSDP's own hook, which fails after an aborted pass.
        self._module.register_forward_pre_hook(
            torch.compiler.disable(self._before_forward), with_kwargs=True, prepend=True
        )
        self._module.register_forward_hook(torch.compiler.disable(self._after_forward))
        before_optimizer_steps(self, lambda adapter, optimizer, _: adapter.check_optimizer(optimizer))

    def _groups_of_fsdp(self) -> list[dist.ProcessGroup]:
        """Return the process groups on which FSDP itself communicates."""
        return [self._info.shard_process_group]

    def _hook_unit(self, unit: Unit) -> None:
        """Let FSDP call the adapter with a module's gradients."""
        self._convert(unit.group)
        unit.group._all_reduce_hook = functools.partial(self._hook, unit)

    @staticmethod
    def _convert(group: FSDPParamGroup) -> None:
        """Let FSDP reduce over shards alone, which makes it call the hook on what the hook has to exchange."""
        old: Any = group.mesh_info
        if isinstance(old, HSDPMeshInfo):
            group.mesh_info = FSDPMeshInfo(old.mesh, old.shard_mesh_dim)
            if hasattr(old, "reduce_scatter_process_group"):  # new in torch 2.13
                group.mesh_info.reduce_scatter_process_group = old.reduce_scatter_process_group
            if group.post_forward_mesh_info is old:
                group.post_forward_mesh_info = group.mesh_info

    def _check_replicas(self) -> None:
        if odd := self._ranks_with_other_parameters():
            raise ValueError(
                f"model must have the same parameters on all replicas, got others on ranks {list(odd)}: seed all ranks "
                "alike before the model is made, or load the same checkpoint; fully_shard does not broadcast"
            )

    def _ranks_with_other_parameters(self) -> tuple[int, ...]:
        rows = gather(fingerprint(list(self.replicated_parameters())), self.world, self.device)
        return _odd(rows, self._columns)

    def reduced(self) -> list[Tensor]:
        """See `Adapter.reduced`."""
        return [parameter.sharded_param for unit in self._all_units for parameter in unit.trained]

    def replicated_parameters(self) -> Iterable[Tensor]:
        """Return this rank's shards of the parameters, and parameters that FSDP ignores."""
        shards = [own_shard(p.sharded_param) for unit in self._all_units for p in unit.group.fsdp_params]
        return [*shards, *self._ignored]

    def replicated_buffers(self) -> Iterable[Tensor]:
        """See `Adapter.replicated_buffers`."""
        return self._module.buffers()

    def parameters_changed(self) -> None:
        """See `Adapter.parameters_changed`."""
        for unit in self._all_units:
            unit.group._to_sharded()

    @property
    def synchronises(self) -> bool:
        """See `Adapter.synchronises`."""
        return all(unit.group.reduce_grads for unit in self._all_units)

    def own_collectives(self) -> contextlib.AbstractContextManager[None]:
        """See `Adapter.own_collectives`."""
        return self._collectives.own()

    def begin_part(self) -> None:
        """See `Adapter.begin_part`."""
        self.drop_gradients()
        self._baseline = None

    def finish_step(self) -> None:
        """See `Adapter.finish_step`."""
        self._undecoded = False

    def drop_gradients(self) -> None:
        """See `Adapter.drop_gradients`."""
        for unit in self._all_units:
            for parameter in unit.group.fsdp_params:
                parameter.sharded_param.grad = None
                parameter.unsharded_accumulated_grad = None
                if hasattr(parameter, "_unsharded_param"):
                    parameter._unsharded_param.grad = None

    def call_after_backward(self, finish: Callable[[], None]) -> None:
        """See `Adapter.call_after_backward`."""
        self._after_backward = finish

    # ------------------------------------------------------------------------------------------------ a pass

    def _before_forward(self, module: torch.nn.Module, arguments: Any, keywords: Any) -> None:
        if torch._C._current_graph_task_id() != -1:
            return  # a checkpointed pass is made again
        if self._is_interrupted():
            self._resume_after_abort()
        if self._probed is not None or not torch.is_grad_enabled():
            return
        self._check_switches()
        if self._baseline is None or not module.training:
            self._baseline = self._collectives.count()
        self._check_collectives("the forward passes of a step")
        self._prepare(module, arguments, keywords)

    def _after_forward(self, module: torch.nn.Module, arguments: Any, output: Any) -> None:
        if torch._C._current_graph_task_id() != -1 or self._probed is not None or not torch.is_grad_enabled():
            return
        self._check_collectives("the forward pass")
        if not self.synchronises:  # nothing notes the end of its backward pass
            self._baseline = None

    def _check_switches(self) -> None:
        """Refuse what was switched on in the model since `protect`."""
        reducing = {bool(unit.group.reduce_grads) for unit in self._all_units}
        if len(reducing) > 1:
            self._stop("set_requires_gradient_sync must be called on the whole model, with recurse=True")
        for unit in self._all_units:
            self._check_unit_switches(unit)
            for parameter in unit.group.fsdp_params:
                own = parameter.sharded_param
                if getattr(own, "_post_accumulate_grad_hooks", None) or hasattr(own, "_in_backward_optimizers"):
                    self._stop(
                        f"{parameter._module_info.param_name} of {unit.name} must not have a hook or an optimizer that "
                        "takes its gradient in backward(), before it is decoded"
                    )

    def _check_unit_switches(self, unit: Unit) -> None:
        group = unit.group
        if group.reduce_grads and not group.all_reduce_grads:
            self._stop(
                f"set_requires_all_reduce(False) cannot be protected, got it for {unit.name}: gradients that were "
                "reduced over shards alone would be added up undecoded; take set_requires_gradient_sync(False)"
            )
        if group.gradient_divide_factor is not None:
            self._stop(f"set_gradient_divide_factor must not be called, got it for {unit.name}: scale the loss")
        if not _is_of_guard(group._all_reduce_hook) or isinstance(group.mesh_info, HSDPMeshInfo):
            self._stop(f"{unit.name} has another all-reduce hook or mesh than the guard has set")

    def _hook(self, unit: Unit, values: Tensor) -> None:
        """Take a module's shard of the gradients from FSDP."""
        if self._probed is not None:
            self._probed[unit.name] = fingerprint(values)
            return
        buffer = GradientBuffer(values, (values.numel(),), (unit.index,), unit.name)
        self._take_bucket(unit, buffer, unit.elements, at_once=not _stays_in_place(unit, values))

    def _take_bucket(
        self,
        unit: Unit,
        buffer: GradientBuffer,
        elements: int,
        *,
        at_once: bool,
        reduce: Callable[[float], None] | None = None,
    ) -> None:
        """Give a module's gradients, which must have so many elements, to the guard."""
        values = buffer.values
        try:
            if not self._in_pass:
                self._begin_pass()
            self._check_unit(unit, values, elements)
            self._check_collectives("the backward pass")
            if values.is_cuda:
                self._stream = torch.cuda.current_stream(values.device)
            index = len(self._seen)
            self._seen.append(unit.index)
            self._taken += 1
            with self._collectives.own():
                self._take(Bucket(buffer, index, False, _nothing, at_once, reduce))
        except BaseException:
            self._end_with_error()
            raise

    def _begin_pass(self) -> None:
        self._in_pass = self._undecoded = True
        self._seen = []
        self._trained = [unit for unit in self._all_units if unit.trained]
        # FSDP has queued its own callback before it reduces anything, or is in it.
        torch.autograd.Variable._execution_engine.queue_callback(self._end_backward)

    def _check_unit(self, unit: Unit, values: Tensor, elements: int) -> None:
        if unit.index in self._seen:
            raise RuntimeError(f"{unit.name} must reduce its gradients once in a backward pass, got another time")
        if values.numel() != elements:
            raise self._unused([unit])

    @staticmethod
    def _unused(units: Iterable[Unit]) -> RuntimeError:
        return RuntimeError(
            f"all parameters that require a gradient must get one in every backward pass, got none for some of "
            f"{', '.join(unit.name for unit in units)}: call set_reduce_scatter_unused_params(True) on the model, or "
            "let them require none"
        )

    def _end_backward(self) -> None:
        """End a backward pass, behind FSDP's own end of it."""
        if not self._in_pass:
            return  # it was aborted
        try:
            state: Any = self.model._get_fsdp_state()
            if state._state_ctx.post_backward_final_callback_queued:
                raise RuntimeError(
                    "a backward pass within a backward pass cannot be protected: give checkpoint use_reentrant=False"
                )
            left = [unit for unit in self._trained if unit.index not in self._seen]
            if left:
                raise self._unused(left)
            # FSDP does not say which module is the last one. So the last bucket comes now, and is empty.
            with self._on_stream(), self._collectives.own():
                self._take(self._last_bucket())
        except BaseException:
            self._end_with_error()
            raise
        self._in_pass = False
        self._baseline = None
        finish, self._after_backward = self._after_backward, None
        if finish is not None:
            finish()

    def _last_bucket(self) -> Bucket:
        empty = torch.empty(0, dtype=torch.float32, device=self.device)
        return Bucket(GradientBuffer(empty, (0,), ("end",), "end of the pass"), len(self._seen), True, _nothing)

    @contextlib.contextmanager
    def _on_stream(self) -> Iterator[None]:
        """Go on where the hook has begun exchanges; then let the current stream wait for them."""
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            yield
        torch.cuda.current_stream(self.device).wait_stream(self._stream)

    # ---------------------------------------------------------------------------------------------- errors

    def _check_collectives(self, where: str) -> None:
        if self._baseline is not None and self._collectives.count() != self._baseline:
            self._baseline = None
            self._stop(
                f"a collective in {where} cannot be protected: one rank's wrong activations would change the gradients "
                "of all; move collectives that do not enter the loss behind backward()"
            )

    def _stop(self, why: str) -> None:
        self.drop_gradients()
        raise RuntimeError(why)

    def _end_with_error(self) -> None:
        self._in_pass, self._aborted = False, True
        self._baseline = self._after_backward = None
        self._undecoded = False
        self._abort()

    def _is_interrupted(self) -> bool:
        """Return whether the last backward pass has not come to its end, perhaps not to its first bucket."""
        state: Any = self.model._get_fsdp_state()
        return self._in_pass or self._aborted or bool(state._state_ctx.post_backward_final_callback_queued)

    def _resume_after_abort(self) -> None:
        """Go on after a backward pass that an error has ended, if it has ended in the same place on all ranks.

        The exchanges that it has begun cannot be taken back. If ranks have begun different ones, each would take the
        next messages for those of the last pass.

        Raises:
            RuntimeError: the pass has ended elsewhere on another rank, or torch cannot begin another pass.
        """
        if not self._aborted:  # the error came from outside of the hook
            self._end_with_error()
        if not hasattr(self.model, "reset_iter_state"):
            raise RuntimeError(
                "training cannot go on after an error in a backward pass before torch 2.13, which has reset_iter_state"
            )
        ranks = range(dist.get_world_size(self.world))
        if absent := self._rendezvous.wait(ranks, ABORT_TIMEOUT, f"after {self._taken} buckets"):
            raise RuntimeError(
                "training cannot go on after an error in a backward pass, since the pass has not ended in the same "
                f"place on ranks {absent}: what was sent before the error cannot be taken back"
            )
        self.model.reset_iter_state()
        self._aborted = False

    def check_optimizer(self, optimizer: Optimizer) -> None:
        """Refuse a step with gradients that are not decoded."""
        inside = torch._C._current_graph_task_id() != -1
        if not self._undecoded and not inside:
            return
        own = set(self.reduced())
        for group in optimizer.param_groups:
            if any(parameter in own and parameter.grad is not None for parameter in group["params"]):
                self._stop(
                    f"a gradient is not decoded yet: an optimizer must step after {self._steps_after}, when all "
                    "mini-batches of the step were passed backward"
                )

    # ------------------------------------------------------------------------------------------- self-test

    def self_test(self, batch: Any, loss: Callable[[torch.nn.Module, Any], Tensor] | None) -> SelfTest:
        """See `Adapter.self_test`; shards of gradients are compared, by module."""
        batch = share_batch(batch, self.world, self.device)
        if odd := self._ranks_with_other_parameters():
            return SelfTest(False, "(the parameters themselves)", odd, "start all ranks from the same parameters")
        runs = []
        buffers = [(buffer, buffer.detach().clone()) for buffer in self._module.buffers()]
        gradients = [(parameter, parameter.grad) for parameter in self.reduced()]
        self.drop_gradients()
        try:
            with kept_generators(self.device):
                for _ in range(2):
                    self._probed = {}
                    seed_generators(0, 0, self.shard, 0)
                    (loss or sum_of_squares)(self._module, batch).backward()
                    found = [self._probed.get(unit.name, torch.zeros(2, dtype=torch.int64)) for unit in self._all_units]
                    runs.append(torch.stack(found))
                    self.drop_gradients()
                    with torch.no_grad():
                        for buffer, before in buffers:
                            buffer.copy_(before)
        finally:
            self._probed = None
            for parameter, gradient in gradients:
                parameter.grad = gradient
        rows = gather(torch.stack(runs), self.world, self.device)  # (ranks, runs, units, 2)
        for i, unit in enumerate(self._all_units):
            if unstable := [rank for rank, row in enumerate(rows) if not torch.equal(row[0, i], row[1, i])]:
                return SelfTest(False, unit.name, tuple(unstable), SAME_RANK)
            if odd := _odd(rows[:, 0, i], zip(*self.members, strict=True)):
                return SelfTest(False, unit.name, odd, ACROSS_RANKS)
        return SelfTest(True)


def _odd(rows: Tensor, alike: Iterable[Sequence[int]]) -> tuple[int, ...]:
    """Return the ranks whose row differs from those of most ranks that should have the same."""
    return tuple(sorted(ranks[i] for ranks in alike for i in odd_ones_out(rows[list(ranks)])))


def _nothing() -> None:
    """Do nothing: the decoded gradient is where FSDP looks for it."""


def is_guarded(group: FSDPParamGroup) -> bool:
    """Return whether a guard takes the gradients of a module."""
    return _is_of_guard(group._all_reduce_hook) or isinstance(group._reduce_scatter_comm, GuardedReduceScatter)


class GuardedReduceScatter:
    """A reduce-scatter of FSDP in whose place a guard was put; see `draco_ext.training.fsdp_audit`."""


def _is_of_guard(hook: Any) -> bool:
    return isinstance(hook, functools.partial) and isinstance(getattr(hook.func, "__self__", None), FSDPAdapter)


def _stays_in_place(unit: Unit, values: Tensor) -> bool:
    """Return whether gradients will be views of these values, so that they can be decoded until the pass ends.

    Otherwise FSDP scales, casts, moves or adds them up as soon as the hook returns.
    """
    group = unit.group
    return (
        values.dtype == group._orig_dtype
        and values.dtype in (torch.float32, torch.bfloat16)  # others are divided afterwards
        and not group.force_sum_reduction_for_comms
        and not isinstance(group.offload_policy, CPUOffloadPolicy)
        and all(parameter.sharded_param.grad is None for parameter in unit.trained)
    )
