"""The state of the step that runs: its number, which part this rank computes, and how far it has come."""

from __future__ import annotations

from draco_ext.codes import Code
from draco_ext.training.seeding import LOADER, seed_generators


class Step:
    """Where this rank is in a step.

    Args:
        code: who computes which part.
        worker: the worker that this rank is.
        seed: of the generators' seeds.

    Attributes:
        number: of the step, from 0.
        parts: those that this rank computes in it, in order.
        index: of the part that runs, among them.
        forwards: forward passes of that part so far.
        accumulated: mini-batches before the last one, whose gradients are only added up (`no_sync`).
        in_loop: whether the mini-batches come from `Guard.steps`.
        awaited: in this loop, whether a mini-batch is handed out that was not yet passed backward.
    """

    def __init__(self, code: Code, worker: int, seed: int) -> None:
        self._code = code
        self._worker = worker
        self._seed = seed
        self.in_loop = self.awaited = False
        self.begin(0)

    def begin(self, number: int) -> None:
        """Begin a step."""
        self.number = number
        self.parts = self._code.parts_in_step(number, self._worker)
        self.index = self.forwards = self.accumulated = 0

    def begin_part(self, index: int) -> None:
        """Begin one of this rank's parts, with a mini-batch that is handed out."""
        self.index, self.forwards, self.awaited = index, 0, True

    @property
    def in_last_part(self) -> bool:
        """Whether the part that runs is the last one, after which messages are exchanged."""
        return self.index == len(self.parts) - 1

    def seed(self, stage: int, index: int | None = None) -> None:
        """Seed the global generators for a stage of a part; default: of the one that runs."""
        part = self.parts[self.index if index is None else index]
        seed_generators(self._seed, self.number, part, stage)

    def seed_loading(self) -> None:
        """Seed the global generators where a sampler is asked for a mini-batch."""
        if not self.in_loop:  # which seeds by itself, for the part that comes next
            # The forward passes count, so that accumulated mini-batches do not get the same noise.
            self.seed(LOADER - 2 * self.forwards)

    def check_loop(self) -> None:
        """Refuse a pass outside the loop where that is needed.

        Raises:
            RuntimeError: the code has several parts for each rank.
        """
        if not self.in_loop and len(self.parts) > 1:
            raise RuntimeError(f"{self._code!r} has several parts for each rank: loop over guard.steps(loader)")

    def incomplete(self, number: int) -> RuntimeError:
        """Return the error of a step, by its number, that was left before its end."""
        return RuntimeError(
            f"step {number} is not complete: each of its {len(self.parts)} mini-batches needs one backward pass"
        )
