"""The report of a guard: suspects, failed steps and times."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

from draco_ext.reporting.metrics import read_metrics


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
        rank: its rank in the process group; under FSDP2 the number of the replica.
        host: the name of its host, or of the replica's hosts.
        steps: the steps in which its messages were wrong.
        buckets: the number of its wrong messages.
        other_data: the steps among them in which, according to its own record, its inputs differed from those of the
            ranks with the same part: other mini-batches, or more or fewer forward passes.
        ranks: under FSDP2, where `rank` is a replica: the ranks of the job whose shards of its messages were wrong.
    """

    worker: int
    rank: int
    host: str
    steps: list[int] = field(default_factory=list)
    buckets: int = 0
    other_data: list[int] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Dispute:
    """A rank that had computed a wrong gradient, according to at least s + 1 others.

    Attributes:
        step: the step, whose gradient was put right.
        rank: the rank.
        part: the part that it had computed.
        role: "owner" of the part, or "auditor", which computed it for comparison.
        persistent: whether it was wrong again when it computed the same part again within the step. If not, the fault
            was transient.
    """

    step: int
    rank: int
    part: int
    role: str
    persistent: bool


@dataclass(frozen=True)
class Trigger:
    """A reason to audit a step on which the coin did not fall.

    Attributes:
        step: the step.
        rank: the rank whose statistics were conspicuous, or which called `AuditGuard.doubt`.
        reason: what was conspicuous, or the reason that was given.
    """

    step: int
    rank: int
    reason: str


@dataclass
class AuditReport:
    """The findings of an `Audit` so far; the same on all ranks.

    Attributes:
        audited: the number of steps that were audited.
        triggers: why steps were audited on which the coin did not fall.
        disputes: who was wrong, when.
        convicted: the step in which each rank was convicted that still is, by rank.
        acquitted: the steps in which ranks were acquitted, by rank.
        last_clean_audit: the last step in which other ranks have found each rank's gradient right, by rank; None if
            there is none. Checkpoints up to this step contain no fault of this rank that is still there.
        passes: the number of forward and backward passes of each rank, in units of a step's own pass. Divided by the
            number of steps it is the cost in compute.
        sees: the size of errors that an audit sees with a probability of at least 99%, relative to the gradient, if
            `protect` has got a tolerance; None if it sees all errors, since bits are compared.
    """

    audited: int = 0
    triggers: list[Trigger] = field(default_factory=list)
    disputes: list[Dispute] = field(default_factory=list)
    convicted: dict[int, int] = field(default_factory=dict)
    acquitted: dict[int, list[int]] = field(default_factory=dict)
    last_clean_audit: dict[int, int | None] = field(default_factory=dict)
    passes: float = 0.0
    sees: float | None = None

    def snapshot(self) -> AuditReport:
        """Return a copy that does not change afterwards; another thread may add to the original meanwhile."""
        return replace(
            self,
            triggers=list(self.triggers),
            disputes=list(self.disputes),
            convicted=dict(self.convicted),
            acquitted=copied_steps(self.acquitted),
            last_clean_audit=dict(self.last_clean_audit),
        )

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> AuditReport:
        """Return the report that `dataclasses.asdict` has made the state of."""
        return cls(
            **{
                **deepcopy(dict(state)),
                "triggers": [Trigger(**trigger) for trigger in state["triggers"]],
                "disputes": [Dispute(**dispute) for dispute in state["disputes"]],
            }
        )


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
        audit: what an `Audit` has found; None with a code.
        bounded: whether the code has a second stage. In every step gradients are then robust means of the parts',
            bounded by them, and not their mean; suspects differ from the majority of their part, which may be wrong.
        undecided_steps: the steps in which a part had no majority, since more than s ranks with it were wrong, and a
            second stage did without it.
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
    audit: AuditReport | None = None
    bounded: bool = False
    undecided_steps: tuple[int, ...] = ()

    def metrics(self, prefix: str = "draco/") -> dict[str, float]:
        """Return the report as numbers by name, as loggers of scalars take them.

        A metric of a rank has a name such as ``draco/wrong_steps/rank3``, and is there only if there is something to
        tell of this rank. Those of an audit are there only with an `Audit`. The page on metrics lists all names.

        Args:
            prefix: the beginning of all names.
        """
        return {
            f"{prefix}{metric.name}" + ("" if rank is None else f"/rank{rank}"): value
            for metric, values in read_metrics(self)
            for rank, value in values.items()
        }


def copied_steps(steps_of_ranks: Mapping[int, Sequence[int]]) -> dict[int, list[int]]:
    """Return a deep copy; another thread may add to the original meanwhile."""
    return {rank: list(steps) for rank, steps in dict(steps_of_ranks).items()}
