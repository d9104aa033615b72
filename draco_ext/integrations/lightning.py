"""A strategy for Lightning's Trainer: DistributedDataParallel with a protected model."""

from __future__ import annotations

import os
from typing import Any, cast

from draco_ext.codes import Code
from draco_ext.integrations import check_code, missing
from draco_ext.training.api import protect
from draco_ext.training.guard import Guard

try:
    from lightning.pytorch.strategies import DDPStrategy
except ImportError as error:
    raise missing("lightning", error) from error

STATE = "draco_ext"  # the key of the guard's state in a checkpoint


class ProtectedDDPStrategy(DDPStrategy):
    """A DDPStrategy that protects the model by a repetition code.

    ``Trainer(strategy=ProtectedDDPStrategy(code))``, with all else as it was. The samplers that Lightning gives to the
    training loader divide the data among the parts of the code, so ranks of a group get the same mini-batches. Those
    for validation and test divide it among all ranks. Checkpoints contain the guard's state, with which training
    resumes.

    With ``Trainer(use_distributed_sampler=False)``, and with an iterable data set, the loader must be divided already:
    by a `RedundantBatchSampler` or `RedundantSampler`, or in `train_dataloader` by ``guard.data_rank``.

    Args:
        code: a code with one part for each rank, such as a `RepetitionCode`.
        protect_options: options of `protect`.
        **kwargs: options of DDPStrategy.

    Attributes:
        guard: the guard; None before training has begun.

    Raises:
        TypeError: the code is not a code.
        ValueError: the code needs a loop of its own; or, when training begins, ``seed_everything`` was called with
            ``workers=True``.
    """

    guard: Guard | None = None

    def __init__(self, code: Code, *, protect_options: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self._code = check_code("Lightning", code)
        self._protect_options = dict(protect_options or {})
        self._state: dict[str, Any] | None = None  # the guard's, from a checkpoint that is loaded before it is made
        super().__init__(**kwargs)

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """The share of the data that this rank gets."""
        if self.guard is None or not self.lightning_module.trainer.training:
            return dict(super().distributed_sampler_kwargs)
        return {"num_replicas": self.guard.data_replicas, "rank": self.guard.data_rank}

    def configure_ddp(self) -> None:
        """Put the model under DistributedDataParallel, and protect it."""
        if int(os.environ.get("PL_SEED_WORKERS", 0)):
            raise ValueError(
                "seed_everything must be called with workers=False, got True: it seeds a loader's workers by rank, and "
                "ranks with the same part must draw the same numbers"
            )
        super().configure_ddp()
        self.guard = cast("Guard", protect(self.model, self._code, **self._protect_options))
        if self._state is not None:
            self.guard.load_state_dict(self._state)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Save a checkpoint, with the guard's state."""
        if self.guard is not None:
            checkpoint[STATE] = self.guard.state_dict()
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load a checkpoint."""
        checkpoint: dict[str, Any] = super().load_checkpoint(*args, **kwargs)
        self._state = checkpoint.get(STATE)
        return checkpoint
