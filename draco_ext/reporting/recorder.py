"""The recorder of a guard's findings (suspects, missing ranks, repairs), with the ledger and the callback."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from draco_ext.reporting.evidence import Evidence
from draco_ext.reporting.ledger import Finding, Ledger
from draco_ext.reporting.report import Report, Seconds, Suspect, copied_steps

logger = logging.getLogger("draco_ext")


def open_ledger(path: str | Path | None, rank: int) -> tuple[Ledger | None, str | None]:
    """Open this rank's ledger. Only rank 0 has one, or, with "{rank}" in its name, every rank.

    Returns:
        The ledger, or None if this rank has none, and the reason if it cannot be opened, else None.
    """
    if path is None or (rank != 0 and "{rank}" not in str(path)):
        return None, None
    # Absolute, since a script may change its directory later.
    own = Path(str(path).replace("{rank}", str(rank))).absolute()
    try:
        return Ledger(own), None
    except OSError as error:
        return None, f"{own}: {error.strerror or error}"[:1000]


class Recorder:
    """A recorder that collects findings about ranks, passes them to ledger and callback, and reports them.

    All ranks record the same findings.

    Args:
        rank: this rank.
        ranks: the rank of every worker.
        hosts: the name of every rank's host.
        ledger: the ledger to which findings are appended.
        callback: called with every finding when findings are delivered.
        unit: what a rank is called in messages: "replica" if it stands for several ranks with a shard each.
        members: the ranks for which each rank stands if it is a replica.
        speaks: whether this rank logs warnings, and not another one of its replica.

    Attributes:
        evidence: the evidence about ranks that no single decode can name.
        unit: what a rank is called in messages.
    """

    def __init__(
        self,
        rank: int,
        ranks: Sequence[int],
        hosts: Sequence[str],
        *,
        ledger: Ledger | None = None,
        callback: Callable[[Finding], None] | None = None,
        unit: str = "rank",
        members: Sequence[Sequence[int]] = (),
        speaks: bool = True,
    ) -> None:
        self.evidence = Evidence()
        self.unit = unit
        self._members = members
        self._speaks = speaks
        self._rank = rank
        self._ranks = ranks
        self._hosts = hosts
        self._ledger = ledger
        self._callback = callback
        self._suspects: dict[int, Suspect] = {}
        self._missing: dict[int, list[int]] = {}
        self._repaired: dict[int, list[int]] = {}
        self._failed_steps: list[int] = []
        self._undecided: list[int] = []
        self._pending: list[Finding] = []  # of the current step
        self._callback_errors: set[type[Exception]] = set()  # types that were logged
        self._undelivered = 0

    def log(self, message: str, *arguments: Any) -> None:
        """Log a warning once per job: on the first rank that is not a suspect. Other ranks log it at debug level."""
        trusted = set(range(len(self._ranks))) - self._suspects.keys() - self._missing.keys()
        first = self._speaks and min(trusted, default=0) == self._rank
        logger.log(logging.WARNING if first else logging.DEBUG, message, *arguments)

    def name(self, rank: int) -> str:
        """Return the name of a rank in messages."""
        members = ", ".join(map(str, self._members[rank])) if self._members else ""
        own = f" (rank{'s' if ',' in members else ''} {members})" if members else ""
        return f"{self.unit} {rank}{own} on {self._hosts[rank]}"

    def add_message(
        self,
        worker: int,
        kind: str,
        *,
        step: int,
        bucket: int,
        failed: bool,
        elements: int | None = None,
        first: int | None = None,
        largest: float | None = None,
        shards: Collection[int] = (),
    ) -> None:
        """Add a wrong or missing message; `shards`: those of a replica's that were. See `Finding` for the others."""
        finding = self._finding(
            worker,
            kind,
            step=step,
            bucket=bucket,
            elements=elements,
            first=first,
            largest=largest,
            failed=failed,
            ranks=self._ranks_of(worker, shards),
        )
        if finding.missing:
            self._miss(finding)
        elif not failed:
            self._accuse(finding)
        self._add(finding)

    def add_undecided(self, workers: Sequence[int], *, step: int, bucket: int, failed: bool) -> None:
        """Add workers whose parts had no majority, so that a second stage did without these parts."""
        if not workers:
            return
        if step not in self._undecided[-1:]:
            self._undecided.append(step)
            self.log(
                "more %ss with the same part are wrong in step %d than the code corrects, among %s; %s",
                self.unit,
                step,
                sorted(self._ranks[worker] for worker in workers),
                "too many parts have no majority" if failed else "the gradient is a robust mean without this part",
            )
        for worker in workers:
            self._add(
                self._finding(
                    worker,
                    "undecided",
                    step=step,
                    bucket=bucket,
                    elements=None,
                    first=None,
                    largest=None,
                    failed=failed,
                )
            )

    def add_state(self, worker: int, sections: Sequence[str], *, step: int, repaired: bool) -> None:
        """Add a rank whose state differed from the majority's."""
        finding = self._finding(
            worker, "state", step=step, bucket=-1, elements=None, first=None, largest=None, failed=False
        )
        self.log(
            "%s had other %s than the majority in step %d; %s",
            self.name(finding.rank),
            " and ".join(sections),
            step,
            "it was given the majority's" if repaired else "it could not be repaired",
        )
        if repaired:
            self._repaired.setdefault(finding.rank, []).append(step)
        self._add(finding)

    def add_audit(self, worker: int, *, step: int, persistent: bool) -> None:
        """Add a rank that an audit has found to be wrong."""
        kind = "persistent" if persistent else "transient"
        finding = self._finding(
            worker, kind, step=step, bucket=-1, elements=None, first=None, largest=None, failed=False
        )
        self._accuse(finding)
        self._add(finding)

    def weigh(self, left_out: Collection[int], suspects: Collection[int], step: int) -> None:
        """Add the evidence of a decode that did not fail about workers that it left out without naming them."""
        if set(suspects) >= set(left_out):
            return
        before = self.evidence.probable
        self.evidence.add([self._ranks[j] for j in left_out], [self._ranks[j] for j in suspects])
        for rank in self.evidence.probable.keys() - before.keys():
            self.log(
                "%s probably sends errors near the noise: it was left out of many decodes by step %d",
                self.name(rank),
                step,
            )

    def add_failure(self, step: int) -> None:
        """Add a step without an update."""
        self._failed_steps.append(step)

    def missing_in(self, step: int) -> set[int]:
        """Return the ranks for which this step is the last one in which they were missing."""
        return {rank for rank, steps in self._missing.items() if steps[-1:] == [step]}

    def deliver(self) -> None:
        """Call the callback with the step's findings; its errors are logged and do not end the job."""
        findings, self._pending = self._pending, []
        if self._callback is None:
            return
        for finding in findings:
            try:
                self._callback(finding)
            except Exception as error:
                self._undelivered += 1
                if type(error) not in self._callback_errors:
                    self._callback_errors.add(type(error))
                    logger.exception("callback raised an error; training goes on, and others of its kind are counted")

    def report(self, *, trust: str, steps: int, seconds: Seconds) -> Report:
        """Return a snapshot of all findings, for any thread; see `Report`."""
        suspects = {
            rank: replace(
                suspect, steps=list(suspect.steps), other_data=list(suspect.other_data), ranks=list(suspect.ranks)
            )
            for rank, suspect in dict(self._suspects).items()  # dict(): another thread may add to it meanwhile
        }
        return Report(
            trust,
            steps,
            suspects,
            tuple(self._failed_steps),
            copied_steps(self._missing),
            copied_steps(self._repaired),
            self.evidence.probable,
            0 if self._ledger is None else self._ledger.unwritten,
            self._undelivered,
            replace(seconds),
            undecided_steps=tuple(self._undecided),
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the findings for a checkpoint."""
        return {
            "suspects": {rank: asdict(suspect) for rank, suspect in self._suspects.items()},
            "failed_steps": list(self._failed_steps),
            "undecided_steps": list(self._undecided),
            "missing": copied_steps(self._missing),
            "repaired": copied_steps(self._repaired),
            "evidence": self.evidence.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the findings that `state_dict` returned."""
        self._suspects = {rank: Suspect(**suspect) for rank, suspect in state["suspects"].items()}
        self._failed_steps = list(state["failed_steps"])
        self._undecided = list(state.get("undecided_steps", []))  # not in checkpoints of earlier versions
        self._missing = copied_steps(state["missing"])
        self._repaired = copied_steps(state.get("repaired", {}))
        if "evidence" in state:  # not in checkpoints of earlier versions
            self.evidence.load_state_dict(state["evidence"])

    def _ranks_of(self, worker: int, shards: Collection[int]) -> list[int]:
        """Return the ranks of a replica that have these shards; none if a rank stands for itself."""
        if not self._members:
            return []
        members = self._members[self._ranks[worker]]
        return [members[shard] for shard in sorted(shards)]

    def _finding(self, worker: int, kind: str, **what: Any) -> Finding:
        rank = self._ranks[worker]
        return Finding(
            time=time.time(),
            worker=worker,
            rank=rank,
            host=self._hosts[rank],
            missing=kind == "missing",
            kind=kind,
            **what,
        )

    def _add(self, finding: Finding) -> None:
        if self._ledger is not None:
            self._ledger.append(finding)
        self._pending.append(finding)

    def _miss(self, finding: Finding) -> None:
        steps = self._missing.setdefault(finding.rank, [])
        if not steps:
            self.log("%s is missing in step %d", self.name(finding.rank), finding.step)
        if finding.step not in steps[-1:]:
            steps.append(finding.step)

    def _accuse(self, finding: Finding) -> None:
        if finding.rank not in self._suspects:
            self._suspects[finding.rank] = Suspect(finding.worker, finding.rank, finding.host)
            what = "has other data than the ranks with the same part: mini-batches or forward passes differ"
            if finding.kind != "data":
                what = "sent a wrong gradient" if finding.bucket >= 0 else f"computed a wrong gradient ({finding.kind})"
            self.log("%s %s in step %d", self.name(finding.rank), what, finding.step)
        suspect = self._suspects[finding.rank]
        suspect.buckets += 1
        if finding.kind == "data" and finding.step not in suspect.other_data[-1:]:
            suspect.other_data.append(finding.step)
        if finding.step not in suspect.steps[-1:]:
            suspect.steps.append(finding.step)
        suspect.ranks = sorted({*suspect.ranks, *finding.ranks})
