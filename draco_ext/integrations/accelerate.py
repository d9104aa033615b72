"""A helper for Accelerate: a protected model, with a loader and a scheduler for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from draco_ext.codes import Audit, Code
from draco_ext.integrations import missing
from draco_ext.training.adapters import is_fsdp
from draco_ext.training.api import protect
from draco_ext.training.audit.guard import AuditGuard
from draco_ext.training.guard import Guard
from draco_ext.training.sampler import RedundantBatchSampler

try:
    from accelerate import Accelerator
    from accelerate.data_loader import prepare_data_loader
    from accelerate.scheduler import AcceleratedScheduler
except ImportError as error:
    raise missing("accelerate", error) from error

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule


class Prepared(NamedTuple):
    """The result of `prepare`.

    Attributes:
        model: the model, under DistributedDataParallel or made by ``fully_shard``.
        optimizer: the prepared optimizer.
        loader: the training loader; on ranks with the same part it yields the same mini-batches.
        scheduler: the prepared scheduler; None without one.
        guard: the guard.
    """

    model: DistributedDataParallel | FSDPModule
    optimizer: Any
    loader: Any
    scheduler: Any
    guard: Guard | AuditGuard


def prepare(
    accelerator: Accelerator,
    code: Code | Audit,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: DataLoader[Any],
    scheduler: Any = None,
    **options: Any,
) -> Prepared:
    """Prepare a model, its optimizer, its training loader and its scheduler, and protect the model.

    It stands in place of ``accelerator.prepare`` for these. That would divide the loader among all ranks, so that ranks
    with the same part get different mini-batches, and would step the scheduler once for each rank in every step. Here
    the loader is divided into ``guard.data_replicas`` shares, of which a rank gets ``guard.data_rank``, and the
    scheduler makes as many steps in a step. So a schedule that was made for ``len(loader)`` steps before this call ends
    at the end of the epoch, as with Accelerate. A loader with a `RedundantBatchSampler` is divided already; with it the
    scheduler makes one step in a step.

    With FSDP2 (``fsdp_version=2``) a code needs a ``ParallelismConfig`` with as many replicas as it has workers, and an
    `Audit` none. Then the ranks of a replica divide each part among themselves.

    Loaders for evaluation go through ``accelerator.prepare``. With a `CyclicCode` or an `Audit` the loop is
    ``for step in guard.steps(loader)``, without ``accelerator.accumulate``.

    Args:
        accelerator: the accelerator, on processes with a GPU or CPU each.
        code: the code or audit; for ``accelerator.num_processes`` ranks, with FSDP2 a code for as many replicas as
            there are.
        model: the model.
        optimizer: its optimizer.
        loader: the training loader; with a `CyclicCode` its batch sampler must be a `RedundantBatchSampler`.
        scheduler: the scheduler.
        **options: options of `protect`.

    Raises:
        TypeError: an argument has the wrong type; the accelerator uses neither DistributedDataParallel nor FSDP2.
        ValueError: an argument has a wrong value, or the accelerator has a setting with which ranks with the same part
            cannot get the same mini-batches.
    """
    if not isinstance(accelerator, Accelerator):
        raise TypeError(f"accelerator must be an Accelerator, got {type(accelerator).__name__}")
    if not isinstance(code, Code | Audit):
        raise TypeError(f"code must be a RepetitionCode, a CyclicCode or an Audit, got {type(code).__name__}")
    if not isinstance(loader, DataLoader):
        raise TypeError(f"loader must be a DataLoader, got {type(loader).__name__}")
    if loader in accelerator._dataloaders:
        raise ValueError("loader must not be prepared before, got one that Accelerate has divided among all ranks")
    is_divided = isinstance(loader.batch_sampler, RedundantBatchSampler)
    if accelerator.is_fsdp2 and (is_divided or (isinstance(code, Code) and len(code.assignment(0)) > 1)):
        raise ValueError(
            "code must need one loader for each rank with FSDP2, whose ranks divide parts among themselves, and the "
            f"loader must have no RedundantBatchSampler, got {code!r} and {type(loader.batch_sampler).__name__}: "
            "prepare model and optimizer, protect the model, and make a DataLoader for each of guard.data_ranks"
        )
    if isinstance(code, Code):
        if accelerator.dispatch_batches:
            raise ValueError(f"dispatch_batches must be False with {code!r}, whose ranks load their shares themselves")
        if len(code.assignment(0)) > 1 and not is_divided:
            raise ValueError(
                "loader must have a RedundantBatchSampler as its batch_sampler for a code with several parts for each "
                f"rank, got {type(loader.batch_sampler).__name__} for {code!r}"
            )
    elif is_divided:
        raise ValueError("loader must have a sampler as for plain DDP with an Audit, got a RedundantBatchSampler")
    seed = torch.initial_seed()  # of all ranks; the guard seeds each part in another way
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    if not isinstance(wrapped, DistributedDataParallel) and not is_fsdp(wrapped):
        raise TypeError(
            "accelerator must use DistributedDataParallel or FSDP2 (fsdp_version=2), "
            f"got a {type(wrapped).__name__} from it"
        )
    guard = protect(wrapped, code, **options)
    shares, share = (1, 0) if is_divided else (guard.data_replicas, guard.data_rank)
    divided = divide(
        accelerator, loader, shares, share, seed, dispatch_batches=None if isinstance(code, Audit) else False
    )
    if scheduler is not None:
        steps = 1 if accelerator.split_batches else shares
        scheduler = accelerator.prepare(
            _Scheduler(scheduler, optimizer, accelerator.step_scheduler_with_optimizer, steps)
        )
    return Prepared(wrapped, optimizer, divided, scheduler, guard)


def divide(
    accelerator: Accelerator,
    loader: DataLoader[Any],
    shares: int,
    share: int,
    seed: int,
    *,
    dispatch_batches: bool | None = False,
) -> Any:
    """Prepare a loader as an accelerator does, but for one of so many shares of the data.

    Args:
        accelerator: the accelerator.
        loader: the loader.
        shares: the number of shares.
        share: the share that this rank loads.
        seed: the seed of a seedable sampler, the same on all ranks, unless the accelerator has one.
        dispatch_batches: False if each rank loads its share; None if the accelerator's setting holds.
    """
    data_seed = accelerator.dataloader_config.data_seed
    prepared = prepare_data_loader(
        loader,
        accelerator.device,
        num_processes=shares,
        process_index=share,
        split_batches=accelerator.split_batches and shares > 1,
        put_on_device=accelerator.device_placement,
        rng_types=list(accelerator.rng_types),
        dispatch_batches=accelerator.dispatch_batches if dispatch_batches is None else dispatch_batches,
        even_batches=accelerator.even_batches,
        use_seedable_sampler=accelerator.use_seedable_sampler,
        data_seed=seed if data_seed is None else data_seed,
        non_blocking=accelerator.non_blocking,
        use_stateful_dataloader=accelerator.use_stateful_dataloader,
    )
    prepared._is_accelerate_prepared = True
    return accelerator.prepare_data_loader(prepared)  # which only registers it now


class _Scheduler(AcceleratedScheduler):
    """A scheduler that makes a given number of steps in a step, instead of one for each rank."""

    _is_accelerate_prepared = True

    def __init__(self, scheduler: Any, optimizer: Any, step_with_optimizer: bool, steps: int) -> None:
        # With split_batches the inherited method makes one step.
        super().__init__(scheduler, optimizer, step_with_optimizer, split_batches=True)
        self._steps = steps if step_with_optimizer else 1

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Step, if the optimizer has stepped."""
        # Several steps may go beyond the end of a schedule, since the number of mini-batches is rounded.
        last = getattr(self.scheduler, "total_steps", None) if self._steps > 1 else None
        for _ in range(self._steps if self.gradient_state.sync_gradients else 1):
            if last is None or self.scheduler._step_count <= last:
                super().step(*args, **kwargs)
