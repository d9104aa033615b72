"""The watch for gradients and activations that bypass the guard while a model trains."""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import Optimizer
from torch.utils.hooks import RemovableHandle

from draco_ext.training.compatibility import reduced_parameters, unreduced
from draco_ext.training.optimizer_steps import Call, before_optimizer_steps

# The number of collectives on each process group, by name, that DistributedDataParallel or a guard has started.
_own_collectives: Counter[str] = Counter()


class Collectives:
    """A counter of the collectives on some process groups, without those of guards and of their models.

    Args:
        groups: the process groups.
    """

    def __init__(self, groups: Iterable[dist.ProcessGroup]) -> None:
        self._backends = {group.group_name: _backends(group) for group in groups}

    def count(self) -> int:
        """Return the number of collectives. Only differences between two counts have a meaning."""
        return sum(self.mark().values())

    def mark(self) -> dict[str, int]:
        """Return the count of each group, for a later `disown`."""
        return {name: started - _own_collectives[name] for name, started in self._started()}

    def disown(self, mark: dict[str, int]) -> None:
        """Exclude from the count the collectives that were started since the mark."""
        for name, started in self._started():
            _own_collectives[name] = started - mark[name]

    def expect_one(self, group: str) -> None:
        """Exclude one more collective on a group from the count; it may not have started yet."""
        _own_collectives[group] += group in self._backends

    @contextlib.contextmanager
    def own(self) -> Iterator[None]:
        """Exclude from the count the collectives that are started within this context."""
        before = self.mark()
        try:
            yield
        finally:
            self.disown(before)

    def _started(self) -> Iterator[tuple[str, int]]:
        for name, backends in self._backends.items():
            yield name, sum(backend._get_sequence_number_for_group() for backend in backends)


def _backends(group: dist.ProcessGroup) -> list[Any]:
    """Return the group's backends that number their collectives."""
    numbering = []
    backends: list[Any] = list(map(group._get_backend, group._device_types))
    for backend in {id(backend): backend for backend in backends}.values():
        with contextlib.suppress(RuntimeError):
            backend._get_sequence_number_for_group()
            numbering.append(backend)
    return numbering


