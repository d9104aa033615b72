"""What a guard reports: suspects, failed steps, and where the time went."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass
class Seconds:
    """Where a rank's time went: of its host; on a GPU work may go on behind it.

    Attributes:
        encode: adding gradients up to messages.
        communicate: waiting for others.
        decode: digests, projections, votes, and putting results in place.
    """

    encode: float = 0.0
    communicate: float = 0.0
    decode: float = 0.0

    @contextlib.contextmanager
    def encoding(self) -> Iterator[None]:
        """Count the time of this context as encoding."""
        begin = time.perf_counter()
        yield
        self.encode += time.perf_counter() - begin

    @contextlib.contextmanager
    def decoding(self) -> Iterator[None]:
        """Count the time of this context as decoding, without the waiting in it."""
        begin, waited = time.perf_counter(), self.communicate
        yield
        self.decode += time.perf_counter() - begin - (self.communicate - waited)


@dataclass
class Suspect:
    """A rank that sent wrong messages, in `Report`.

    Attributes:
        worker: of the code.
        rank: in the process group.
        host: its name.
        steps: in which its messages were wrong.
        buckets: how many of its messages were.
        other_data: those of the steps in which its inputs differed from those of the ranks with which it shares a part,
            as it says itself: other mini-batches, or more or fewer forward passes.
    """

    worker: int
    rank: int
    host: str
    steps: list[int] = field(default_factory=list)
    buckets: int = 0
    other_data: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Report:
    """What a guard has seen so far.

    Attributes:
        trust: who must be honest, in one sentence.
        steps: how many steps were taken or failed.
        suspects: by rank; none on account of a step that failed.
        probable: a rank that probably sends errors near the noise, which no single decode can name: the only one left
            out of so many decodes that no other explains as many. With the confidence in it, from 1/2 to 1. No proof:
            ranks that collude closely around an honest one can have that stand here.
        failed_steps: steps without an update, because the guarantee did not cover what came in.
        missing: by rank, the steps in which messages of it did not come in time.
        repaired: by rank, the steps in which its parameters, buffers or watched optimizers differed from those of the
            majority, and were given what the majority has.
        unwritten: findings that could not be written into this rank's ledger.
        undelivered: findings at which this rank's callback raised an error.
        seconds: where this rank's time went in all steps together.
    """

    trust: str
    steps: int
    suspects: dict[int, Suspect]
    failed_steps: tuple[int, ...]
    missing: dict[int, list[int]] = field(default_factory=dict)
    repaired: dict[int, list[int]] = field(default_factory=dict)
    probable: dict[int, float] = field(default_factory=dict)
    unwritten: int = field(default=0, compare=False)
    undelivered: int = field(default=0, compare=False)
    seconds: Seconds = field(default_factory=Seconds, compare=False)
