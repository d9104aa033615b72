"""The verdicts about gradients: which parts are disputed, who was wrong, and who is convicted.

All of it depends on what all ranks have gathered, so all ranks come to the same verdicts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from draco_ext.codes import Audit
from draco_ext.reporting.recorder import Recorder
from draco_ext.reporting.report import AuditReport, Dispute, Trigger
from draco_ext.training.audit import opinions
from draco_ext.training.audit.convictions import Convictions
from draco_ext.training.audit.measures import Measured
from draco_ext.training.audit.opinions import Agree, Row

# What to look at if a step cannot be put right although no rank has a fault.
HINT = (
    " (without a fault: the loop over a step must compute with the mini-batch that it yields and leave gradients as "
    "they are, and all ranks must compute the same bits, which guard.self_test() tests)"
)


class Verdicts:
    """The convictions that hold, and the report of what was found.

    Args:
        audit: the audit.
        ranks: the rank of every worker.
        recorder: records the findings.
        agree: compares two measures.
        on_conviction: see `protect`.

    Attributes:
        found: the report.
    """

    def __init__(
        self, audit: Audit, ranks: Sequence[int], recorder: Recorder, agree: Agree, on_conviction: str
    ) -> None:
        self.audit = audit
        self.agree = agree
        self._ranks = ranks
        self._recorder = recorder
        self._on_conviction = on_conviction
        self._convictions = Convictions()
        self.found = AuditReport(last_clean_audit=dict.fromkeys(range(audit.workers)))

    @property
    def convicted(self) -> frozenset[int]:
        """Return the convicted workers."""
        return self._convictions.convicted

    @property
    def substituted(self) -> frozenset[int]:
        """Return the convicted workers whose parts others compute."""
        return self.convicted if self._on_conviction != "drop" else frozenset()

    @property
    def dropped(self) -> frozenset[int]:
        """Return the convicted workers whose parts are left out of the sum."""
        return self.convicted if self._on_conviction == "drop" else frozenset()

    @property
    def in_sum(self) -> list[int]:
        """Return the workers whose parts are in the sum."""
        return [k for k in range(self.audit.workers) if k not in self.dropped]

    def helpers(self, shifts: Sequence[int]) -> list[dict[int, int]]:
        """Return for each shift the substituted workers whose parts are then computed, each with who has done it."""
        waiting = set(self.substituted)
        found = []
        for shift in shifts:
            able = {k: (k - shift) % self.audit.workers for k in waiting}
            helped = {k: helper for k, helper in able.items() if helper not in self.convicted}
            waiting -= helped.keys()
            found.append(helped)
        return found

    def disputed(self, rows: Sequence[Row], shifts: Sequence[int]) -> list[int]:
        """Return the parts about which ranks that are not convicted disagree."""
        return opinions.disputed_parts(rows, shifts, self.agree, convicted=self.convicted, dropped=self.dropped)

    def pairs(self, rows: Sequence[Row], shifts: Sequence[int]) -> list[tuple[Measured, Measured]]:
        """Return each part's measure by its owner and by each auditor, without convicted ranks."""
        return [
            (rows[part].audited, measure)
            for part in self.in_sum
            for j, measure in opinions.opinions_of_others(rows, shifts, part).items()
            if not {part, j} & self.convicted
        ]

    def add_triggers(self, step: int, reasons: Mapping[int, str]) -> None:
        """Record why a step is audited on which the coin did not fall, by worker."""
        for j, reason in sorted(reasons.items()):
            self.found.triggers.append(Trigger(step, self._ranks[j], reason))

    def count_passes(self, number: float) -> None:
        """Record that passes were made; a number below 1 is one over a part of the mini-batches."""
        self.found.passes += number

    def explain(self, step: int, why: str, workers: Iterable[int] = ()) -> str:
        """Return why a step has failed."""
        named = sorted({self._ranks[j] for j in workers})
        return f"no gradient in step {step}: {why}" + (
            f" than {self.audit!r} can correct: ranks {named}" if named else f", with {self.audit!r}"
        )

    def conclude(self, verdict: StepVerdict) -> tuple[str | None, str | None]:
        """Record who was wrong in a step that is right now, convict and acquit.

        Returns:
            Why the step fails, or None; and, if it ends with an error although its gradient is right, that error.
        """
        step, wrong, before = verdict.step, verdict.wrong, self.convicted
        if len(before | wrong.keys()) > self.audit.adversaries:
            return self.explain(step, "more ranks were wrong", [*before, *wrong]), None
        convicted = []
        for j, (part, role) in sorted(wrong.items()):
            persistent = j in verdict.wrong_again
            self.found.disputes.append(Dispute(step, self._ranks[j], part, role, persistent))
            self._recorder.add_audit(j, step=step, persistent=persistent)
            if self._convictions.lose(j, persistent=persistent):
                convicted.append(j)
                self.found.convicted[self._ranks[j]] = step
                self._recorder.log("%s is convicted in step %d", self._recorder.name(self._ranks[j]), step)
        for k in range(self.audit.workers):
            if k in before:
                right = verdict.own_gradient_is_right(k, before)
                if right is not None and self._convictions.compare(k, right=right):
                    del self.found.convicted[self._ranks[k]]
                    self.found.acquitted.setdefault(self._ranks[k], []).append(step)
                    self._recorder.log("%s is acquitted in step %d", self._recorder.name(self._ranks[k]), step)
            elif k not in wrong:
                self.found.last_clean_audit[self._ranks[k]] = step
        if not convicted or self._on_conviction != "raise":
            return None, None
        names = ", ".join(self._recorder.name(self._ranks[j]) for j in convicted)
        return None, f"{names} computed wrong gradients, most recently in step {step}, and is convicted"

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {"convictions": self._convictions.state_dict(), "found": asdict(self.found)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        self._convictions.load_state_dict(state["convictions"])
        self.found = AuditReport.from_dict(state["found"])


class StepVerdict:
    """The verdict about an audited step: the right measure of each part, and who was wrong.

    Args:
        verdicts: the convictions with which the step began.
        step: the step.
        rows: what ranks have said after their first own passes.
        shifts: who has audited whom.
        disputed: the disputed parts.
        earlier: what ranks said before a doubt, if the step was not audited before.
        whole: whether all mini-batches of the parts were audited, and not the first one only.

    Attributes:
        step: the step.
        wrong: who was wrong, each with the part and the role; see `Dispute`.
        wrong_again: those of them that were wrong again when they computed the same part again.
    """

    def __init__(
        self,
        verdicts: Verdicts,
        step: int,
        rows: Sequence[Row],
        shifts: Sequence[int],
        disputed: Sequence[int],
        earlier: Sequence[Row],
        *,
        whole: bool,
    ) -> None:
        self.step = step
        self._verdicts = verdicts
        self._first = rows
        self._last = rows
        self._shifts = shifts
        self._whole = whole
        self._accepted = {k: rows[k].contributed for k in verdicts.in_sum if k not in disputed}
        self.wrong: dict[int, tuple[int, str]] = {
            k: (k, "owner")
            for k, row in enumerate(earlier)
            if k in self._accepted and not verdicts.agree(row.contributed, self._accepted[k])
        }
        self.wrong_again: set[int] = set()

    def settle(self, part: int, said: Mapping[int, Measured]) -> tuple[str | None, int | None]:
        """Settle the dispute about a part.

        Args:
            part: the part.
            said: the measures that all ranks have computed of it, by worker.

        Returns:
            Why it cannot be settled, or None; and the worker that sends its gradient to the owner, or None.
        """
        verdicts = self._verdicts
        agree, convicted, least = verdicts.agree, verdicts.convicted, verdicts.audit.adversaries + 1
        right = opinions.settle(said, agree, convicted=convicted, least=least)
        if right is None or not agree(self._accepted.setdefault(part, right), right):
            return verdicts.explain(self.step, f"{least} ranks do not agree on part {part}") + HINT, None
        for j, role in self._wrong_about(part, right):
            self.wrong.setdefault(j, (part, role))
        right_again = {j for j, measure in said.items() if agree(measure, right)}
        for j in said:
            if j not in right_again and j not in convicted:
                self._add_wrong(j, part, "auditor")
        if agree(self._last[part].contributed, right) and part not in convicted:
            return None, None
        helpers = sorted(right_again - convicted - self.wrong.keys())
        if not helpers:
            why = f"no rank without a fault has the gradient of part {part}"
            return verdicts.explain(self.step, why) + HINT, None
        return None, helpers[0]

    def compare(self, rows: Sequence[Row]) -> list[int]:
        """Compare what ranks say after another own pass with what is right; return the parts that are disputed now."""
        self._last = rows
        disputed = []
        for part, right in self._accepted.items():
            if not self._verdicts.agree(rows[part].contributed, right):
                disputed.append(part)
            if part not in self._verdicts.convicted and not self._verdicts.agree(rows[part].computed, right):
                self._add_wrong(part, part, "owner")
        return disputed

    def own_gradient_is_right(self, worker: int, convicted: frozenset[int]) -> bool | None:
        """Return whether a convicted worker has computed its own part right; None if that is not known."""
        row = self._first[worker]
        if worker in self._accepted:
            return self._verdicts.agree(row.computed, self._accepted[worker])
        # A part that is left out has no right measure but those of its auditors.
        others = opinions.opinions_of_others(self._first, self._shifts, worker)
        known = [measure for j, measure in others.items() if j not in convicted]
        return self._verdicts.agree(row.audited, known[0]) if known else None

    def _add_wrong(self, worker: int, part: int, role: str) -> None:
        """Add a wrong gradient of a pass that was made again."""
        if worker in self.wrong:
            self.wrong_again.add(worker)
        else:
            self.wrong[worker] = (part, role)

    def _wrong_about(self, part: int, right: Measured) -> Iterator[tuple[int, str]]:
        """Yield who was wrong about a part before the dispute, and as what."""
        verdicts, row = self._verdicts, self._first[part]
        owner_is_right = verdicts.agree(row.contributed, right)
        if not owner_is_right and part not in verdicts.convicted:
            yield part, "owner"
        # An audit of one mini-batch of several can only be compared with that of a right owner.
        if self._whole or owner_is_right:
            expected = right if self._whole else row.audited
            for j, measure in opinions.opinions_of_others(self._first, self._shifts, part).items():
                if j not in verdicts.convicted and not verdicts.agree(measure, expected):
                    yield j, "auditor"
