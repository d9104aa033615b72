"""The report of a guard: suspects, failed steps and times."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass
class Seconds:
    """The time that a rank has spent, measured on the host; a GPU may still be working when it ends.

    Attributes:
        encode: seconds for adding up gradients to messages.
        communicate: seconds of waiting for other ranks.
        decode: seconds for digests, projections, votes and writing results.
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
        """Count the time of this context as decoding, except for the waiting in it."""
        begin, waited = time.perf_counter(), self.communicate
        yield
        self.decode += time.perf_counter() - begin - (self.communicate - waited)


@dataclass
class Suspect:
    """A rank that sent wrong messages, in `Report`.

    Attributes:
        worker: its worker number in the code.
        rank: its rank in the process group.
        host: the name of its host.
        steps: the steps in which its messages were wrong.
        buckets: the number of its wrong messages.
        other_data: the steps among them in which, according to its own record, its inputs differed from those of the
            ranks with the same part: other mini-batches, or more or fewer forward passes.
    """

    worker: int
    rank: int
    host: str
    steps: list[int] = field(default_factory=list)
    buckets: int = 0
    other_data: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Report:
    """The findings of a guard so far.

    Attributes:
        trust: who must be honest, in one sentence.
        steps: the number of steps, including failed ones.
        suspects: the suspects, by rank. Steps that failed add none.
        probable: a rank that probably sends errors near the noise, which no single decode can name, with a confidence
            from 1/2 to 1. So many decodes left out only this rank that no other rank explains as many. This is not a
            proof: ranks that collude closely around an honest rank can cause it to be listed here.
        failed_steps: the steps without an update, because too many messages were wrong or missing for the guarantee.
        missing: the steps in which messages did not arrive in time, by rank.
        repaired: the steps in which parameters, buffers or watched optimizers differed from those of the majority and
            were replaced by them, by rank.
        unwritten: the number of findings that could not be written to this rank's ledger.
        undelivered: the number of findings for which this rank's callback raised an error.
        seconds: the time that this rank has spent in all steps.
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
