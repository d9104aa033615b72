"""`draco bench`: small runs of its suites, and what it does when a peer fails."""

import io
import json
import math

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console

from draco_ext import CyclicCode, baselines, decode
from draco_ext.cli.bench import neighbours, peers, report, suites, timing, workloads
from draco_ext.cli.commands import draco


class FakeClock:
    """Every call takes what it returns."""

    def __call__(self, call):
        return call()


def test_compare_takes_medians_of_neighbours_and_leaves_out_the_first():
    calls, yardsticks = iter([100.0, 2.0, 4.0, 6.0]), iter([9.0, 1.0, 1.0, 1.0, 3.0, 1.0])
    found = timing.compare(FakeClock(), lambda: next(calls), lambda: next(yardsticks), rounds=3)
    assert found == timing.Timing(seconds=4.0, ratio=2.0, rounds=3)


def test_a_slow_call_is_made_once():
    found = timing.compare(FakeClock(), lambda: 5.0, lambda: 2.0, rounds=7, patience=0.0)
    assert found == timing.Timing(seconds=5.0, ratio=2.5, rounds=1)


@pytest.mark.parametrize("d", [1000, 40_000])
def test_same_messages_are_honest_ones_of_every_code(d):
    messages = suites.same_messages(9, d)
    for s in (0, 1, 4):
        out = decode(messages, CyclicCode(9, s))
        assert not out.failed
        assert not out.suspects.any()
        torch.testing.assert_close(out.gradient, messages[0])


def test_decode_suite(tmp_path):
    arguments = ["bench", "--workers", "9", "--parameters", "2000", "--no-peers", "--output", str(tmp_path)]
    run = CliRunner().invoke(draco, arguments, catch_exceptions=False)
    assert run.exit_code == 0, run.output
    rows = {row["rule"]: row for row in json.loads((tmp_path / "decode.json").read_text())["rows"]}
    assert set(baselines.AGGREGATORS) < set(rows)
    for name in ("vote s=1", "vote s=1, 3 reversed", "cyclic s=1, 1 reversed", "cyclic s=1, 1 reversed, expected"):
        assert rows[name]["own"]
        assert rows[name]["error"] < 1e-6
        assert rows[name]["seconds"] > 0
        assert rows[name]["to_yardstick"] > 0
    assert not rows["vote s=1 in plain torch"]["own"]
    assert rows["mean"]["error"] > 1
    assert (tmp_path / "decode.png").stat().st_size > 10_000
    assert "| vote s=1 " in (tmp_path / "decode.md").read_text()
    assert "| vote s=1 " in run.output
    assert "date: " in run.output


def fails(messages, adversaries):
    return torch.empty(2**60)


@pytest.mark.parametrize(
    ("library", "call", "note"),
    [
        ("no-such-library", fails, "no-such-library is not installed"),
        ("torch", fails, "failed: "),
        ("torch", lambda messages, s: baselines.mean(messages) * math.nan, ""),
    ],
)
def test_a_peer_that_cannot_run_is_reported(monkeypatch, tmp_path, library, call, note):
    peer = peers.Peer("peer", library, call, lambda messages, s: baselines.mean(messages))
    monkeypatch.setattr(peers, "PEERS", (peer,))
    rows = [row for job in suites.decode("cpu", 5, 1000, True) if job.label == "peer" for row in job.run()]
    assert len(rows) == 1
    assert rows[0].note.startswith(note)
    assert (rows[0].seconds is None) == bool(note)
    table = report.table(rows)
    assert "peer" in table[2]
    assert ("nan" in table[2]) == (not note)
    assert report.write(tmp_path, rows)
    assert json.loads((tmp_path / "decode.json").read_text())["rows"][0]["error"] is None


def test_memory_limit_makes_an_exception_of_what_would_kill():
    more = int(1.2 * timing.available_memory())
    with timing.memory_limit(), pytest.raises((RuntimeError, MemoryError)):
        torch.empty(more, dtype=torch.uint8)
    torch.empty(2**20)


def test_kernel_suite_and_its_short_calls(monkeypatch):
    monkeypatch.setattr(suites, "KERNEL_ROUNDS", 3)
    rows = [row for job in suites.kernels(4096) for row in job.run()]
    assert all(row.seconds > 0 and row.to_yardstick > 0 for row in rows)
    calls = [row for row in rows if row.rule.startswith("call of decode")]
    assert len(calls) == 4
    assert all(row.seconds < 0.1 for row in calls)


