"""The state of the current step: its number, the part that this rank computes, and its progress."""

from __future__ import annotations

from draco_ext.codes import Code
from draco_ext.training.seeding import LOADER, seed_generators


class Step:
    """The progress of this rank in a step.

    Args:
        code: the assignment of parts to workers.
        worker: this rank's worker number.
        seed: the seed of the generators.
        shard: the number of this rank among those that make up the worker, which divide its parts among themselves.
        shards: the number of these ranks.

    Attributes:
        number: the number of the step, from 0.
        parts: the parts that this rank computes in it, in order.
        index: the index of the current part among them.
        forwards: the number of forward passes of that part so far.
        accumulated: the number of mini-batches before the last one, whose gradients are only added up (`no_sync`).
        in_loop: whether the mini-batches come from `Guard.steps`.
        awaited: whether `Guard.steps` has yielded a mini-batch that was not yet passed backward.
    """

    def __init__(self, code: Code, worker: int, seed: int, *, shard: int = 0, shards: int = 1) -> None:
        self._code = code
        self._worker = worker
        self._seed = seed
        self._shard = shard
        self._shards = shards
        self.in_loop = self.awaited = False
        self.begin(0)

    def begin(self, number: int) -> None:
        """Begin a step."""
        self.number = number
        self.parts = self._code.parts_in_step(number, self._worker)
        self.index = self.forwards = self.accumulated = 0

    def begin_part(self, index: int) -> None:
        """Begin one of this rank's parts, when its mini-batch is yielded."""
        self.index, self.forwards, self.awaited = index, 0, True

    @property
    def in_last_part(self) -> bool:
        """Return whether the current part is the last one, after which messages are exchanged."""
        return self.index == len(self.parts) - 1

    def seed(self, stage: int, index: int | None = None) -> None:
        """Seed the global generators for a stage of a part, by default the current one."""
        part = self.parts[self.index if index is None else index]
        seed_generators(self._seed, self.number, part * self._shards + self._shard, stage)

    def seed_loading(self) -> None:
        """Seed the global generators when a sampler is asked for a mini-batch."""
        if not self.in_loop:  # the loop itself seeds for the next part
            # The forward passes count, so that accumulated mini-batches do not get the same noise.
            self.seed(LOADER - 2 * self.forwards)

    def check_loop(self) -> None:
        """Refuse a pass outside the loop of `Guard.steps` if the code needs it.

        Raises:
            RuntimeError: the code has several parts for each rank.
        """
        if not self.in_loop and len(self.parts) > 1:
            raise RuntimeError(f"{self._code!r} has several parts for each rank: loop over guard.steps(loader)")

    def incomplete(self, number: int) -> RuntimeError:
        """Return the error for a step that was left before its end."""
        return RuntimeError(
            f"step {number} is not complete: each of its {len(self.parts)} mini-batches needs one backward pass"
        )
