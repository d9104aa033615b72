"""The samples of every step, the parts into which its batch is divided, and a sampler of the parts of one rank."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypedDict

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler, Sampler

from draco_ext import _checks
from draco_ext.codes import Code
from draco_ext.training.placement import announce_host, place_ranks


class GlobalBatches:
    """The global batch of every step, which is a pure function of the seed and the step.

    Every rank can ask for any step and any part, in any order, and gets the same answer. It does not depend on the
    number of parts. Every epoch is reshuffled; a last incomplete batch is dropped.

    Args:
        samples: the size of the training set.
        batch_size: the number of samples in one global batch, at most ``samples``.
        seed: the seed of the shuffles.
    """

    def __init__(self, samples: int, batch_size: int, seed: int) -> None:
        _checks.check_int("samples", samples, 1)
        _checks.check_int("batch_size", batch_size, 1, samples)
        _checks.check_int("seed", seed, 0)
        self.batch_size = batch_size
        self.per_epoch = samples // batch_size  # steps
        self._samples = samples
        self._seed = seed
        self._epoch = -1
        self._order = torch.empty(0, dtype=torch.int64)

    def indices(self, step: int) -> Tensor:
        """Return the samples of one step's global batch, in order."""
        epoch, batch = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed((self._seed * 1_000_003 + epoch) % 2**63)
            self._order = torch.randperm(self._samples, generator=generator)
            self._epoch = epoch
        return self._order[batch * self.batch_size :][: self.batch_size]

    def part(self, step: int, part: int, parts: int) -> Tensor:
        """Return the samples of one part; the batch is divided into ``parts`` as evenly as possible."""
        return self.indices(step).tensor_split(parts)[part]


class SamplerState(TypedDict):
    """The type of `RedundantBatchSampler.state_dict`."""

    samples: int
    batch_size: int
    parts: int
    seed: int
    step: int


