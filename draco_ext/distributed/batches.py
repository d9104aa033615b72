"""Which samples every step uses, how a step's batch is cut into parts, and which of them a rank computes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypedDict

import torch
from torch import Tensor
from torch.utils.data import Sampler

from draco_ext import ops
from draco_ext.codes import Code
from draco_ext.distributed.placement import ranks_per_host as told_ranks_per_host
from draco_ext.distributed.placement import worker_of


class GlobalBatches:
    """The global batch of every step: a pure function of the seed and the step.

    Every rank can ask for any step and any part, in any order, and gets the same answer, into
    however many parts its code cuts the batch. Every epoch is reshuffled; a last incomplete batch
    is dropped.

    Args:
        samples: Size of the training set.
        batch_size: Samples in one global batch, at most ``samples``.
        seed: Seed of the shuffles.
    """

    def __init__(self, samples: int, batch_size: int, seed: int) -> None:
        ops.check_int("samples", samples, 1)
        ops.check_int("batch_size", batch_size, 1, samples)
        ops.check_int("seed", seed, 0)
        self.batch_size = batch_size
        self.per_epoch = samples // batch_size  # steps
        self._samples = samples
        self._seed = seed
        self._epoch = -1
        self._order = torch.empty(0, dtype=torch.int64)

    def indices(self, step: int) -> Tensor:
        """The samples of one step's global batch, in order."""
        epoch, batch = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed((self._seed * 1_000_003 + epoch) % 2**63)
            self._order = torch.randperm(self._samples, generator=generator)
            self._epoch = epoch
        return self._order[batch * self.batch_size :][: self.batch_size]

    def part(self, step: int, part: int, parts: int) -> Tensor:
        """The samples of one part, where the batch is cut into ``parts`` as evenly as it can be."""
        return self.indices(step).tensor_split(parts)[part]


class SamplerState(TypedDict):
    """What `RedundantBatchSampler.state_dict` returns."""

    samples: int
    batch_size: int
    parts: int
    seed: int
    step: int


class RedundantBatchSampler(Sampler[list[int]]):
    """The mini-batches that a rank computes: one for each part assigned to it, in order, step after step.

    For `torch.utils.data.DataLoader(dataset, batch_sampler=...)`. Ranks that share a part get the same samples in the
    same order; the parts of a step are disjoint and make up its global batch. Every pass over the sampler is an epoch,
    in a new order; all orders follow from the seed. A last incomplete batch is dropped.

    Args:
        samples: size of the data set.
        code: who computes which part.
        batch_size: samples in a global batch; a part is ``batch_size / code.parts`` of them.
        rank: of this process, from 0 to ``code.workers - 1``.
        seed: seed of the shuffles, the same on all ranks.
        ranks_per_host: how many ranks every host has, where ranks are numbered host by host, so that holders of the
            same part are spread over the hosts; the same on all ranks. Default: what torchrun says.

    Attributes:
        worker: the worker of the code that this rank is.
        step: the step that comes next, counted from the first epoch's first.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument has a wrong value; ``batch_size`` is not a multiple of ``code.parts``.
    """

    def __init__(
        self,
        samples: int,
        code: Code,
        *,
        batch_size: int,
        rank: int,
        seed: int = 0,
        ranks_per_host: int | None = None,
    ) -> None:
        if not isinstance(code, Code):
            raise TypeError(f"code must be a RepetitionCode or CyclicCode, got {type(code).__name__}")
        self._batches = GlobalBatches(samples, batch_size, seed)
        if batch_size % code.parts:
            raise ValueError(f"batch_size must be a multiple of the code's {code.parts} parts, got {batch_size}")
        self._code = code
        self.worker = worker_of(rank, code, told_ranks_per_host(code) if ranks_per_host is None else ranks_per_host)
        self._identity = {"samples": samples, "batch_size": batch_size, "parts": code.parts, "seed": seed}
        self.step = 0

    @property
    def steps_per_epoch(self) -> int:
        """Global batches in an epoch."""
        return self._batches.per_epoch

    def __len__(self) -> int:
        """Mini-batches in an epoch."""
        return self.steps_per_epoch * len(self._code.assignment(self.worker))

    def __iter__(self) -> Iterator[list[int]]:
        """The mini-batches from `step` to the end of its epoch."""
        parts = self._code.assignment(self.worker)
        for step in range(self.step, (self.step // self.steps_per_epoch + 1) * self.steps_per_epoch):
            for part in parts:
                # Before the last part is handed out: whoever stops asking then has all of the step.
                if part == parts[-1]:
                    self.step = step + 1
                yield self._batches.part(step, part, self._code.parts).tolist()

    def set_epoch(self, epoch: int) -> None:
        """Goes to the beginning of an epoch; needed only to leave one early or to go back."""
        ops.check_int("epoch", epoch, 0)
        self.step = epoch * self.steps_per_epoch

    def state_dict(self) -> SamplerState:
        """Where the sampler stands.

        A DataLoader with ``num_workers > 0`` reads ahead: then set ``step`` in what is saved to the number of steps
        that were really taken.
        """
        return SamplerState(**self._identity, step=self.step)

    def load_state_dict(self, state: SamplerState) -> None:
        """Goes on where `state_dict` stood, also with another rank.

        Raises:
            ValueError: the state belongs to other batches: another data set, batch size, seed or number of parts.
        """
        for name, value in self._identity.items():
            if state[name] != value:
                raise ValueError(f"state must be of a sampler with {name}={value}, got {name}={state[name]}")
        ops.check_int("state['step']", state["step"], 0)
        self.step = state["step"]
