"""The ledger through kills, torn lines, full disks and folders that cannot be made."""

import json
import logging
import os
import resource
import shutil
import signal
from dataclasses import asdict

import pytest
import torch
from test_protect import Injector, same_everywhere, train

import draco_ext
from draco_ext import RepetitionCode
from draco_ext.reporting.ledger import Finding, Ledger
from draco_ext.testing.local import run_local

CODE = RepetitionCode(3, 1)


def finding(step):
    return Finding(1e9, step, 0, 1, 1, "host", 3, 2, 0.5, failed=False)


def steps(path):
    return [found.step for found in draco_ext.read_ledger(path)]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "folder" / "bad.jsonl"


def test_what_is_written_is_read(path):
    for _ in range(2):  # a run, and another
        Ledger(path).append(finding(7))
    assert draco_ext.read_ledger(path) == [finding(7)] * 2
    assert draco_ext.read_ledger(str(path)) == [finding(7)] * 2


@pytest.mark.parametrize("torn", [b'{"time": 1e9, "st', b"{", b'{"host": "\xc3', b"\0\0\0"])
def test_a_torn_line_stays_alone(path, torn, caplog):
    Ledger(path).append(finding(0))
    with path.open("ab") as file:
        file.write(torn)
    assert steps(path) == [0]
    ledger = Ledger(path)
    for step in (1, 2):
        ledger.append(finding(step))
    caplog.clear()
    assert steps(path) == [0, 1, 2]
    assert caplog.messages == [f"ledger {path}: line 2 was cut off, and is left out"]


def test_a_line_that_only_lacks_its_end_counts(path):
    path.parent.mkdir()
    path.write_text(json.dumps(asdict(finding(0))))
    Ledger(path).append(finding(1))
    assert steps(path) == [0, 1]


def test_iterates_and_takes_newer_versions(path):
    Ledger(path).append(finding(0))
    with path.open("a") as file:
        file.write(json.dumps({**asdict(finding(1)), "colour": [1, {"of": "a newer version"}]}) + "\n")
    found = draco_ext.iter_ledger(path)
    assert next(found) == finding(0)
    Ledger(path).append(finding(2))
    assert list(found) == [finding(1), finding(2)]  # nothing was read ahead to the end


def test_ledgers_of_all_ranks(path):
    for rank in (0, 2, 10):
        Ledger(path.with_name(f"bad-{rank}.jsonl")).append(finding(rank))
    Ledger(path.with_name("bad-x.jsonl")).append(finding(99))
    assert steps(path.with_name("bad-{rank}.jsonl")) == [0, 2, 10]
    with pytest.raises(FileNotFoundError, match=r"got .*worse-\{rank\}.jsonl, for which no rank"):
        draco_ext.read_ledger(path.with_name("worse-{rank}.jsonl"))


def test_a_removed_file_is_begun_anew(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    ledger = Ledger(path.relative_to(tmp_path))
    ledger.append(finding(0))
    monkeypatch.chdir("/")
    path.rename(path.with_suffix(".1"))
    ledger.append(finding(1))
    shutil.rmtree(path.parent)
    ledger.append(finding(2))
    ledger.append(finding(3))
    assert ledger.unwritten == 0
    assert steps(path) == [2, 3]


def test_one_open_file(path):
    ledger = Ledger(path)
    before = set(os.listdir("/proc/self/fd"))
    for step in range(5):
        ledger.append(finding(step))
    assert set(os.listdir("/proc/self/fd")) <= before
    del ledger
    assert len(os.listdir("/proc/self/fd")) < len(before)


def test_another_file_is_no_ledger(path):
    path.parent.mkdir()
    for line in ('{"step": 3}', "[3]", "3"):
        path.write_text(line + "\n")
        check_no_ledger(path)


def check_no_ledger(path):
    with pytest.raises(ValueError, match=r"path must be a ledger, got .* with line 1"):
        draco_ext.read_ledger(path)


def test_killed_at_any_time(path):
    """Nothing that was written before is lost, and the next run goes on behind it."""
    for run in range(8):
        before = steps(path) if run else []
        sees, tells = os.pipe()
        child = os.fork()
        if child == 0:
            ledger = Ledger(path)
            for step in range(len(before), 10**9):
                ledger.append(finding(step))
                os.write(tells, b".")
        os.close(tells)
        with open(sees, "rb", buffering=0) as pipe:
            written = sum(len(pipe.read(1)) for _ in range(1 + 20 * run))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            written += len(pipe.readall())
        after = steps(path)
        assert after == list(range(len(after)))
        assert len(before) + written <= len(after) <= len(before) + written + 1
    assert len(after) >= sum(1 + 20 * run for run in range(8))


def test_a_full_disk_is_said_once_and_counted(path, caplog):
    ledger = Ledger(path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    line = len(json.dumps(asdict(finding(0)))) + 1
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (line + line // 2, limits[1]))
        for step in range(4):  # the second one is cut off
            ledger.append(finding(step))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert ledger.unwritten == 3
    ledger.append(finding(4))
    [error] = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert str(path) in error.getMessage()
    assert "File too large" in error.getMessage()
    assert steps(path) == [0, 4]
    assert caplog.messages[-1] == f"ledger {path}: line 2 was cut off, and is left out"


# ----------------------------------------------------------------------------------------- on ranks


def _full(rank, report, folder):
    lines = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("draco_ext").addHandler(handler)
    findings = []
    results = []
    for ledger in (None, f"{folder}/full"):
        rows, guard, outcomes = train(
            rank,
            CODE,
            "allreduce",
            injector=Injector("reversed", (1,)),
            steps=3,
            ledger=ledger,
            callback=findings.append,
        )
        results.append(rows[0].tolist())
        report((same_everywhere(rows), outcomes, results[0] == results[-1], guard.report().unwritten, len(findings)))
        findings.clear()
    report(lines)


def test_training_goes_on_without_the_ledger(tmp_path):
    """The disk is full from the first line on."""
    (tmp_path / "full").symlink_to("/dev/full")
    without, full, lines = run_local(_full, 3, tmp_path)
    count = without[-1]
    assert count >= 3
    assert without == (True, [None] * 3, True, 0, count)
    assert full == (True, [None] * 3, True, count, count)
    assert lines == [
        f"ledger {tmp_path}/full cannot be written: No space left on device; training goes on, findings are counted"
    ]


def _impossible(rank, report, ledgers):
    for ledger in ledgers:
        try:
            train(rank, CODE, "allreduce", steps=1, ledger=ledger)
            said = None
        except ValueError as error:
            said = str(error)
        everybody = [None] * 3
        torch.distributed.all_gather_object(everybody, said)
        report(everybody)


def test_a_folder_that_cannot_be_made_is_named_on_all_ranks(tmp_path):
    (tmp_path / "file").touch()
    ledgers = [f"{tmp_path}/file/folder/{name}" for name in ("bad.jsonl", "{rank}.jsonl")]
    for ledger, everybody in zip(ledgers, run_local(_impossible, 3, ledgers), strict=True):
        path = ledger.replace("{rank}", "0")
        said = f"ledger must be a file that can be written, got on rank 0 '{path}: Not a directory'"
        assert everybody == [said] * 3
