"""Which samples every step uses, how a step's batch is cut into parts, and which of them a rank computes."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor
from torch.utils.data import Sampler

from draco_ext import _checks
from draco_ext.codes import Code
from draco_ext.training.placement import announce_host, place_ranks


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

    The position moves with the steps of the guard that has the same code, not with what the sampler is asked for:
    looking at a mini-batch, workers that read ahead, and a loader that is left with ``break`` cost nothing. A pass
    begins a new epoch where steps of the one before were taken, and otherwise where that one began; after
    `load_state_dict` it is the rest of the epoch. Without a guard a complete pass moves on to the next epoch, and one
    that was broken off does not.

    Args:
        samples: size of the data set.
        code: who computes which part.
        batch_size: samples in a global batch; a part is ``batch_size / code.parts`` of them.
        rank: of this process, from 0 to ``code.workers - 1``.
        seed: seed of the shuffles, the same on all ranks.
        ranks_per_host: how many ranks every host has, or a list with the number of each host, where ranks are numbered
            host by host, so that replicas of a part are placed on different hosts; the same on all ranks. Default: by
            the host names that ranks exchange through torch.distributed's store at the first use of the sampler, if
            the process group has ``code.workers`` ranks; otherwise what torchrun says.

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
            announce_host(code)  # so that no other rank has to wait for this one's first mini-batch
        self._identity = {"samples": samples, "batch_size": batch_size, "parts": code.parts, "seed": seed}
        self._step = 0
        self._resumed = False  # whether the position was set, and no step was taken since
        self._mover: weakref.ref[Any] | None = None  # the guard that has moved it last
        self._first = -1  # first step of the passes to which the last step belonged

    @property
    def workers(self) -> tuple[int, ...]:
        """The worker of the code that each rank is."""
        if self._workers is None:  # not before it is needed: by then there is a process group, if there will be one
            self._workers = place_ranks(self._code, self._ranks_per_host)
        return self._workers

    @property
    def worker(self) -> int:
        """The worker of the code that this rank is."""
        return self.workers[self._rank]

    @property
    def step(self) -> int:
        """The step that comes next, counted from the first epoch's first."""
        return self._step

    @property
    def steps_per_epoch(self) -> int:
        """Global batches in an epoch."""
        return self._batches.per_epoch

    def __len__(self) -> int:
        """Mini-batches in an epoch."""
        return self.steps_per_epoch * len(self._code.assignment(0))  # as many for each worker

    def __iter__(self) -> Iterator[list[int]]:
        """The mini-batches of an epoch, or of the rest of one after `load_state_dict`."""
        _seed(self._code)  # a DataLoader draws its workers' seeds next
        return _Pass(self)

    def set_epoch(self, epoch: int) -> None:
        """Goes to the beginning of an epoch; needed only to go back or to leave some out."""
        _checks.check_int("epoch", epoch, 0)
        self._move_to(epoch * self.steps_per_epoch)

    def state_dict(self) -> SamplerState:
        """Where the training stands: behind the last step that was taken, also where a DataLoader reads ahead."""
        return {**self._identity, "step": self._step}  # type: ignore[typeddict-item]

    def load_state_dict(self, state: SamplerState) -> None:
        """Goes on where `state_dict` stood, also with another rank.

        Raises:
            ValueError: the state belongs to other batches: another data set, batch size, seed or number of parts.
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
        """The step with which a pass begins: in the middle of an epoch only where the position was set to be there."""
        return self._step if self._resumed else -(-self._step // self.steps_per_epoch) * self.steps_per_epoch

    def _mini_batches(self, step: int) -> list[list[int]]:
        return [self._batches.part(step, p, self._code.parts).tolist() for p in self._code.assignment(self.worker)]

    def _complete(self, end: int) -> None:
        """A pass has given its last mini-batch. Whether those are taken is for a guard to say, where there is one."""
        if not (self._mover is not None or any(code == self._code for code in _unused_guards.values())):
            self._step, self._resumed = end, False

    def _take(self, passes: list[_Pass], steps: int) -> None:
        """Moves on by some steps, which belong to one of the passes, or to several that began alike."""
        left = {p: p.given - (self._step - p.first if p.first == self._first else 0) for p in passes}
        left = {p: given for p, given in left.items() if given > 0}
        if not left:
            return
        # The one to which the last step belonged, while it lives: others that are asked meanwhile are looked at only.
        used = max(left, key=lambda p: (p.first == self._first, p.asked, p.number))
        if used.first != self._first:
            self._step = self._first = used.first
        self._step += min(steps, max(given for p, given in left.items() if p.first == used.first))
        self._resumed = False


class _Pass(Iterator[list[int]]):
    """A pass over a sampler. It counts for as long as somebody holds it who may ask it for more.

    Attributes:
        sampler: over which.
        number: later passes have larger ones.
        first: its first step.
        given: how many of its steps have been given out, at least the first mini-batch of each.
        asked: whether it was asked for a mini-batch since the last step of a guard.
        exhausted: whether it has nothing left to give.
    """

    _numbers = itertools.count()

    def __init__(self, sampler: RedundantBatchSampler) -> None:
        self.sampler = sampler
        self.number = next(self._numbers)
        self.first = self.given = 0
        self.asked = self.exhausted = False
        self._end = -1  # the step behind its last one; its first is not known before it is asked
        self._rest_of_step: list[list[int]] = []

    # No generator: that would hold this object, which then would live until Python collects cycles.
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


# Where samplers and guards find each other: in the code.
_passes: weakref.WeakSet[_Pass] = weakref.WeakSet()
_guards: weakref.WeakKeyDictionary[Any, Code] = weakref.WeakKeyDictionary()
_unused_guards: weakref.WeakKeyDictionary[Any, Code] = weakref.WeakKeyDictionary()  # which have not taken a step


def _passes_over(sampler: RedundantBatchSampler) -> list[_Pass]:
    return [other for other in list(_passes) if other.sampler is sampler]


def announce_guard(guard: Any, code: Code) -> None:
    """From now on, only steps of guards move samplers with this code; the guard seeds where they are asked."""
    _guards[guard] = _unused_guards[guard] = code


def _seed(code: Code) -> None:
    """Before a mini-batch: whatever a rank has drawn alone since the last one, as rank 0 does in an evaluation."""
    for guard, other in list(_guards.items()):
        if other == code:
            guard.seed_mini_batch()


def check_workers_of_samplers(code: Code, workers: tuple[int, ...]) -> None:
    """Raises, on all ranks alike, where a sampler in use has placed the ranks otherwise than the guard has."""
    for other in list(_passes):
        sampler = other.sampler
        if sampler._code == code and other.asked and sampler.workers != workers:
            raise ValueError(
                "ranks_per_host must be the same for protect and RedundantBatchSampler, got another placement of ranks "
                f"from the sampler: {list(sampler.workers)} instead of {list(workers)}"
            )


def step_taken(guard: Any, code: Code, steps: int) -> None:
    """Moves the samplers with this code whose mini-batches a guard's step has used.

    Args:
        guard: whose step it was.
        code: its code.
        steps: how many mini-batches of each part were in it: more than one where gradients were accumulated.
    """
    _unused_guards.pop(guard, None)
    with_code = [other for other in list(_passes) if other.sampler._code == code]
    in_use: dict[int, list[_Pass]] = {}
    for other in with_code:
        # One that was not asked has given what this step used only if it had given everything before, and no other
        # guard's step, as of another model in the same loop, takes it.
        mover = other.sampler._mover
        if other.asked or (other.exhausted and (mover is None or mover() in (guard, None))):
            in_use.setdefault(id(other.sampler), []).append(other)
    for passes in in_use.values():
        passes[0].sampler._mover = weakref.ref(guard)
        passes[0].sampler._take(passes, steps)
    for other in with_code:
        other.asked = False