class Watch:
    """A watch over forward and backward passes, which refuses gradients and activations that no guard can protect.

    It raises RuntimeError for:

    * A collective between the beginning of a forward pass and the end of its backward pass: activations of one rank
      would change the gradients of all.
    * A gradient that DistributedDataParallel has not reduced when an optimizer steps with it. It comes from a second
      backward pass for one forward pass, or from a pass that ended before all buckets were ready.
    * A parameter that is new, or requires a gradient only since the model was wrapped.
    * `DistributedDataParallel.join`.

    Args:
        model: the guarded model.
        refuse: called before an error is raised.
        collectives: whether to look for collectives.
        steps_after: what an optimizer must come after, for errors.
    """

    def __init__(
        self, model: DistributedDataParallel, refuse: Callable[[], None], *, collectives: bool, steps_after: str
    ) -> None:
        both = (model.process_group, dist.distributed_c10d._get_default_group())
        groups = {group.group_name: group for group in both}
        self._collectives = Collectives(groups.values() if collectives else ())
        self._group = model.process_group.group_name
        # DistributedDataParallel reduces its map of used parameters after the last bucket, before the first, or never.
        self._maps_unused_last = self._maps_unused_first = False
        self._refuse = refuse
        self._steps_after = steps_after
        self._reduced = reduced_parameters(model)
        self._names = {parameter: name for name, parameter in model.named_parameters()}
        self._checked = False  # whether the parameters were checked in this step
        self._undecoded: set[Tensor] = set()  # parameters with a new gradient since the end of the last step
        # The number of collectives at the beginning of the first forward pass without a backward pass.
        self._baseline: int | None = None
        self._reducing = False  # whether DistributedDataParallel will reduce the gradients of the last forward pass
        self._in_backward = False
        self._mark: dict[str, int] | None = None  # collectives since this mark are DistributedDataParallel's own

        model.register_forward_pre_hook(torch.compiler.disable(self._before_forward))
        model._run_ddp_forward = self._around_forward(weakref.ref(model))  # type: ignore[method-assign]
        model.register_forward_hook(torch.compiler.disable(lambda *_: self._excuse()))
        accumulate = weakref.WeakMethod(self._accumulate)  # weak, since this object refers to the parameter

        def accumulated(parameter: Tensor) -> None:
            if (method := accumulate()) is not None:
                method(parameter)

        handles = [parameter.register_post_accumulate_grad_hook(accumulated) for parameter in self._reduced]
        weakref.finalize(self, _remove, handles).atexit = False
        before_optimizer_steps(self, _before_step)

    def own(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which collectives are the guard's own."""
        return self._collectives.own()

    def begin_part(self) -> None:
        """Forget the forward passes of earlier mini-batches."""
        self._baseline = None

    def begin_bucket(self) -> None:
        """Check the backward pass up to this bucket."""
        if self._maps_unused_first:
            self._maps_unused_first = False
            self._collectives.expect_one(self._group)
            self._baseline = None if self._baseline is None else self._collectives.count()
        self._check("the backward pass")

    def end_pass(self) -> None:
        """Note that all buckets of a backward pass are ready."""
        self._baseline = None
        if self._maps_unused_last:
            self._collectives.expect_one(self._group)

    def finish(self) -> None:
        """Note that all gradients are decoded or were dropped."""
        self._undecoded.clear()
        self._checked = False

    def _excuse(self) -> None:
        """Exclude DistributedDataParallel's broadcasts of buffers, which were started since the mark."""
        if self._mark is not None:
            self._collectives.disown(self._mark)
            self._mark = None

    def _before_forward(self, model: DistributedDataParallel, arguments: Any) -> None:
        """Check the model before DistributedDataParallel's own part of the forward pass."""
        if not torch.is_grad_enabled():
            return
        if model._join_config.enable:
            self._stop(
                "model.join() cannot be protected: a rank without data looks like a bad one; give all ranks equally "
                "many mini-batches, as RedundantBatchSampler does"
            )
        if not self._checked:
            for name in unreduced(model, self._reduced):
                self._stop(
                    f"{name} requires a gradient that DistributedDataParallel does not reduce: it must be a parameter "
                    "that requires one before DistributedDataParallel is made"
                )
            self._checked = True
        self._reducing = model.require_backward_grad_sync
        self._maps_unused_last = model.find_unused_parameters and not model.static_graph
        self._maps_unused_first = model.static_graph and not model._static_graph_delay_allreduce_enqueued
        self._in_backward = False
        self._mark = self._collectives.mark()

    def _around_forward(self, model: weakref.ref[DistributedDataParallel]) -> Callable[..., Any]:
        """Return a function that calls the wrapped module; hooks of the module would be copied and pickled with it."""

        def run(*arguments: Any, **keywords: Any) -> Any:
            wrapped = model()
            assert wrapped is not None
            if not torch.is_grad_enabled():
                return DistributedDataParallel._run_ddp_forward(wrapped, *arguments, **keywords)
            self._excuse()
            if self._baseline is None or not is_training(wrapped):
                self._baseline = self._collectives.count()
            self._check("the forward passes of a step")
            output = DistributedDataParallel._run_ddp_forward(wrapped, *arguments, **keywords)
            self._check("the forward pass")
            self._mark = self._collectives.mark()
            return output

        around: Callable[..., Any] = torch.compiler.disable(run, recursive=False)
        return around

    def _accumulate(self, parameter: Tensor) -> None:
        """Note a new gradient of a parameter, before DistributedDataParallel puts it into a bucket."""
        self._undecoded.add(parameter)
        if self._in_backward:
            return
        self._in_backward = True
        self._check("the loss, between forward and backward pass")
        torch.autograd.Variable._execution_engine.queue_callback(self._end_backward)

    def _end_backward(self) -> None:
        """Check the end of a backward pass, before the gradients of DistributedDataParallel's buckets are in place."""
        self._in_backward = False
        if not self._reducing:  # no bucket would check it
            self._check("the backward pass")
            self._baseline = None

    def _check(self, where: str) -> None:
        if self._baseline is not None and self._collectives.count() != self._baseline:
            self._baseline = None
            self._stop(
                f"a collective in {where} cannot be protected: one rank's wrong activations would change the gradients "
                "of all; move collectives that do not enter the loss behind backward(), and forward passes that are "
                "not trained under torch.no_grad()"
            )

    def _stop(self, why: str) -> None:
        self._refuse()
        raise RuntimeError(why)

    def check_optimizer(self, optimizer: Optimizer) -> None:
        """Refuse a step with gradients that are not decoded."""
        inside = torch._C._current_graph_task_id() != -1
        if not self._undecoded and not inside:
            return
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None or parameter not in (self._reduced if inside else self._undecoded):
                    continue
                self._stop(
                    f"{self._names[parameter]} has a gradient that DistributedDataParallel has not reduced: an "
                    f"optimizer must step after {self._steps_after}, with one backward pass for each forward pass, "
                    "outside no_sync(), in which all parameters take part or find_unused_parameters is set"
                )


def is_training(model: torch.nn.Module) -> bool:
    """Return whether a model, or the module that it wraps, is in training mode; a script may switch only one of them.

    Lightning does: after a validation the module is in training mode again, and DistributedDataParallel is not.
    """
    return model.training or bool(getattr(model, "module", model).training)


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()


def _before_step(watch: Watch, optimizer: Optimizer, call: Call) -> Call | None:
    """Check an optimizer's step, or, if it takes a closure that makes the gradients, each call of the closure."""
    arguments, keywords = call
    closure = arguments[1] if len(arguments) > 1 else keywords.get("closure")
    if closure is None:
        watch.check_optimizer(optimizer)
        return None

    def checked() -> Any:
        loss = closure()
        watch.check_optimizer(optimizer)
        return loss

    if len(arguments) > 1:
        return (arguments[0], checked, *arguments[2:]), keywords
    return arguments, {**keywords, "closure": checked}
