"""The adapter for DistributedDataParallel, which connects its hooks to a guard."""

# Without "from __future__ import annotations": DDP looks at the types in its hook's annotations.

import contextlib
import functools
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from draco_ext.protocol.messages import GradientBuffer
from draco_ext.training.adapter import AuditAdapter, Bucket
from draco_ext.training.compatibility import reduced_parameters
from draco_ext.training.handshake import digest_of_layout
from draco_ext.training.record import StepRecord
from draco_ext.training.reproducibility import SelfTest, self_test
from draco_ext.training.watch import Watch

# Bytes of small buckets that are exchanged together. To send more takes longer than to wait for other ranks.
SMALL_BUCKETS = 2**22

# The attributes of a module in which there are hooks of its forward pass, by number.
HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


class DDPAdapter(AuditAdapter):
    """The adapter for a DistributedDataParallel model.

    Attributes: see `AuditAdapter`.
    """

    how_to_accumulate = "cut a mini-batch into pieces, and pass all but the last one under model.no_sync()"
    buckets_in_all_passes = False
    ways_to_accumulate = "no_sync() or another change of model.require_backward_grad_sync"

    def __init__(self, model: DistributedDataParallel) -> None:
        # DDP refers to its hook from C++, where Python's garbage collector cannot see it. If the guard had a strong
        # reference to the model, the model would never be freed.
        self._model = weakref.ref(model)
        self._ignored = frozenset(model.parameters_to_ignore)
        self.group = self.world = model.process_group
        self.members = tuple((rank,) for rank in range(dist.get_world_size(self.group)))
        self.device = next(model.parameters()).device
        # Whoever makes smaller buckets wants them to be exchanged one by one.
        self.small_buckets = min(SMALL_BUCKETS, model.bucket_bytes_cap)
        # DDP's own map of unused parameters covers only the last pass of a step, and trusts every rank.
        self.parameters_may_be_unused = model.find_unused_parameters or model.static_graph

    @property
    def model(self) -> DistributedDataParallel:
        """The model.

        Raises:
            RuntimeError: the model was freed.
        """
        model = self._model()
        if model is None:
            raise RuntimeError("the guarded model is gone")
        return model

    @property
    def module(self) -> torch.nn.Module:
        """See `Adapter.module`."""
        module: torch.nn.Module = self.model.module
        return module

    def setup(self) -> dict[str, Any]:
        """See `Adapter.setup`."""
        model = self.model
        return {
            "the names, sizes and dtypes of the model's parameters (their digest)": digest_of_layout(
                model.named_parameters()
            ),
            "DistributedDataParallel's options": {
                "bucket_cap_mb": model.bucket_bytes_cap / 2**20,
                "find_unused_parameters": model.find_unused_parameters,
                "static_graph": model.static_graph,
            },
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
        """See `Adapter.attach`."""
        model = self.model
        self._take, self._abort = take, abort
        hooks = {*model._forward_pre_hooks, *model._forward_hooks}
        model.register_comm_hook(None, self._hook)  # first, since it raises if there is a hook already
        self._watch = Watch(model, self.drop_gradients, collectives=watch_collectives, steps_after=steps_after)
        model.register_forward_pre_hook(torch.compiler.disable(before_forward), with_kwargs=True)
        hooks = {*model._forward_pre_hooks, *model._forward_hooks} - hooks
        model.__getstate__ = functools.partial(_unguarded_state, weakref.ref(model), hooks)  # type: ignore[method-assign]

    def reduced(self) -> list[Tensor]:
        """See `Adapter.reduced`."""
        model = self.model
        in_buckets = reduced_parameters(model)
        return [parameter for parameter in model.parameters() if parameter in in_buckets]

    def pieces(self) -> list[Tensor]:
        """See `AuditAdapter.pieces`: the parameters."""
        return self.reduced()

    def flatten_gradients(self, pieces: Sequence[Tensor]) -> Tensor:
        """See `AuditAdapter.flatten_gradients`."""
        first = pieces[0]
        values = torch.empty(sum(p.numel() for p in pieces), dtype=first.dtype, device=first.device)
        write_gradients(values, pieces)
        return values

    def change_gradients(self, change: Callable[[Tensor], Tensor]) -> None:
        """See `AuditAdapter.change_gradients`."""
        for parameter in self.reduced():
            parameter.register_hook(change)

    def replicated_parameters(self) -> Iterable[Tensor]:
        """Return the parameters that DistributedDataParallel does not ignore."""
        model = self._model()
        named = () if model is None else model.module.named_parameters()
        return [parameter for name, parameter in named if name not in self._ignored]

    def replicated_buffers(self) -> Iterable[Tensor]:
        """Return the buffers that DistributedDataParallel does not ignore."""
        model = self._model()
        named = () if model is None else model.module.named_buffers()
        return [buffer for name, buffer in named if name not in self._ignored]

    @property
    def synchronises(self) -> bool:
        """See `Adapter.synchronises`."""
        return bool(self.model.require_backward_grad_sync)

    def own_collectives(self) -> contextlib.AbstractContextManager[None]:
        """See `Adapter.own_collectives`."""
        return self._watch.own()

    def begin_part(self) -> None:
        """See `Adapter.begin_part`."""
        self.model.zero_grad(set_to_none=True)
        self._watch.begin_part()

    def synchronise(self, on: bool) -> None:
        """See `AuditAdapter.synchronise`."""
        model = self._model()
        if model is None:  # a step that was left is given up when its generator is freed
            return
        model.require_backward_grad_sync = on

    def begin_pass(self, *, broadcast_buffers: bool, reduces: bool) -> None:
        """See `AuditAdapter.begin_pass`."""
        self.begin_part()
        model = self.model
        model.require_forward_param_sync = broadcast_buffers
        if model.find_unused_parameters:
            # DDP has added what passes without synchronisation have used to what its next one uses.
            model.reducer._reset_state()

    @property
    def broadcasts_buffers(self) -> bool:
        """See `AuditAdapter.broadcasts_buffers`.

        It is so after a synchronised backward pass, but not after another forward pass, such as an evaluation.
        """
        return bool(self.model.require_forward_param_sync)

    @property
    def buckets_are_final(self) -> bool:
        """See `AuditAdapter.buckets_are_final`: DDP makes other buckets once, behind its first pass."""
        model = self.model
        return bool(model._has_rebuilt_buckets or model.find_unused_parameters)

    def buffers_of_this_rank(self) -> set[str]:
        """See `AuditAdapter.buffers_of_this_rank`."""
        model = self.model
        names = {name for name, _ in model.module.named_buffers()}
        return names & set(model.parameters_to_ignore) if model.will_sync_module_buffers() else names

    def finish_step(self) -> None:
        """See `Adapter.finish_step`."""
        self._watch.finish()

    def drop_gradients(self) -> None:
        """See `Adapter.drop_gradients`."""
        model = self._model()
        for parameter in () if model is None else model.parameters():
            parameter.grad = None

    def call_after_backward(self, finish: Callable[[], None]) -> None:
        """See `Adapter.call_after_backward`."""
        # DDP copies the gradients in a callback that it queues after this one; so queue the function from here.
        engine = torch.autograd.Variable._execution_engine
        engine.queue_callback(lambda: engine.queue_callback(finish))

    def self_test(self, batch: Any, loss: Callable[[torch.nn.Module, Any], Tensor] | None) -> SelfTest:
        """See `Adapter.self_test`."""
        return self_test(self.module, self.group, batch, loss)

    def _hook(self, state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
        """Take a bucket from DDP."""
        try:
            self._watch.begin_bucket()
            values, parameters = bucket.buffer(), bucket.parameters()
            future: torch.futures.Future[Tensor] = torch.futures.Future(
                devices=[values.device] if values.is_cuda else None
            )
            lengths = tuple(parameter.numel() for parameter in parameters)
            # Unless it is a view of the bucket, a parameter's .grad keeps what this rank has computed.
            is_copy = not self.model.gradient_as_bucket_view
            restore = functools.partial(write_gradients, values, parameters) if is_copy else None
            buffer = GradientBuffer(values, lengths, tuple(parameters), f"bucket {bucket.index()}", restore)
            with self._watch.own():
                self._take(Bucket(buffer, bucket.index(), bucket.is_last(), lambda: future.set_result(values)))
            if bucket.is_last():
                self._watch.end_pass()
            return future
        except BaseException:
            self._abort()
            raise


def _unguarded_state(model: weakref.ref[DistributedDataParallel], hooks: Collection[int]) -> dict[str, Any]:
    """Return what a copy of the model is made from (`copy.deepcopy`, `pickle`): a copy has no guard."""
    guarded = model()
    assert guarded is not None
    state: dict[str, Any] = type(guarded).__getstate__(guarded)
    for name in ("_run_ddp_forward", "__getstate__"):
        del state[name]
    state["_comm_hooks"] = []
    for name in HOOKS:
        state[name] = type(state[name])((key, hook) for key, hook in state[name].items() if key not in hooks)
    return state


def has_no_gaps(values: Tensor) -> bool:
    """Return whether a tensor's elements lie side by side in memory, in whatever order."""
    return torch.empty_like(values, device="meta").stride() == values.stride()


def as_parameter(values: Tensor, parameter: Tensor) -> Tensor:
    """Return a view of some elements of a bucket, laid out as DistributedDataParallel lays out this parameter's there.

    That is as the parameter itself, in channels-last order for instance, if it has no gaps.
    """
    if has_no_gaps(parameter):
        return values.as_strided(parameter.size(), parameter.stride(), values.storage_offset())
    return values.view(parameter.shape)


def write_gradients(values: Tensor, parameters: Sequence[Tensor]) -> None:
    """Write the gradients of some parameters as DDP puts them into a bucket; 0 where there is none."""
    for piece, parameter in zip(values.split([p.numel() for p in parameters]), parameters, strict=True):
        if parameter.grad is None:
            piece.zero_()
        else:
            as_parameter(piece, parameter).copy_(parameter.grad)


@dataclass(frozen=True)
class _Decoded:
    """A parameter and its decoded gradient.

    Attributes:
        number: the parameter's number.
        parameter: the parameter.
        gradient: its decoded gradient.
        older: whether it has a gradient of earlier passes that this rank's part has not changed.
    """

    number: int
    parameter: Tensor
    gradient: Tensor
    older: bool


class UnusedParameters:
    """The rule for unused parameters: their gradients stay unchanged, as in DDP, but a majority of ranks decides."""

    def __init__(self, reduced: Sequence[Tensor], record: StepRecord) -> None:
        self._numbers: Mapping[Tensor, int] = {parameter: i for i, parameter in enumerate(reduced)}
        self._record = record
        self._decoded: list[_Decoded] = []

    def see(self, buffer: GradientBuffer) -> None:
        """Note the parameters of a bucket in the last backward pass, before it is decoded."""
        gradients = buffer.values.split(list(buffer.lengths))
        for parameter, gradient in zip(buffer.keys, gradients, strict=True):
            assert isinstance(parameter, Tensor)
            number = self._numbers[parameter]
            older = parameter.grad is not None and not self._record.is_reached(number)
            self._decoded.append(_Decoded(number, parameter, as_parameter(gradient, parameter), older))

    def forget(self) -> None:
        """Forget the parameters of the step."""
        self._decoded = []

    def settle(self, used: Sequence[bool]) -> None:
        """Give every used parameter a gradient, even if it is 0, and restore those of the others."""
        for item in self._decoded:
            if not used[item.number]:
                if not item.older:
                    item.parameter.grad = None
            elif item.parameter.grad is None:
                item.parameter.grad = item.gradient.clone()
