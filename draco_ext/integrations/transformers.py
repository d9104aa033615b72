"""A mixin for Transformers' Trainer and its subclasses, whose model it protects."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.nn.parallel import DistributedDataParallel

from draco_ext.codes import Code
from draco_ext.integrations import check_code, missing
from draco_ext.training.adapters import is_fsdp
from draco_ext.training.api import protect
from draco_ext.training.guard import Guard
from draco_ext.training.placement import place_ranks

try:
    from transformers import TrainerCallback
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

    from draco_ext.integrations.accelerate import divide
except ImportError as error:
    raise missing("transformers", error) from error

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object  # a mixin comes before any Trainer

STATE = "draco_ext.pt"  # the name of the guard's state in a checkpoint


class ProtectedTrainerMixin(_Trainer):
    """A mixin that protects the model of a Trainer by a repetition code.

    ``class ProtectedTrainer(ProtectedTrainerMixin, Trainer): pass``, and the same for subclasses of Trainer. The model
    is protected once it is under DistributedDataParallel or FSDP2. Ranks of a group get the same mini-batches of
    ``per_device_train_batch_size`` samples. With FSDP2 (``fsdp_config={"version": 2}``) TrainingArguments need a
    ``parallelism_config`` with as many replicas as the code has workers; the ranks of a replica divide each part among
    themselves. Checkpoints contain the guard's state, with which training resumes, and
    what the Trainer logs contains the metrics of the guard's report.

    Args:
        *args: arguments of the Trainer.
        code: a code with one part for each rank, such as a `RepetitionCode`.
        protect_options: options of `protect`.
        **kwargs: arguments of the Trainer. Its ``args`` must have ``average_tokens_across_devices=False``.

    Attributes:
        guard: the guard; None before training has begun.

    Raises:
        TypeError: the code is not a code.
        ValueError: the code needs a loop of its own, or the Trainer has a setting with which the guarantee would not
            hold.
    """

    guard: Guard | None = None

    def __init__(self, *args: Any, code: Code, protect_options: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self._code = check_code("Transformers' Trainer", code)
        self._protect_options = dict(protect_options or {})
        self._checkpoint: str | None = None  # from which training resumes
        self._guarded: Any = None  # the model of the guard
        super().__init__(*args, **kwargs)
        if self.args.average_tokens_across_devices:
            raise ValueError(
                "average_tokens_across_devices must be False in TrainingArguments, got True: all losses would be "
                "divided by a number that ranks count together, so that one bad rank could change all gradients"
            )
        if self.accelerator.dispatch_batches:
            raise ValueError(
                "dispatch_batches must be False in accelerator_config, got True: ranks load their shares themselves"
            )
        self.add_callback(_Callback(self))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train, see the Trainer."""
        last = get_last_checkpoint(self.args.output_dir) if resume_from_checkpoint is True else None
        self._checkpoint = last or resume_from_checkpoint or None  # type: ignore[assignment]
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def get_train_dataloader(self) -> Any:
        """Return the Trainer's loader, divided among the parts of the code instead of among all ranks."""
        shards = self._shards
        rank, shard = divmod(self.args.process_index, shards)
        worker = place_ranks(self._code, self._protect_options.get("ranks_per_host"))[rank]
        shares, share = self._code.parts * shards, self._code.assignment(worker)[0] * shards + shard
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        divided = []

        def prepare(loader: Any) -> Any:
            loader.worker_init_fn = None  # the Trainer's seeds workers by rank, instead of by part
            divided.append(divide(self.accelerator, loader, shares, share, seed))
            return divided[-1]

        # The inherited method makes a loader and passes it to the accelerator, which would divide it among all ranks.
        self.accelerator.prepare = prepare
        try:
            loader = super().get_train_dataloader()
        finally:
            del self.accelerator.prepare
        if not divided:
            raise TypeError(
                "get_train_dataloader must pass its loader to self.accelerator.prepare, as the Trainer's does"
            )
        return loader

    @property
    def _shards(self) -> int:
        """The number of ranks that make up a worker of the code."""
        if not self.accelerator.is_fsdp2:
            return 1
        config = self.accelerator.parallelism_config
        shards: int = self.args.world_size if config is None else config.dp_shard_size
        if shards * self._code.workers != self.args.world_size:
            raise ValueError(
                f"parallelism_config in TrainingArguments must have dp_replicate_size={self._code.workers} with FSDP2, "
                f"a replica for each worker of {self._code!r}, got {self.args.world_size // shards} replicas"
            )
        return shards

    def get_total_train_batch_size(self, args: Any) -> int:
        """Return the number of different samples in a step."""
        samples: int = super().get_total_train_batch_size(args)
        return samples // int(args.world_size) * self._code.parts * self._shards

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, together with the metrics of the guard's report."""
        super().log({**logs, **self.guard.report().metrics()} if self.guard else logs, *args, **kwargs)

    def protect(self) -> None:
        """Protect the model, and restore the guard's state; called at the beginning of training."""
        model = self.model_wrapped
        if not isinstance(model, DistributedDataParallel) and not is_fsdp(model):
            raise TypeError(
                f"the Trainer must use DistributedDataParallel or FSDP2, got a {type(model).__name__} from it"
            )
        if self.guard is None or self._guarded is not model:
            self.guard = cast("Guard", protect(model, self._code, **self._protect_options))
            self._guarded = model
        if self._checkpoint is not None:
            self.guard.load_state_dict(torch.load(Path(self._checkpoint, STATE), weights_only=True))


class _Callback(TrainerCallback):
    """The events of a Trainer at which its guard has something to do."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.protect()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.guard.seed_mini_batch()  # a DataLoader now draws the seeds of its workers

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_save:  # rank 0 alone writes, and its parameters must be right
            self._trainer.guard.check_state()

    on_epoch_end = on_step_end

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.should_save:
            folder = Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
            torch.save(self._trainer.guard.state_dict(check=False), folder / STATE)
