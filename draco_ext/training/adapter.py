"""The adapter between a guard and what reduces a model's gradients, such as DistributedDataParallel."""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from draco_ext.protocol.messages import GradientBuffer
from draco_ext.training.reproducibility import SelfTest


@dataclass(frozen=True)
class Bucket:
    """Gradients of a backward pass that are reduced at once: one of DDP's buckets, or an FSDP module's shard.

    Attributes:
        buffer: the bucket's gradients; the keys are the parameters, or stand for them.
        index: the bucket's number in the pass. DDP makes new buckets after the first step.
        is_last: whether it is the last bucket of the pass. Under FSDP that one is empty: FSDP names no last module.
        complete: must be called once, when the decoded gradient is in the buffer.
        at_once: whether the decoded gradient must be in the buffer when the guard has taken the bucket.
        reduce: adds up the buffers of all ranks and multiplies the result by a factor, where the framework itself does
            so in an audit. If the guard does not call it, the bucket adds nothing to any gradient.
    """

    buffer: GradientBuffer
    index: int
    is_last: bool
    complete: Callable[[], None]
    at_once: bool = False
    reduce: Callable[[float], None] | None = None


class Adapter(abc.ABC):
    """An adapter with what a guard needs from a model and from what reduces its gradients.

    A worker of the code is a rank under DDP. Under FSDP it is a replica: several ranks, each with a shard of the
    parameters. A guard's collectives are among the ranks of all workers that have the same shard.

    Attributes:
        unit: what a worker is called in messages.
        group: the process group of a code's workers: all ranks with the shard that this rank has.
        world: the process group of all ranks of all workers.
        device: the device on which gradients are reduced.
        shards: the number of ranks that make up a worker.
        shard: the number of this rank among them.
        shard_group: their process group; None if there is only one.
        members: by rank within `group`, the ranks within `world` that make up the worker.
        alike: the workers that have the same parameters, or the same shards; None: all.
        state_is_replicated: whether there are several ranks that have the same shards.
        parameters_may_be_unused: whether a pass may leave out parameters, which a majority then decides on.
        small_buckets: fewer bytes than so many wait for the next bucket, and are exchanged together with it.
        how_to_accumulate: how a loop over the steps of a code accumulates gradients, for errors.
    """

    unit: ClassVar[str] = "rank"
    how_to_accumulate: ClassVar[str]
    group: dist.ProcessGroup
    world: dist.ProcessGroup
    device: torch.device
    shards: int = 1
    shard: int = 0
    shard_group: dist.ProcessGroup | None = None
    members: tuple[tuple[int, ...], ...]
    alike: Sequence[tuple[int, ...]] | None = None
    state_is_replicated: bool = True
    parameters_may_be_unused: bool = False
    small_buckets: int = 0

    @property
    @abc.abstractmethod
    def module(self) -> torch.nn.Module:
        """The module as the user wrote it.

        Raises:
            RuntimeError: the model was freed.
        """

    @abc.abstractmethod
    def setup(self) -> dict[str, Any]:
        """Return the settings that must be the same on all ranks; see `exchange_setup`."""

    @abc.abstractmethod
    def attach(
        self,
        *,
        take: Callable[[Bucket], None],
        before_forward: Callable[[torch.nn.Module, Any, Any], None],
        abort: Callable[[], None],
        watch_collectives: bool,
        steps_after: str,
    ) -> None:
        """Register the hooks.

        Args:
            take: called with every bucket of a backward pass, in the same order on all ranks.
            before_forward: called before every forward pass with the module, its arguments and keywords.
            abort: called if a backward pass ends with an error.
            watch_collectives: whether to look for collectives in forward and backward passes.
            steps_after: what an optimizer must come after, for errors.
        """

    @abc.abstractmethod
    def reduced(self) -> Sequence[Tensor]:
        """Return the parameters whose gradients go through buckets, in the model's order."""

    @abc.abstractmethod
    def replicated_parameters(self) -> Iterable[Tensor]:
        """Return the parameters, or this rank's shards of them, that all workers have alike."""

    @abc.abstractmethod
    def replicated_buffers(self) -> Iterable[Tensor]:
        """Return the model's buffers, except for those that belong to one rank."""

    @property
    @abc.abstractmethod
    def synchronises(self) -> bool:
        """Return whether the next backward pass ends in buckets; if not, it only adds up gradients."""

    @abc.abstractmethod
    def own_collectives(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which collectives are the guard's own."""

    @abc.abstractmethod
    def begin_part(self) -> None:
        """Begin another mini-batch; the gradients of the one before are in the messages."""

    @abc.abstractmethod
    def finish_step(self) -> None:
        """Note that all gradients are decoded or were dropped."""

    @abc.abstractmethod
    def drop_gradients(self) -> None:
        """Set all gradients to None, so that optimizers do not change the parameters or their own state."""

    @abc.abstractmethod
    def call_after_backward(self, finish: Callable[[], None]) -> None:
        """Register a function to be called when the gradients are in place; called with the last bucket."""

    @abc.abstractmethod
    def self_test(self, batch: Any, loss: Callable[[torch.nn.Module, Any], Tensor] | None) -> SelfTest:
        """Test whether honest workers compute the same bits; see `GuardBase.self_test`."""

    def parameters_changed(self) -> None:  # noqa: B027 (only FSDP keeps copies)
        """Note that parameters were repaired, so that no copy of the wrong ones is used."""


class AuditAdapter(Adapter):
    """An adapter with what an audit needs besides: passes that add nothing to the gradients of other ranks.

    A worker is a rank.

    Attributes:
        buckets_in_all_passes: whether passes that only measure end in buckets, too, which are the same in all passes.
            Otherwise they leave gradients, which `flatten_gradients` returns, and an audit may cover a mini-batch of
            several.
        ways_to_accumulate: what a loop must not use to accumulate gradients, for errors.
    """

    buckets_in_all_passes: ClassVar[bool]
    ways_to_accumulate: ClassVar[str]

    @abc.abstractmethod
    def synchronise(self, on: bool) -> None:
        """Say whether the next backward pass ends in buckets; if not, it only adds up gradients, as in ``no_sync``."""

    @abc.abstractmethod
    def begin_pass(self, *, broadcast_buffers: bool, reduces: bool) -> None:
        """Begin a pass over a part from no gradients.

        Args:
            broadcast_buffers: see `broadcasts_buffers`.
            reduces: whether buckets of the pass are reduced.
        """

    @property
    @abc.abstractmethod
    def broadcasts_buffers(self) -> bool:
        """Return whether the next forward pass begins with rank 0's buffers."""

    @property
    @abc.abstractmethod
    def buckets_are_final(self) -> bool:
        """Return whether later passes have the same buckets as the last one."""

    @abc.abstractmethod
    def buffers_of_this_rank(self) -> set[str]:
        """Return the names of the buffers that the next forward pass does not replace by rank 0's."""

    @abc.abstractmethod
    def pieces(self) -> Sequence[Tensor]:
        """Return the keys of buckets, in the same order on all ranks: parameters, or tensors with their sizes."""

    @abc.abstractmethod
    def flatten_gradients(self, pieces: Sequence[Tensor]) -> Tensor:
        """Return the gradients of some pieces as a bucket would have them, 0 where there is none."""

    @abc.abstractmethod
    def change_gradients(self, change: Callable[[Tensor], Tensor]) -> None:
        """Let a function change every gradient that this rank computes; for tests."""

    def buffers(self) -> dict[str, Tensor]:
        """Return copies of the model's buffers, by name."""
        return {name: buffer.detach().clone() for name, buffer in self.module.named_buffers()}

    @torch.no_grad()
    def set_buffers(self, values: Mapping[str, Tensor]) -> None:
        """Set the model's buffers to values that `buffers` has returned, here or on another rank."""
        for name, buffer in self.module.named_buffers():
            if name in values and values[name].shape == buffer.shape:
                buffer.copy_(values[name])