class RedundantBatchSampler(Sampler[list[int]]):
    """A batch sampler that yields the mini-batches of a rank: in every step one for each part assigned to the rank.

    It is meant for `torch.utils.data.DataLoader(dataset, batch_sampler=...)`. Ranks that share a part get the same
    samples in the same order. The parts of a step are disjoint and make up its global batch. Every pass over the
    sampler is an epoch in a new order; all orders follow from the seed. A last incomplete batch is dropped.

    The position moves with the steps of the guard that has the same code, not with the mini-batches that are requested.
    So inspecting a mini-batch, workers that read ahead, and leaving a loop with ``break`` skip nothing. A pass begins a
    new epoch if a step of the pass before was taken; otherwise it begins where that pass began. After
    `load_state_dict` it is the rest of the epoch. Without a guard, a complete pass moves on to the next epoch, and an
    incomplete one does not.

    Args:
        samples: the size of the data set.
        code: the assignment of parts to ranks.
        batch_size: the number of samples in a global batch; a part has ``batch_size / code.parts`` of them.
        rank: the rank of this process, from 0 to ``code.workers - 1``.
        seed: the seed of the shuffles, the same on all ranks.
        ranks_per_host: the number of ranks on every host, or a list with one number for each host; ranks are numbered
            host by host. Replicas of a part are then placed on different hosts. It must be the same on all ranks.
            Default: ranks exchange their hosts' names through torch.distributed's store at the first use of the
            sampler, if the process group has ``code.workers`` ranks; otherwise torchrun's environment variables count.

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
        ranks_per_host: int | Sequence[int] | None = None,
    ) -> None:
        if not isinstance(code, Code):
            raise TypeError(f"code must be a RepetitionCode or CyclicCode, got {type(code).__name__}")
        self._batches = GlobalBatches(samples, batch_size, seed)
        if batch_size % code.parts:
            raise ValueError(f"batch_size must be a multiple of the code's {code.parts} parts, got {batch_size}")
        _checks.check_int("rank", rank, 0, code.workers - 1)
        self._code = code
        self._rank = rank
        self._ranks_per_host = ranks_per_host
        self._workers = None if ranks_per_host is None else place_ranks(code, ranks_per_host)
        if ranks_per_host is None:
            announce_host(code)  # now, so that no other rank has to wait until this one's first mini-batch
        self._identity = {"samples": samples, "batch_size": batch_size, "parts": code.parts, "seed": seed}
        self._step = 0
        self._resumed = False  # whether the position was set and no step was taken since
        self._mover: weakref.ref[Any] | None = None  # the guard that moved it last
        self._first = -1  # first step of the passes to which the last step belonged

    @property
    def workers(self) -> tuple[int, ...]:
        """The worker number of each rank."""
        if self._workers is None:  # as late as possible, when the process group exists, if there will be one
            self._workers = place_ranks(self._code, self._ranks_per_host)
        return self._workers

    @property
    def worker(self) -> int:
        """This rank's worker number."""
        return self.workers[self._rank]

    @property
    def step(self) -> int:
        """The next step, counted from the first epoch's first step."""
        return self._step

    @property
    def steps_per_epoch(self) -> int:
        """The number of global batches in an epoch."""
        return self._batches.per_epoch

    def __len__(self) -> int:
        """Return the number of mini-batches in an epoch."""
        return self.steps_per_epoch * len(self._code.assignment(0))  # the same for each worker

    def __iter__(self) -> Iterator[list[int]]:
        """Return the mini-batches of an epoch, or of the rest of one after `load_state_dict`."""
        _seed(self._code)  # the DataLoader will now draw its workers' seeds
        return _Pass(self)

    def set_epoch(self, epoch: int) -> None:
        """Move to the beginning of an epoch; needed only to repeat or to skip epochs."""
        _checks.check_int("epoch", epoch, 0)
        self._move_to(epoch * self.steps_per_epoch)

    def state_dict(self) -> SamplerState:
        """Return the position after the last step that was taken, even if a DataLoader reads ahead."""
        return {**self._identity, "step": self._step}  # type: ignore[typeddict-item]

    def load_state_dict(self, state: SamplerState) -> None:
        """Restore the position that `state_dict` returned, on this or on another rank.

        Raises:
            ValueError: the state belongs to another data set, batch size, seed or number of parts.
        """
        given: Mapping[str, Any] = state
        for name, value in self._identity.items():
            if given[name] != value:
                raise ValueError(f"state must be of a sampler with {name}={value}, got {name}={given[name]}")
        _checks.check_int("state['step']", state["step"], 0)
        self._move_to(state["step"])

    def _move_to(self, step: int) -> None:
        self._step, self._resumed, self._first = step, True, -1
        for other in _passes_over(self):
            _passes.discard(other)

    def _first_of_pass(self) -> int:
        """Return the first step of a new pass; it is within an epoch only if the position was set there."""
        return self._step if self._resumed else -(-self._step // self.steps_per_epoch) * self.steps_per_epoch

    def _mini_batches(self, step: int) -> list[list[int]]:
        return [self._batches.part(step, p, self._code.parts).tolist() for p in self._code.assignment(self.worker)]

    def _complete(self, end: int) -> None:
        """Move behind a complete pass, unless there is a guard, whose steps move the position."""
        if not (self._mover is not None or any(code == self._code for code in _unused_guards.values())):
            self._step, self._resumed = end, False

    def _take(self, passes: list[_Pass], steps: int) -> None:
        """Move on by some steps, which belong to one of the passes, or to several that began at the same step."""
        left = {p: p.given - (self._step - p.first if p.first == self._first else 0) for p in passes}
        left = {p: given for p, given in left.items() if given > 0}
        if not left:
            return
        # The pass of the last step, while it exists: mini-batches from other passes were only inspected.
        used = max(left, key=lambda p: (p.first == self._first, p.asked, p.number))
        if used.first != self._first:
            self._step = self._first = used.first
        self._step += min(steps, max(given for p, given in left.items() if p.first == used.first))
        self._resumed = False


class _Pass(Iterator[list[int]]):
    """A pass over a sampler. It counts as long as it is referenced, since more mini-batches may be requested.

    Attributes:
        sampler: the sampler.
        number: a number that is larger for later passes.
        first: its first step.
        given: the number of its steps of which at least the first mini-batch was yielded.
        asked: whether a mini-batch was requested since the last step of a guard.
        exhausted: whether all mini-batches were yielded.
    """

    _numbers = itertools.count()

    def __init__(self, sampler: RedundantBatchSampler) -> None:
        self.sampler = sampler
        self.number = next(self._numbers)
        self.first = self.given = 0
        self.asked = self.exhausted = False
        self._end = -1  # the step after its last one; unknown before the first request, as is the first step
        self._rest_of_step: list[list[int]] = []

    # Not a generator: its reference to this object would be a cycle, which lives until the garbage collector runs.
    def __next__(self) -> list[int]:
        sampler = self.sampler
        _seed(sampler._code)
        if self._end < 0:
            self.first = sampler._first_of_pass()
            self._end = (self.first // sampler.steps_per_epoch + 1) * sampler.steps_per_epoch
            _passes.add(self)
        if not self._rest_of_step:
            step = self.first + self.given
            if step == self._end:
                if not self.exhausted:
                    self.exhausted = True
                    sampler._complete(self._end)
                raise StopIteration
            self._rest_of_step = sampler._mini_batches(step)[::-1]
            self.given += 1
        self.asked = True
        return self._rest_of_step.pop()


class RedundantSampler(DistributedSampler[Any]):
    """A drop-in replacement for `torch.utils.data.DistributedSampler` with a repetition code.

    ``DataLoader(dataset, batch_size, sampler=RedundantSampler(dataset, code))``: a rank gets the samples that a
    DistributedSampler would give to rank `part` of ``code.parts``, where `part` is its part. So ranks of a group get
    the same. `set_epoch`, the padding without `drop_last`, and the loader's last incomplete batch are as they are
    there. The batch size stays that of a rank, so the global batch is ``code.parts`` times as large.

    `state_dict` counts the samples that it has yielded, as torchdata's StatefulDistributedSampler does. So training
    resumes within an epoch if the loader asks for no more than is used: a DataLoader without workers, or torchdata's
    StatefulDataLoader, which counts for itself. A DataLoader with workers reads ahead, and the state with it.

    A `RedundantBatchSampler` takes the global batch's size, any code, and its position does not depend on the loader.

    Args:
        dataset: the data set, with a length.
        code: a code with one part for each rank, such as a `RepetitionCode`.
        rank: the rank of this process. Default: that in torch.distributed's default group.
        shuffle: whether each epoch has another order.
        seed: the seed of the orders, the same on all ranks.
        drop_last: whether samples that do not divide evenly among the parts are left out; else some are repeated.
        ranks_per_host: see `RedundantBatchSampler`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument has a wrong value; the code has several parts for each rank.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        code: Code,
        *,
        rank: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        ranks_per_host: int | Sequence[int] | None = None,
    ) -> None:
        if not isinstance(code, Code):
            raise TypeError(f"code must be a RepetitionCode, got {type(code).__name__}")
        if len(code.assignment(0)) > 1:
            raise ValueError(f"code must have one part for each rank, got {code!r}: take a RedundantBatchSampler")
        _checks.check_int("seed", seed, 0)
        rank = dist.get_rank() if rank is None else rank
        _checks.check_int("rank", rank, 0, code.workers - 1)
        super().__init__(dataset, code.parts, 0, shuffle, seed, drop_last)
        self._code = code
        order = {"shuffle": bool(shuffle), "drop_last": bool(drop_last), "seed": seed}
        self._identity = {"samples": len(dataset), "parts": code.parts, **order}  # type: ignore[arg-type]
        self._yielded = 0  # by the last pass
        self._resumed: tuple[int, int] | None = None  # the epoch that the next pass continues, and behind which sample
        self._rank_of_process = rank
        self._workers = None if ranks_per_host is None else place_ranks(code, ranks_per_host)
        if ranks_per_host is None:
            announce_host(code)

    def __iter__(self) -> Iterator[Any]:
        """Return the samples of an epoch, or the rest of them after `load_state_dict`."""
        resumed, self._resumed = self._resumed, None
        # Here, and not when the first sample is asked for, since the state may be asked for before.
        self._yielded = resumed[1] if resumed is not None and resumed[0] == self.epoch else 0
        return self._samples_from(self._yielded)

    def _samples_from(self, first: int) -> Iterator[Any]:
        if self._workers is None:  # as late as possible; see `RedundantBatchSampler.workers`
            self._workers = place_ranks(self._code)
        self.rank = self._code.assignment(self._workers[self._rank_of_process])[0]
        seeded = None
        for index in itertools.islice(super().__iter__(), first, None):
            # Only when a guard has taken a step: a rank may have drawn numbers alone since then.
            if (steps := _steps_of_guards(self._code)) != seeded:
                _seed(self._code)
                seeded = steps
            first += 1
            self._yielded = first
            yield index

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch; to be called before a pass over the loader."""
        _checks.check_int("epoch", epoch, 0)
        super().set_epoch(epoch)
        self._yielded = self._resumed[1] if self._resumed is not None and self._resumed[0] == epoch else 0
        _seed(self._code)  # the DataLoader draws its workers' seeds before it asks for the first sample

    def state_dict(self) -> dict[str, int]:
        """Return the epoch, and how many of its samples were yielded; see above."""
        return {**self._identity, "epoch": self.epoch, "yielded": self._yielded}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Restore the epoch that `state_dict` returned; the next pass over it begins behind what was yielded.

        A pass over another epoch, chosen by `set_epoch`, is whole.

        Raises:
            ValueError: the state belongs to a sampler with other arguments, or counts more samples than an epoch has.
        """
        for name, value in self._identity.items():
            if state[name] != value:
                raise ValueError(f"state must be of a sampler with {name}={value}, got {name}={state[name]}")
        _checks.check_int("state['epoch']", state["epoch"], 0)
        _checks.check_int("state['yielded']", state["yielded"], 0, self.num_samples)
        self.epoch = state["epoch"]
        self._resumed, self._yielded = (state["epoch"], state["yielded"]), state["yielded"]


# Samplers and guards find each other by their code.
_passes: weakref.WeakSet[_Pass] = weakref.WeakSet()
_guards: weakref.WeakKeyDictionary[Any, Code] = weakref.WeakKeyDictionary()
_unused_guards: weakref.WeakKeyDictionary[Any, Code] = weakref.WeakKeyDictionary()  # without a step yet


def _passes_over(sampler: RedundantBatchSampler) -> list[_Pass]:
    return [other for other in list(_passes) if other.sampler is sampler]


def announce_guard(guard: Any, code: Code) -> None:
    """Register a guard: its steps move samplers with this code, and it seeds before each of their mini-batches."""
    _guards[guard] = _unused_guards[guard] = code


def _seed(code: Code) -> None:
    """Let the guards seed before a mini-batch, since a rank may have drawn numbers alone, as in an evaluation."""
    for guard, other in list(_guards.items()):
        if other == code:
            guard.seed_mini_batch()


def _steps_of_guards(code: Code) -> list[int]:
    return [guard.step for guard, other in list(_guards.items()) if other == code]


def check_workers_of_samplers(code: Code, workers: tuple[int, ...]) -> None:
    """Raise ValueError, on all ranks together, if a sampler in use has another placement of ranks than the guard."""
    for other in list(_passes):
        sampler = other.sampler
        if sampler._code == code and other.asked and sampler.workers != workers:
            raise ValueError(
                "ranks_per_host must be the same for protect and RedundantBatchSampler, got another placement of ranks "
                f"from the sampler: {list(sampler.workers)} instead of {list(workers)}"
            )


def step_taken(guard: Any, code: Code, steps: int) -> None:
    """Move the samplers with this code whose mini-batches a guard's step has used.

    Args:
        guard: the guard.
        code: its code.
        steps: the number of mini-batches of each part in the step; more than one if gradients were accumulated.
    """
    _unused_guards.pop(guard, None)
    with_code = [other for other in list(_passes) if other.sampler._code == code]
    in_use: dict[int, list[_Pass]] = {}
    for other in with_code:
        # A pass without a request can contain this step's mini-batches only if all of its mini-batches were yielded
        # before, and if they do not belong to another guard, as of a second model in the same loop.
        mover = other.sampler._mover
        if other.asked or (other.exhausted and (mover is None or mover() in (guard, None))):
            in_use.setdefault(id(other.sampler), []).append(other)
    for passes in in_use.values():
        passes[0].sampler._mover = weakref.ref(guard)
        passes[0].sampler._take(passes, steps)
    for other in with_code:
        other.asked = False