def test_scaling_suite_stays_within_its_memory(tmp_path):
    rows = [row for job in suites.scaling(4 * 15 * 10**5) for row in job.run()]
    assert {(row.n, row.d) for row in rows} == {(7, 10**5), (15, 10**5)}
    assert all(0 < row.split["locator"] < 1 for row in rows if row.rule.startswith("cyclic"))
    assert (tmp_path / "scaling.png") in report.write(tmp_path, rows)


def test_paper_suite_adds_buckets_up(monkeypatch):
    monkeypatch.setattr(suites, "BUCKET", 600)
    monkeypatch.setattr(suites, "PAPER_MODELS", {"small": 250, "large": 1250})
    seen = []
    calls = suites._paper_calls

    def record(device, attack, s, width):
        seen.append(width)
        return calls(device, attack, s, width)

    monkeypatch.setattr(suites, "_paper_calls", record)
    rows = next(iter(suites.paper("cpu"))).run()
    assert seen == [250, 600]
    assert [row.d for row in rows] == [250, 1250]
    assert rows[0].rule == "small, reversed, s = 1"
    split = rows[1].split
    cyclic = split["cyclic encode"] + split["cyclic decode"]
    assert split["median/cyclic"] == pytest.approx(split["median"] / cyclic)
    assert split["median/repetition"] == pytest.approx(split["median"] / split["repetition"])
    assert "median/repetition" in report.table(rows)[0]


def test_votes_are_attacked_in_every_group():
    rule = next(rule for rule in workloads.votes(11) if rule.own and rule.reversed)
    assert rule.reversed == (0, 4, 8)
    messages = workloads.workload("cpu", 11, 64, rule.code, 1).build()
    honest = messages.clone()
    with workloads.reversed_workers(messages, rule.reversed):
        out = decode(messages, rule.code(11, 1))
        assert (messages != honest).any(1).sum() == 3
    assert torch.equal(messages, honest)
    assert not out.failed
    with workloads.reversed_workers(messages, (2, 5), late=True):
        assert (messages != honest).nonzero().tolist() == [[2, 63], [5, 63]]
    assert torch.equal(messages, honest)


def test_accuracy_rows_tell_when_the_target_was_reached():
    class Training:
        label, attacked = "a rule", True

    class Outcome:
        training, compute_factor, accuracy = Training, 3.0, 0.96
        parameters = torch.zeros(7).numpy()
        evaluations = ((0, 0.99, 0.0), (5, 0.94, 0.0), (10, 0.95, 0.0), (15, 0.96, 0.0))
        seconds = {kind: [0.25] * 15 for kind in ("compute", "encode", "communicate", "decode")}  # noqa: RUF012

        def __init__(self):
            self.parameters = torch.zeros(7)

    outcome = Outcome()
    outcome.parameters = torch.zeros(7).numpy()
    config = suites.replace(suites.ACCURACY, steps=15)
    row = suites._accuracy_row(config, outcome)
    assert row.split["steps to 95%"] == 10
    assert row.split["seconds to 95%"] == pytest.approx(10.0)
    outcome.evaluations = outcome.evaluations[:2]
    assert suites._accuracy_row(config, outcome).split["steps to 95%"] is None
    assert "never" in report.table([suites._accuracy_row(config, outcome)])[2]


def test_folder_that_cannot_be_made_is_named_at_once(tmp_path):
    (tmp_path / "file").touch()
    run = CliRunner().invoke(draco, ["bench", "--output", str(tmp_path / "file" / "folder")])
    assert run.exit_code == 2
    assert "--output" in run.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_is_asked_for_where_there_is_none():
    run = CliRunner().invoke(draco, ["bench", "--device", "cuda"])
    assert run.exit_code == 2
    assert "needs a CUDA device" in run.output


@pytest.fixture(scope="module")
def small():
    """Every method under every attack, for a few steps."""
    settings = neighbours.Settings(workers=9, adversaries=1, samples=3, steps=3, begin=1)
    return {row.rule: row for method in neighbours.NEIGHBOURS for row in neighbours.run(method, settings, (0,))}


