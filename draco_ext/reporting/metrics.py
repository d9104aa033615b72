"""The metrics of a report: their names, kinds and meanings, in one place for all tools that show them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from draco_ext.reporting.report import AuditReport, Report


@dataclass(frozen=True)
class Metric:
    """A metric of a report.

    Attributes:
        name: its name, without a prefix.
        kind: "counter" if it only grows, else "gauge".
        meaning: what it counts.
        read: f(report) -> its value; None if the report has none.
        by_rank: whether its value is one for each rank of which there is something to tell.
    """

    name: str
    kind: str
    meaning: str
    read: Callable[[Report], float | Mapping[int, float] | None]
    by_rank: bool = False


def _of_audit(read: Callable[[AuditReport], float | None]) -> Callable[[Report], float | None]:
    return lambda report: None if report.audit is None else read(report.audit)


def _clean_up_to(audit: AuditReport) -> float | None:
    steps = [-1 if step is None else step for step in audit.last_clean_audit.values()]
    return min(steps, default=None)


def _counts(steps_of_ranks: Mapping[int, list[int]]) -> dict[int, float]:
    return {rank: len(steps) for rank, steps in steps_of_ranks.items()}


METRICS = (
    Metric("steps", "counter", "Steps, including failed ones.", lambda r: r.steps),
    Metric("failed_steps", "counter", "Steps without an update.", lambda r: len(r.failed_steps)),
    Metric(
        "undecided_steps",
        "counter",
        "Steps in which a part had no majority, with a second stage.",
        lambda r: len(r.undecided_steps) if r.bounded else None,
    ),
    Metric("suspects", "gauge", "Ranks whose messages were wrong.", lambda r: len(r.suspects)),
    Metric("probable_suspects", "gauge", "Ranks that probably send errors near the noise.", lambda r: len(r.probable)),
    Metric(
        "wrong_steps",
        "counter",
        "Steps in which a rank's messages were wrong.",
        lambda r: _counts({rank: suspect.steps for rank, suspect in r.suspects.items()}),
        by_rank=True,
    ),
    Metric(
        "wrong_messages",
        "counter",
        "A rank's wrong messages, one for each bucket.",
        lambda r: {rank: suspect.buckets for rank, suspect in r.suspects.items()},
        by_rank=True,
    ),
    Metric(
        "missing_steps",
        "counter",
        "Steps in which a rank's messages did not arrive in time.",
        lambda r: _counts(r.missing),
        by_rank=True,
    ),
    Metric(
        "repaired_steps",
        "counter",
        "Steps in which a rank's parameters, buffers or optimizer were replaced by the majority's.",
        lambda r: _counts(r.repaired),
        by_rank=True,
    ),
    Metric("unwritten_findings", "counter", "Findings that are not in this rank's ledger.", lambda r: r.unwritten),
    Metric("undelivered_findings", "counter", "Findings for which the callback failed.", lambda r: r.undelivered),
    Metric("encode_seconds", "counter", "Time of this rank for encoding.", lambda r: r.seconds.encode),
    Metric("communicate_seconds", "counter", "Time of this rank for waiting.", lambda r: r.seconds.communicate),
    Metric("decode_seconds", "counter", "Time of this rank for decoding.", lambda r: r.seconds.decode),
    Metric("audited_steps", "counter", "Steps that were audited.", _of_audit(lambda a: a.audited)),
    Metric("audit_triggers", "counter", "Reasons to audit further steps.", _of_audit(lambda a: len(a.triggers))),
    Metric("audit_disputes", "counter", "Wrong gradients that were put right.", _of_audit(lambda a: len(a.disputes))),
    Metric(
        "audit_persistent_disputes",
        "counter",
        "Those that were wrong again.",
        _of_audit(lambda a: sum(dispute.persistent for dispute in a.disputes)),
    ),
    Metric("convicted_ranks", "gauge", "Ranks that are convicted now.", _of_audit(lambda a: len(a.convicted))),
    Metric("audit_passes", "counter", "Passes of each rank; a plain step is 1.", _of_audit(lambda a: a.passes)),
    Metric(
        "audit_clean_step",
        "gauge",
        "The last step by which each rank's gradient was found right; -1 while one never was.",
        _of_audit(_clean_up_to),
    ),
)


def read_metrics(report: Report) -> Iterator[tuple[Metric, dict[int | None, float]]]:
    """Yield the metrics that a report has, each with its value by rank, or with one value under None."""
    for metric in METRICS:
        value = metric.read(report)
        if isinstance(value, Mapping):
            yield metric, {rank: float(value[rank]) for rank in sorted(value)}
        elif value is not None:
            yield metric, {None: float(value)}
