"""The metrics of a report, and the page that lists them."""

import dataclasses
import re
from pathlib import Path

from draco_ext import AuditReport, Dispute, Report, Suspect, Trigger
from draco_ext.reporting.metrics import METRICS
from draco_ext.reporting.report import Seconds

PAGE = Path(__file__).resolve().parents[2] / "docs/howto/metrics.md"


def a_report(**fields):
    suspects = {3: Suspect(1, 3, "alpha", steps=[4, 5], buckets=7)}
    report = Report(
        "nobody", 10, suspects, (6,), {0: [1, 2, 3]}, {2: [8]}, {5: 0.7}, 1, 2, Seconds(encode=1.5, decode=0.5)
    )
    return dataclasses.replace(report, **fields)


def test_of_a_code():
    assert a_report().metrics() == {
        "draco/steps": 10,
        "draco/failed_steps": 1,
        "draco/suspects": 1,
        "draco/probable_suspects": 1,
        "draco/wrong_steps/rank3": 2,
        "draco/wrong_messages/rank3": 7,
        "draco/missing_steps/rank0": 3,
        "draco/repaired_steps/rank2": 1,
        "draco/unwritten_findings": 1,
        "draco/undelivered_findings": 2,
        "draco/encode_seconds": 1.5,
        "draco/communicate_seconds": 0.0,
        "draco/decode_seconds": 0.5,
    }
    assert all(type(value) is float for value in a_report().metrics().values())


def test_of_an_audit():
    disputes = [Dispute(4, 3, 3, "owner", True), Dispute(5, 2, 1, "auditor", False)]
    audit = AuditReport(4, [Trigger(7, 0, "x")], disputes, {3: 4}, {}, {0: 9, 1: 8, 3: None}, 10.5)
    metrics = a_report(audit=audit).metrics(prefix="")
    assert (
        metrics.items()
        >= {
            "steps": 10,
            "audited_steps": 4,
            "audit_triggers": 1,
            "audit_disputes": 2,
            "audit_persistent_disputes": 1,
            "convicted_ranks": 1,
            "audit_passes": 10.5,
            "audit_clean_step": -1,
        }.items()
    )
    audit.last_clean_audit[3] = 7
    assert a_report(audit=audit).metrics()["draco/audit_clean_step"] == 7


def test_a_snapshot_does_not_change():
    audit = AuditReport(acquitted={1: [2]})
    copy = audit.snapshot()
    assert copy == audit
    audit.acquitted[1].append(3)
    audit.convicted[0] = 1
    audit.triggers.append(Trigger(7, 0, "x"))
    assert copy == AuditReport(acquitted={1: [2]})


def test_the_page_lists_them_all():
    rows = re.findall(r"^\| `draco/(\S+)` \| `draco_(\w+)` \| (\w+) \| (.*) \|$", PAGE.read_text(), re.MULTILINE)
    assert rows == [
        (
            metric.name + "/rank<r>" * metric.by_rank,
            metric.name + "_total" * (metric.kind == "counter"),
            metric.kind,
            metric.meaning,
        )
        for metric in METRICS
    ]