def test_neighbours_count_bytes_and_work(small):
    model = small["mean"].d * 4
    for name in ("mean", "geometric median", "Krum, worker momentum", "averaging of models", "PDMM"):
        assert (small[name].bytes, small[name].to_yardstick) == (model, 1.0)
    assert small["each agent alone"].bytes == 0
    assert small["weights by accumulated loss"].bytes == 8 * model
    assert small["weights by accumulated loss"].to_yardstick == pytest.approx(1 + 9 / 3)
    assert small["repetition code"].to_yardstick == pytest.approx(3.0)
    assert small["cyclic code"].to_yardstick == pytest.approx(3.0)
    assert model < small["Audit"].bytes < 2 * model


def test_neighbours_of_codes_are_exact(small):
    """A worker with flipped labels sends a wrong message, which the others with its part correct."""
    for name in ("repetition code", "repetition code, worker momentum", "cyclic code"):
        accuracies = report.accuracies(small[name])
        assert list(accuracies) == list(neighbours.ATTACKED_BY)
        assert len(set(accuracies.values())) == 1
    momentum = report.accuracies(small["repetition code, worker momentum"])
    assert momentum == report.accuracies(small["repetition code"])


@pytest.mark.parametrize("attack", [name for name in neighbours.ATTACKED_BY if name != neighbours.NONE])
def test_simulated_codes_have_the_bits_of_the_run_without_attack(attack):
    settings = neighbours.Settings(steps=4, begin=2)
    method = {method.name: method for method in neighbours.NEIGHBOURS}["repetition code"]
    _, clean = neighbours.train(method, settings, neighbours.NONE, 1)
    _, attacked = neighbours.train(method, settings, attack, 1)
    assert torch.equal(clean.models(), attacked.models())
    _, ruined = neighbours.train(neighbours.NEIGHBOURS[0], settings, attack, 1)
    assert not torch.equal(clean.models(), ruined.models())


def test_simulated_audit_puts_right_what_it_audits_and_does_not_see_flipped_labels():
    every = neighbours.Settings(steps=6, begin=3, rate=1.0)
    audit = {method.name: method for method in neighbours.NEIGHBOURS}["Audit"]
    _, clean = neighbours.train(audit, every, neighbours.NONE, 0)
    _, attacked = neighbours.train(audit, every, "sign flips", 0)
    assert torch.equal(clean.models(), attacked.models())
    assert attacked.wrong_updates == 0
    assert attacked.work > clean.work == 6 * (1 + every.adversaries)
    _, poisoned = neighbours.train(audit, every, neighbours.LABEL_FLIPS, 0)
    assert not torch.equal(clean.models(), poisoned.models())
    assert poisoned.work == clean.work
    seldom = neighbours.Settings(steps=6, begin=3, rate=1e-9)
    _, wrong = neighbours.train(audit, seldom, "sign flips", 0)
    assert wrong.wrong_updates == 3


def test_neighbours_are_shown_with_their_guarantees(small, tmp_path):
    rows = list(small.values())
    files = report.write(tmp_path, rows)
    assert [file.suffix for file in files] == [".json", ".md", ".png"]
    assert (tmp_path / "neighbours.png").stat().st_size > 10_000
    assert len(json.loads((tmp_path / "neighbours.json").read_text())["rows"]) == len(neighbours.NEIGHBOURS)
    text = io.StringIO()
    Console(file=text, width=120).print(report.wrapped_table(rows))
    for row in rows:
        assert row.rule in text.getvalue()
    assert "one bad worker moves it" in text.getvalue()
    assert "one bad worker moves it" in (tmp_path / "neighbours.md").read_text()


def test_options_of_neighbours_reach_the_trainings(monkeypatch, tmp_path):
    seen = []

    def record(method, settings, seeds):
        seen.append((method.name, settings, seeds))
        accuracies = {attack: 0.5 for attack in neighbours.ATTACKED_BY}
        return [report.Row("neighbours", 15, 7, method.name, 0.0, 1.0, 4, split=accuracies, note="nothing")]

    monkeypatch.setattr(neighbours, "run", record)
    arguments = ["bench", "neighbours", "--quick", "--seed", "4", "--seed", "5", "--output", str(tmp_path)]
    run = CliRunner().invoke(draco, arguments, catch_exceptions=False)
    assert run.exit_code == 0, run.output
    assert seen == [(method.name, neighbours.QUICK, (4, 5)) for method in neighbours.NEIGHBOURS]
