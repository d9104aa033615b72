"""Real processes: small trainings through attacks, and ranks that fail."""

import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from draco_ext.cli.commands import draco
from draco_ext.cli.training import Config, run
from draco_ext.cli.verdict import judge
from draco_ext.testing.local import run_local


def test_the_command_with_every_rule_side_by_side(tmp_path):
    arguments = ["train", "--output", str(tmp_path), "--workers=5", "--adversaries=1", "--attack=reversed"]
    arguments += ["--bad=random", "--steps=8", "--batch-size=40", "--seed=3"]
    done = CliRunner().invoke(draco, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "checks against theory hold" in done.output
    assert (tmp_path / "train.png").read_bytes().startswith(b"\x89PNG")

    figures = json.loads((tmp_path / "train.json").read_text())
    assert figures["config"]["bad"] == "random"
    assert torch.__version__.startswith(figures["versions"]["torch"])  # which may leave out what is behind a plus
    assert all(check["holds"] for check in figures["checks"])
    lines = {(t["rule"], t["attacked"]): t for t in figures["trainings"]}
    assert len(lines) == len(figures["trainings"]) == 10
    for line in lines.values():
        assert len(line["steps"]["loss"]) == len(line["steps"]["suspects"]) == 8
        assert [e["step"] for e in line["evaluations"]] == list(range(9))
        assert line["evaluations"][-1]["accuracy"] == line["accuracy"]
        assert line["failed_steps"] == []
        split = dict(line["seconds_per_step"])
        assert min(split.values()) >= 0
        assert split.pop("total") == pytest.approx(sum(split.values()))
        assert split["compute"] > 0
        assert split["communicate"] > 0
        assert (split["encode"] > 0) == (line["rule"] in ("repetition", "cyclic"))

    # All rules see the same batches: without adversaries they differ by rounding only.
    losses = [lines[rule, False]["steps"]["loss"] for rule in ("mean", "repetition", "cyclic", "audit")]
    for loss in losses:
        assert loss == pytest.approx(losses[0], rel=1e-3)
    work = {rule: lines[rule, True]["work_per_worker"] for rule in ("repetition", "cyclic", "krum")}
    assert work == {"repetition": 5, "cyclic": 3, "krum": 1}
    assert lines["mean", True]["steps"]["suspects"] == [None] * 8

    # The fault begins with the third step, and with this seed the first coin of the audit falls on the sixth.
    audit, (bad,) = lines["audit", True]["audit"], lines["audit", True]["steps"]["bad"][2]
    assert lines["audit", True]["steps"]["bad"] == [[], []] + [[bad]] * 6
    assert audit["first"] == 5
    assert audit["report"]["convicted"] == {str(bad): 5}
    assert audit["passes"] == [3, 2, 1, 1, 1, 5, 2, 2]
    assert lines["audit", False]["audit"]["passes"] == [3, 2, 1, 1, 1, 2, 1, 1]
    assert lines["audit", False]["named"] == {}
    assert lines["audit", True]["named"] == {str(bad): 1}
    assert lines["audit", True]["distance"] > 0.01  # three wrong updates

    bad = lines["cyclic", True]["steps"]["bad"]
    assert len({tuple(step) for step in bad}) > 1
    for rule in ("repetition", "cyclic"):
        assert lines[rule, False]["named"] == {}
        assert lines[rule, True]["steps"]["suspects"] == bad
        assert lines[rule, True]["distance_from"] == {"rule": rule, "attacked": False}
    digests = {lines["repetition", attacked]["parameters_sha256"] for attacked in (False, True)}
    assert len(digests) == 1
    assert lines["repetition", True]["distance"] == 0
    assert lines["cyclic", True]["distance"] < 1e-5


@pytest.mark.parametrize(
    ("transport", "attack", "bad", "workers", "adversaries"),
    [
        ("allreduce", "nan", "adjacent", 7, 2),
        ("verified", "bit-flip", "random", 6, 1),
        ("server", "little-is-enough", "fixed", 6, 1),
        pytest.param("allreduce", "small-bias", "random", 5, 2, marks=pytest.mark.long),
    ],
)
def test_codes_under_attack(transport, attack, bad, workers, adversaries):
    config = Config(
        rules=("repetition", "cyclic"),
        transport=transport,
        workers=workers,
        adversaries=adversaries,
        attack=attack,
        bad=bad,
        steps=5,
        batch_size=8 * workers,
        learning_rate=0.05,
        momentum=0.9,
        seed=1,
    )
    steps = []
    outcomes = run(config, steps.append)
    mean, clean_repetition, repetition, clean_cyclic, cyclic = outcomes
    assert steps == [o.training for o in outcomes for _ in range(5)]
    assert clean_repetition.named == clean_cyclic.named == {}
    for outcome in outcomes[1:]:
        assert not outcome.failed
        # Exactly those that sent something else, and all of the bad did.
        assert outcome.suspects == [tuple(sorted(changes)) for changes in outcome.changes]
        assert outcome.suspects == outcome.bad
    assert repetition.parameters.tobytes() == clean_repetition.parameters.tobytes()
    assert repetition.distance == 0
    assert max(o.distance for o in (clean_repetition, clean_cyclic, cyclic)) < 1e-5
    assert mean.distance is None
    assert all(check.holds for check in judge(config, outcomes, learns=False))


def test_momentum_at_the_workers_changes_averages_but_neither_codes_nor_the_mean():
    at_server = Config(
        rules=("mean", "geometric-median", "repetition", "cyclic"),
        transport="allreduce",
        workers=5,
        adversaries=1,
        attack="inner-product",
        bad="fixed",
        steps=4,
        batch_size=20,
        learning_rate=0.05,
        momentum=0.9,
        seed=2,
    )
    at_workers = replace(at_server, momentum=0.0, worker_momentum=0.9)
    both = [run(config, lambda training: None) for config in (at_server, at_workers)]
    for here, there in zip(*both, strict=True):
        assert here.training == there.training
        distance = np.linalg.norm(here.parameters - there.parameters) / np.linalg.norm(here.parameters)
        if here.training.rule == "geometric-median":
            assert distance > 1e-4
        elif here.training.rule == "repetition":  # one group, so that nothing is rounded
            assert distance == 0
        else:
            assert distance < 1e-5
    for config, outcomes in zip((at_server, at_workers), both, strict=True):
        assert all(check.holds for check in judge(config, outcomes, learns=False))


def test_an_audit_of_every_step_trains_the_parameters_of_the_run_without_faults():
    config = Config(
        rules=("audit",),
        transport="allreduce",
        workers=5,
        adversaries=1,
        attack="reversed",
        bad="fixed",
        steps=4,
        batch_size=20,
        learning_rate=0.05,
        momentum=0.9,
        seed=2,
        audit_rate=1.0,
    )
    outcomes = run(config, lambda training: None)
    _, clean, faulty = outcomes
    assert clean.audit.passes[1:] == [2] * 3
    assert faulty.audit.found == 2  # where it begins
    assert faulty.audit.report.convicted.keys() == set(faulty.bad[2])
    assert faulty.parameters.tobytes() == clean.parameters.tobytes()
    checks = judge(config, outcomes, learns=False)
    assert all(check.holds for check in checks)
    assert "Audit with a faulty worker: no update is wrong, so its distance from its clean run is 0" in [
        check.statement for check in checks
    ]


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.long)])
def test_a_port_that_is_taken_is_one_line(tmp_path, rank):
    """MASTER_PORT, by another program, and rank 0 cannot have it; and a rank 1 that finds nobody there."""
    command = "import datetime; from draco_ext.testing import local; local.SILENCE = datetime.timedelta(seconds=2);"
    command += "from draco_ext import cli; cli.main()"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        if rank == 0:
            taken.listen()
        port = str(taken.getsockname()[1])
        torchrun = {"RANK": str(rank), "WORLD_SIZE": "5", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        done = subprocess.run(
            [sys.executable, "-c", command, "train", "--adversaries=1"],
            cwd=tmp_path,
            env={**os.environ, **torchrun},
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    said = done.stderr.splitlines()[-1]  # torch's own warnings come before
    assert said.startswith(f"Error: rank {rank} cannot join the others: ")
    assert port in said


# ----------------------------------------------------------------------------------------- ranks


def count(rank, report, first):
    for number in range(first, first + 3):
        report((rank, number))


def fail(rank, report, how):
    report("started")
    if rank == 1:
        if how == "raise":
            raise ValueError("rank one has had enough")
        os.kill(os.getpid(), signal.SIGKILL)
    torch.distributed.recv(torch.zeros(1), src=1)


class TestRanks:
    def test_what_rank_0_reports_comes_in_order(self):
        assert list(run_local(count, 3, 5)) == [(0, 5), (0, 6), (0, 7)]

    @pytest.mark.parametrize("how", ["raise", "die"])
    def test_a_rank_that_fails_ends_the_job(self, how):
        reports = run_local(fail, 3, how)
        assert next(reports) == "started"
        with pytest.raises((ProcessRaisedException, ProcessExitedException)):
            list(reports)
