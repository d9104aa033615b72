"""The command line without its processes: arguments, plans, verdicts, who is bad."""

import dataclasses
import importlib.util
import json
import math

import numpy as np
import pytest
from click.testing import CliRunner

import draco_ext
from draco_ext import cli
from draco_ext.cli import commands, doctor
from draco_ext.cli.faults import BAD_CHOICES, Fault, bad_workers
from draco_ext.cli.planning import batches, cost, make_batch_table, make_table
from draco_ext.cli.training import Audited, Config, Outcome, Training, list_trainings
from draco_ext.cli.verdict import judge
from draco_ext.codes import CyclicCode, RepetitionCode
from draco_ext.reporting.report import AuditReport, Dispute

CONFIG = Config(
    rules=commands.DEFAULT_RULES,
    transport="allreduce",
    workers=9,
    adversaries=1,
    attack="reversed",
    bad="fixed",
    steps=4,
    batch_size=90,
    learning_rate=0.05,
    momentum=0.9,
    seed=0,
)


def invoke(*args):
    return CliRunner().invoke(commands.draco, args, terminal_width=200)


@pytest.fixture
def runs(monkeypatch):
    """Configs that would have been run; running returns what the test puts into `outcomes`."""

    class Runs(list):
        outcomes = ()

    runs = Runs()

    def run(config, on_step):
        runs.append(config)
        return list(runs.outcomes)

    monkeypatch.setattr(commands, "run", run)
    return runs


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ("train --workers 4 --adversaries 2", "n >= 2s+1 workers are needed: 5 --workers"),
        ("train --workers 0 --adversaries 0", "1 --workers for 0 --adversaries, got 0"),
        ("train --workers -3", "got -3"),
        ("train --adversaries -1", "--adversaries must be at least 0, got -1"),
        ("train --attack gossip", "'gossip' is not one of 'reversed', "),
        ("train --rule hearsay", "'hearsay' is not one of 'mean', "),
        ("train --bad everybody", "'everybody' is not one of 'fixed', 'random', 'adjacent'"),
        ("plan --workers 9 --adversaries 1 --parameters 1.5", "'1.5' is not a valid integer"),
        ("plan --workers 9 --adversaries 1 --parameters 15e-1", "'15e-1' is not a valid integer"),
        ("plan --workers 9 --adversaries 1 --parameters 1e999999999", "'1e999999999' is not a valid integer"),
        ("plan --workers 9 --adversaries 1 --parameters inf", "'inf' is not a valid integer"),
        ("plan --workers 9 --adversaries 1 --parameters 0e9", "0 is not in the range x>=1"),
        ("bench --parameters 1e2", "100 is not in the range x>=1000"),
        ("train --steps 0", "0 is not in the range x>=1"),
        (
            "train --batch-size 8",
            "--batch-size must be a multiple of 9, so that parts are even, and at most 1437, got 8",
        ),
        ("train --workers 1500 --adversaries 1", "--batch-size must be a multiple of 1500, so that"),
        ("train --transport pigeons", "'pigeons' is not one of 'allreduce', 'verified', 'server'"),
        ("train --batch-size 0", "0 is not in the range 1<=x<=1437"),
        ("train --batch-size 5000", "5000 is not in the range 1<=x<=1437"),
        ("train --learning-rate 0", "0.0 is not in the range 0<x<inf"),
        ("train --learning-rate inf", "inf is not in the range 0<x<inf"),
        ("train --learning-rate nan", "--learning-rate must be finite, got nan"),
        ("train --momentum 1", "1.0 is not in the range 0<=x<1"),
        ("train --momentum nan", "--momentum must be finite, got nan"),
        ("train --worker-momentum 1", "1.0 is not in the range 0<=x<1"),
        ("train --worker-momentum nan", "--worker-momentum must be finite, got nan"),
        ("train --worker-momentum 0.9 --momentum 0.5", "--worker-momentum takes the place of SGD's --momentum"),
        ("train --seed -1", "-1 is not in the range"),
        ("train --workers nine", "'nine' is not a valid integer"),
        ("train --rule krum --workers 4 --adversaries 1", "Krum needs n >= 2s+3: 5 --workers"),
        ("train --rule multi-krum --workers 4 --adversaries 1", "Krum needs n >= 2s+3"),
        ("train --rule audit --workers 2 --adversaries 0", "an audit needs n >= 3 --workers, got 2"),
        ("train --audit-rate 0", "0.0 is not in the range 0<x<=1"),
        ("train --audit-rate 1.5", "1.5 is not in the range 0<x<=1"),
        ("train --output /dev/null/folder", "--output /dev/null/folder: "),
        ("plan --workers 4 --adversaries 2 --parameters 10", "n >= 2s+1 workers are needed"),
        ("plan --workers 9 --adversaries -1 --parameters 10", "must be at least 0, got -1"),
        ("plan --workers 40000 --adversaries 1 --parameters 10", "got 40000"),
        ("plan --workers 9 --adversaries 1 --parameters 0", "0 is not in the range x>=1"),
        ("plan --workers 9 --adversaries 1", "plan needs --parameters for the costs, --batch-size"),
        ("plan --workers 9 --adversaries 1 --colluders 10", "--colluders must be at most the 9 workers, got 10"),
        ("plan --workers 9 --adversaries 1 --parameters 9 --samples 9", "--samples needs --batch-size"),
        ("plan --workers 9 --adversaries 1 --parameters 9 --learning-rate 9", "--learning-rate needs --batch-size"),
        ("plan --workers 9 --adversaries 1 --batch-size 9 --learning-rate nan", "--learning-rate must be finite, got"),
        ("plan --workers 9 --adversaries 1 --batch-size 0", "0 is not in the range x>=1"),
        ("plan --workers 9 --adversaries 0 --batch-size 9 --audit 1", "--audit: adversaries must be at least 1"),
        ("plan --workers 9 --adversaries 1 --parameters 9 --latency 20", "'20' is not a positive number with one of"),
        ("plan --workers 9 --adversaries 1 --parameters 9 --latency 0us", "'0us' is not a positive number with one of"),
        ("plan --workers 9 --adversaries 1 --parameters 9 --bandwidth 1e400GB/s", "is not a positive number"),
        ("plan --workers 9 --adversaries 1 --parameters 9 --memory 25us", "units GB/s, MB/s"),
        ("plan --workers 9 --adversaries 1 --parameters 9 --dtype int8", "'int8' is not one of"),
        ("plan --workers 9 --adversaries 1 --parameters 9 --audit 1.5", "1.5 is not in the range 0<x<=1"),
        ("plan --workers 9 --adversaries 1 --parameters 9 --audit nan", "--audit: rate must be above 0"),
        ("plan --workers 9 --adversaries 0 --parameters 9 --audit 1", "--audit: adversaries must be at least 1"),
    ],
)
def test_bad_arguments_get_one_line(runs, args, said):
    result = invoke(*args.split())
    assert result.exit_code == 2
    assert not runs
    *usage, error = result.output.strip().splitlines()
    assert error.startswith("Error: ")
    assert said in error
    assert len(usage) <= 3


@pytest.mark.parametrize(
    ("written", "elements"), [("1e6", "1,000,000"), ("2.5e3", "2,500"), ("25E6", "25,000,000"), ("1001", "1,001")]
)
def test_counts_may_have_an_exponent(written, elements):
    result = invoke("plan", "--workers=9e0", "--adversaries=1", f"--parameters={written}")
    assert result.exit_code == 0
    assert f"{elements} parameters" in result.output


def test_help_of_bench_keeps_its_lines():
    lines = [line.strip() for line in invoke("bench", "--help").output.splitlines()]
    assert "kernels     every kernel beside its yardstick" in lines
    assert not [line for line in lines if "\\b" in line or "\b" in line]


def test_version():
    assert invoke("--version").output == f"draco_ext {draco_ext.__version__}\n"


@pytest.mark.parametrize("reproducible", [True, False])
def test_doctor_as_json_is_what_an_issue_needs(monkeypatch, reproducible):
    facts = [doctor.Facts("here", "a processor", "avx2", "2.13.0", 1, "3.11")] * 2
    result = draco_ext.SelfTest(reproducible, None if reproducible else "0.weight", (1,))
    monkeypatch.setattr(doctor, "diagnose", lambda workers: doctor.Diagnosis(facts, result))
    run = invoke("doctor", "--json")
    assert run.exit_code == (0 if reproducible else 1)
    said = json.loads(run.output)
    assert said["draco_ext"] == draco_ext.__version__
    assert said["build"] == draco_ext.build_info()
    assert [rank["instruction_set"] for rank in said["ranks"]] == ["avx2", "avx2"]
    assert said["result"]["reproducible"] is reproducible
    assert said["result"]["text"] == str(result)


def test_default_leaves_krum_out_where_it_cannot_be_and_says_so(runs, tmp_path):
    result = invoke(*f"train --workers 7 --adversaries 3 --output {tmp_path}".split())
    assert result.exit_code == 0
    assert "Without Krum: Krum needs n >= 2s+3" in result.output
    assert runs[0].rules == ("mean", "geometric-median-gram", "repetition", "cyclic", "audit")


def test_default_leaves_the_audit_out_where_it_cannot_be_and_says_so(runs, tmp_path):
    result = invoke(*f"train --workers 2 --adversaries 0 --output {tmp_path}".split())
    assert result.exit_code == 0
    assert "Without Audit: an audit needs n >= 3 --workers, got 2" in result.output
    assert runs[0].rules == ("mean", "geometric-median-gram", "repetition", "cyclic")


def test_default_batch_has_even_parts_and_says_so(runs, tmp_path):
    result = invoke(*f"train --workers 7 --adversaries 1 --output {tmp_path}".split())
    assert result.exit_code == 0
    assert "With --batch-size 84: it must be a multiple of 14, so that parts are even" in result.output
    assert runs[0].batch_size == 84


def test_under_torchrun_its_ranks_are_the_workers_and_rank_0_speaks(runs, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "6")
    monkeypatch.setenv("RANK", "0")
    result = invoke("train", "--adversaries", "1", "--output", str(tmp_path))
    assert result.exit_code == 0
    assert (runs[0].workers, runs[0].batch_size) == (6, 90)
    assert "checks against theory hold" in result.output
    assert "--workers must be torchrun's 6 ranks, got 7" in invoke("train", "--workers", "7").output
    monkeypatch.setenv("RANK", "1")
    result = invoke("train", "--adversaries", "1", "--output", str(tmp_path))
    assert (result.exit_code, result.output) == (0, "")


def test_rules_are_run_in_the_order_asked_and_once(runs, tmp_path):
    args = "train --rule cyclic --rule trimmed-mean --rule cyclic --output"
    assert invoke(*args.split(), str(tmp_path)).exit_code == 0
    assert runs[0].rules == ("cyclic", "trimmed-mean")


def test_momentum_at_the_workers_takes_the_place_of_that_of_sgd(runs, tmp_path):
    result = invoke("train", "--worker-momentum", "0.9", "--output", str(tmp_path))
    assert result.exit_code == 0
    assert (runs[0].momentum, runs[0].worker_momentum) == (0.0, 0.9)
    # Ranks that recompute a part in an audit do not have the momentum of its owner.
    assert [runs[0].sgd_momentum(rule) for rule in ("krum", "cyclic", "audit")] == [0.0, 0.0, 0.9]
    assert commands._learns(dataclasses.replace(runs[0], steps=100))
    assert invoke("train", "--output", str(tmp_path)).exit_code == 0
    assert [runs[1].sgd_momentum(rule) for rule in ("krum", "cyclic", "audit")] == [0.9, 0.9, 0.9]


def test_lines_of_the_comparison():
    lines = [(t.rule, t.attacked) for t in list_trainings(CONFIG)]
    assert lines == [
        ("mean", False),
        ("mean", True),
        ("geometric-median-gram", True),
        ("krum", True),
        ("repetition", False),
        ("repetition", True),
        ("cyclic", False),
        ("cyclic", True),
        ("audit", False),
        ("audit", True),
    ]
    clean = dataclasses.replace(CONFIG, adversaries=0)
    assert [t.rule for t in list_trainings(clean)] == list(CONFIG.rules)
    assert not any(t.attacked for t in list_trainings(clean))


@pytest.mark.parametrize("missing", ["click", "matplotlib", "rich", "sklearn"])
def test_without_the_demo_extra_one_line_says_what_to_install(monkeypatch, missing):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find_spec(name))
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == (f'draco needs {missing}: install with pip install "draco_ext[demo]"')


# ------------------------------------------------------------------------------------------ plan


def test_cost_by_hand():
    # 9 workers in 3 groups of 3; or 9 parts, 3 for each worker. An odd 1001 is padded to 1002.
    repetition = cost(RepetitionCode(9, 1), 1001, "float32")
    assert repetition.compute == 3
    # Each shard is added up by three members, and its sum handed to two more in each group; plain, it would be 16.
    # Messages of at most 64 KiB go whole to all.
    assert repetition.sent == {"allreduce": (4 + 6) * 4004, "verified": 72 * 4004, "server": 16 * 4004}
    assert repetition.messages == 9 * 4004 + 4004
    assert repetition.amplification == 1
    cyclic = cost(CyclicCode(9, 1), 1001, "float32")
    assert cyclic.compute == 3
    assert cyclic.sent == {"allreduce": 16 * 4004, "verified": 72 * 4008, "server": 16 * 4008}
    assert cyclic.messages == 9 * 4008 + 4004
    # Weights 1/3, 1/3, 1/3; one condition on two unknowns: ||b||^2 / n = 1 + 1/2.
    assert cyclic.amplification == pytest.approx(math.sqrt(1.5 / 3))
    # 11 workers in 2 groups of 6 and 5: half the batch each, instead of an eleventh.
    assert cost(RepetitionCode(11, 2), 10, "float64").compute == 5.5
    assert cost(RepetitionCode(11, 2), 10, "bfloat16").sent["allreduce"] == 11 * 20
    # Nothing but digests where all compute the same; and a plain all-reduce where nobody does.
    assert cost(RepetitionCode(7, 3), 10, "float32").sent["allreduce"] == 0
    assert cost(RepetitionCode(7, 0), 10, "float32").sent["allreduce"] == 12 * 40


@pytest.mark.parametrize(("n", "s"), [(3, 1), (7, 2), (10, 3), (15, 7), (45, 5)])
def test_noise_amplification_against_its_definition(n, s):
    code = CyclicCode(n, s)
    x = np.exp(2j * np.pi * np.arange(n) / n)
    powers = x[:, None] ** np.arange(1, 2 * s + 1)
    worst = 0.0
    for first in range(n):
        left_out = (first + np.arange(s)) % n
        b = 1 - powers @ np.linalg.pinv(powers[left_out], rcond=1e-14) @ np.ones(s)
        assert abs(b[left_out]).max() < 1e-9
        worst = max(worst, np.linalg.norm(b))
    worst *= max(np.linalg.norm(row) for row in code.weights) / math.sqrt(n)
    assert code.noise_amplification() == pytest.approx(worst)
    assert worst < 2


def test_noise_of_a_code_that_corrects_nothing_is_that_of_the_average():
    assert CyclicCode(6, 0).noise_amplification() == pytest.approx(1)
    assert RepetitionCode(6, 0).noise_amplification() == 1


def test_plan_prints_it():
    result = invoke("plan", "--workers=9", "--adversaries=1", "--parameters=1001")
    assert result.exit_code == 0
    words = " ".join(result.output.replace("│", " ").split())
    for said in ("3x", "64,064 B", "40,040 B", "288,576 B", "64,128 B", "40,076 B", "0.707", "0 to 2"):
        assert said in words
    result = invoke("plan", "--workers=5", "--adversaries=2", "--parameters=6", "--dtype=float16")
    assert result.exit_code == 0
    assert "float16 messages" in result.output


def test_plan_of_the_batches_of_a_script():
    table = make_batch_table(9, 1, 32, learning_rate=0.1, samples=50000, audit_rate=0.008)
    names, *columns = [[column.header, *column.cells] for column in table.columns]
    plain, same_per_rank, same_global, cyclic, audit = zip(*(column[1:] for column in columns), strict=True)
    assert [column[0] for column in columns] == [
        *("a rank's samples in a step", "global batch", "steps in an epoch"),
        *("learning rate, SGD", "learning rate, Adam"),
    ]
    # 9 workers in 3 groups: a third of the global batch, 3 times the steps.
    assert plain == audit == ("32", "288", "174", "0.1", "0.1")
    assert same_per_rank == ("32", "96", "521", "0.03333", "0.05774")
    assert same_global == ("96", "288", "174", "0.1", "0.1")
    assert cyclic == ("3 x 32", "288", "174", "0.1", "0.1")
    assert names[-1] == "audit, rate 0.008"


def test_batches_that_do_not_divide_evenly():
    # 10 workers in 3 groups: 330 samples make 3 parts of 110.
    assert batches(10, 1, 33)["repetition, global batch kept"].global_batch == 330
    # 121 samples make 3 parts of 40, and one is left out.
    uneven = batches(11, 1, 11)["repetition, global batch kept"]
    assert (uneven.mini_batch, uneven.global_batch) == (40, 120)


def test_plan_prints_batches_and_costs():
    batch = ("--batch-size=32", "--samples=5e4")
    result = invoke("plan", "--workers=9", "--adversaries=1", *batch)
    assert result.exit_code == 0
    assert "174" in result.output
    assert "learning rate, SGD" not in " ".join(result.output.split())
    both = invoke("plan", "--workers=9", "--adversaries=1", *batch, "--parameters=1001")
    assert both.exit_code == 0
    assert "64,064 B" in both.output
    assert result.output in both.output


def test_plan_models_an_exchange_in_the_given_network():
    arguments = ("plan", "--workers=9", "--adversaries=1", "--parameters=1e6")
    times = []
    for network in (("--latency=1s",), ("--latency=1s", "--tree"), ("--latency=1ns", "--bandwidth=8Mbit/s")):
        result = invoke(*arguments, *network)
        assert result.exit_code == 0
        (row,) = (line for line in result.output.splitlines() if line.startswith("│ plain DDP"))
        times.append(float(row.split("│")[6].split()[0]) / 1e3)
    assert times == pytest.approx([32, 16, 2 * 8 / 9 * 4e6 / 1e6], rel=1e-2)  # two buckets; 16 rounds, or 8


def planned(*arguments):
    """The cells of `draco plan`'s table, by column and row."""
    names, *columns = (list(column.cells) for column in make_table(*arguments).columns)
    return [dict(zip(names, cells, strict=True)) for cells in columns]


def test_plan_of_an_audit_stands_beside_the_codes():
    repetition, cyclic, audit = planned(9, 2, 1000, "float32", 0.01)
    assert [repetition, cyclic] == planned(9, 2, 1000, "float32")
    assert audit["compute per worker"].startswith("1.022x ")  # two auditors, and two passes in a thousandth of steps
    plain = repetition["sent per step, plain data-parallel"]
    assert plain == "64 kB (64,000 B)" == audit["sent per step, plain data-parallel"]
    assert audit["sent per step, allreduce"].startswith(f"{plain}, ")
    assert audit["sent per step, server"] == audit["sent per step, verified"] == "not offered"
    # 99 is (1 - p) / p; 0.99^459 is the first power below 0.01.
    named = audit["wrong updates before a bad worker is named"]
    assert named.startswith(
        "0 if it is wrong in the first step; else 99 expected, at most 458 with a probability of 99%"
    )
    # The first two steps are audited, and the first one makes its own pass twice.
    assert audit["compute per worker"].endswith("; once 5 passes more in the first 2 steps, one less with FSDP2")
    assert repetition["wrong updates before a bad worker is named"] == "0"
    assert "every audited gradient is right" in audit["what holds"]
    assert audit["cannot survive"].startswith("a fault that occurs once: corrected with a probability of 1% only; ")
    assert "lie about what they communicate" in audit["cannot survive"]


def test_plan_of_short_messages_stands_beside_the_codes():
    repetition, cyclic, solon = planned(9, 2, 1000, "float32", None, 4)
    assert [repetition, cyclic] == planned(9, 2, 1000, "float32")
    assert solon["compute per worker"].startswith("8x ")
    # Eight workers send 250 elements each and get 1000.
    assert solon["sent per step, server"] == "40 kB (40,000 B)"
    assert solon["sent per step, allreduce"] == solon["sent per step, verified"] == "not offered"
    assert solon["all messages and the result"] == "13 kB (13,000 B)"
    assert solon["noise amplification"].startswith("1.52 ")


def test_plan_takes_a_compression():
    arguments = ("plan", "--workers=9", "--adversaries=2", "--parameters=1e6")
    assert "Solon" not in invoke(*arguments).output
    result = invoke(*arguments, "--compression=4")
    assert result.exit_code == 0
    costs, exchange = result.output.split("A step's exchange")
    assert "Solon" in costs
    assert "Solon" in exchange
    refused = invoke(*arguments, "--compression=6")
    assert refused.exit_code == 2
    assert "--compression must be at most workers - 2 * adversaries = 5, got 6" in refused.output


def test_plan_of_an_audit_of_every_step():
    audit = planned(9, 2, 1000, "float32", 1.0)[2]
    assert audit["compute per worker"].startswith("3.002x ")
    assert audit["wrong updates before a bad worker is named"] == "0"
    assert "every gradient is right" in audit["what holds"]
    assert audit["cannot survive"].startswith("more than 2 bad workers in a step; ")


def test_plan_takes_the_rate_of_an_audit():
    arguments = ("plan", "--workers=9", "--adversaries=1", "--parameters=1001")
    assert "audit" not in invoke(*arguments).output
    result = invoke(*arguments, "--audit=0.008")
    assert result.exit_code == 0
    words = " ".join(result.output.replace("│", " ").replace("┃", " ").split())
    assert "audit, rate 0.008" in words
    assert "1.01x" in words
    assert "0.707" in words


# --------------------------------------------------------------------------------------- verdict


def outcome(rule, attacked, **changes):
    """What a perfect training of four steps under attack by worker 3 looks like."""
    code = rule in ("repetition", "cyclic")
    bad = (3,) if attacked else ()
    perfect = Outcome(
        training=Training(rule, attacked),
        parts=9,
        compute_factor=1,
        message_bytes=40,
        parameters=np.ones(10, np.float32),
        losses=[1.0] * 4,
        seconds={kind: [0.1] * 4 for kind in ("compute", "encode", "communicate", "decode")},
        suspects=[bad if code else None] * 4,
        failed=[],
        bad=[bad] * 4,
        changes=[dict.fromkeys(bad, 101.0)] * 4,
        evaluations=[(0, 0.1, 2.3), (4, 0.97 if code or not attacked else 0.1, 0.2)],
        distance=None if not attacked else 0.0 if code else 5.0,
    )
    return dataclasses.replace(perfect, **changes)


def audited(found=1, *, first=1, worker=3, steps=6):
    """What an audit has done that found a fault, or None, in a step, where the first coin fell on another.

    Steps are counted from the one in which the fault begins.
    """
    found, first = (None if step is None else Fault.BEGIN + step for step in (found, first))
    disputes = [] if found is None else [Dispute(found, worker, worker, "owner", persistent=True)]
    report = AuditReport(disputes=disputes, convicted={d.rank: d.step for d in disputes})
    passes = [1.0 if found is None or step < found else 5.0 if step == found else 2.0 for step in range(steps)]
    return Audited(rate=CONFIG.audit_rate, first=first, passes=passes, report=report)


def audit_outcome(attacked, **changes):
    """The outcome of a perfect audit, or of another."""
    suspects = [(), (), (), (3,), (), ()] if attacked else [()] * 6
    perfect = {"audit": audited() if attacked else audited(None), "suspects": suspects, "distance": 0.4}
    evaluations = [(0, 0.1, 2.3), (4, 0.97, 0.2)]
    return outcome("audit", attacked, **{**perfect, "evaluations": evaluations, **changes})


PERFECT = [outcome(rule, attacked) for rule in ("mean", "repetition", "cyclic") for attacked in (0, 1)]
PERFECT += [audit_outcome(attacked) for attacked in (0, 1)]


def wrong(*changed, learns=True):
    """The statements that do not hold where some outcomes are not the perfect ones."""
    lines = {o.training: o for o in (*PERFECT, *changed)}
    checks = judge(CONFIG, list(lines.values()), learns=learns)
    return [check.statement for check in checks if not check.holds]


def test_perfect_outcomes_are_what_theory_says():
    assert wrong() == []
    statements = [check.statement for check in judge(CONFIG, PERFECT, learns=True)]
    assert "plain averaging is ruined by the attack" in statements
    assert "repetition code under attack: distance from its clean run is 0" in statements
    convicted = "Audit with a faulty worker: convicts worker 3 and no other, in the first audited step at the latest"
    assert convicted in statements
    assert "Audit with a faulty worker: learns after 1 wrong updates: accuracy of at least 93%" in statements


@pytest.mark.parametrize(
    ("rule", "attacked", "changes", "said"),
    [
        ("repetition", True, {"distance": 1e-12}, "distance from its clean run is 0"),
        ("cyclic", True, {"distance": 1e-3}, "distance from its clean run is at most 0.0001"),
        ("cyclic", True, {"distance": math.nan}, "distance from its clean run is at most 0.0001"),
        ("cyclic", True, {"failed": [2]}, "every step decodes"),
        ("repetition", False, {"suspects": [(), (), (), (1,)]}, "names nobody"),
        ("repetition", True, {"suspects": [(3,), (3,), (), (3,)]}, "names exactly the workers"),
        ("cyclic", True, {"suspects": [(3, 4), (3,), (3,), (3,)]}, "names exactly the workers"),
        # One changed bit is a wrong message to a vote.
        ("repetition", True, {"suspects": [()] * 4, "changes": [{3: 1e-9}] * 4}, "names exactly"),
        ("cyclic", False, {"evaluations": [(4, 0.5, 1.0)]}, "accuracy of at least"),
        ("mean", True, {"evaluations": [(4, 0.96, 0.2)]}, "plain averaging is ruined"),
    ],
)
def test_what_theory_does_not_say_is_noticed(rule, attacked, changes, said):
    (statement,) = wrong(outcome(rule, attacked, **changes))
    assert said in statement


@pytest.mark.parametrize(
    ("attacked", "changes", "said"),
    [
        (False, {"failed": [2]}, "no step fails"),
        (True, {"failed": [2]}, "no step fails"),
        (False, {"suspects": [(), (1,), (), ()]}, "names nobody"),
        (False, {"evaluations": [(4, 0.5, 1.0)]}, "accuracy of at least"),
        (True, {"evaluations": [(4, 0.5, 1.0)]}, "learns after 1 wrong updates"),
        (True, {"audit": audited(2)}, "in the first audited step at the latest"),
        (True, {"audit": audited(None)}, "in the first audited step at the latest"),
        (True, {"audit": audited(worker=4)}, "convicts worker 3 and no other"),
        (True, {"suspects": [(), (3, 4), (), ()]}, "convicts worker 3 and no other"),
        (True, {"audit": audited(0, first=0)}, "no update is wrong, so its distance from its clean run is 0"),
    ],
)
def test_what_an_audit_does_not_promise_is_noticed(attacked, changes, said):
    (statement,) = wrong(audit_outcome(attacked, **changes))
    assert said in statement


def test_an_audit_that_lets_more_pass_than_chance_explains_is_noticed():
    often = dataclasses.replace(CONFIG, audit_rate=0.99)  # more than 3 wrong updates have a chance of 1e-8
    lines = {o.training: o for o in (*PERFECT, audit_outcome(True, audit=audited(None, first=None)))}
    checks = judge(often, list(lines.values()), learns=False)
    assert ["at most 2 wrong updates" in check.statement for check in checks if not check.holds] == [True]


@pytest.mark.parametrize(
    "changes",
    [
        {"audit": audited(1, first=3)},  # a trigger may find it before
        {"audit": audited(None, first=None), "suspects": [()] * 6},  # no coin fell
        {"audit": audited(0, first=0), "distance": 0.0},
    ],
)
def test_an_audit_may_find_a_fault_sooner_or_not_at_all(changes):
    assert not wrong(audit_outcome(True, **changes))


def test_the_table_shows_the_work_of_an_audit_before_and_after_a_fault(runs, tmp_path):
    runs.outcomes = PERFECT
    rows = [line.split() for line in invoke("train", "--output", str(tmp_path)).output.splitlines()]
    assert [row[2:4] for row in rows if row[:2] == ["Audit", "1"]] == [["97.0%", "3"], ["1x,", "2x"]]


def test_cyclic_code_need_not_name_what_rounding_hides():
    assert not wrong(outcome("cyclic", True, suspects=[()] * 4, changes=[{3: 1e-8}] * 4))
    assert not wrong(outcome("cyclic", True, suspects=[(3,)] * 4, changes=[{3: 1e-8}] * 4))


def test_unknown_settings_need_not_learn():
    assert not wrong(outcome("mean", False, evaluations=[(4, 0.2, 2.0)]), learns=False)


def test_rounding_may_grow_as_far_as_it_does_between_clean_runs():
    noisy = outcome("cyclic", False, distance=0.01)
    assert not wrong(noisy, outcome("cyclic", True, distance=0.05))
    assert wrong(noisy, outcome("cyclic", True, distance=0.2))


def test_training_that_diverges_by_itself_says_nothing_about_a_code():
    nothing = np.full(10, np.nan, np.float32)
    clean = outcome("cyclic", False, parameters=nothing)
    statements = wrong(clean, outcome("cyclic", True, distance=math.nan, suspects=[()] * 4))
    assert statements == ["cyclic code without adversaries does not diverge"]


def test_exit_code_tells_when_a_line_is_not_what_theory_says(runs, tmp_path):
    args = ["train", "--output", str(tmp_path)]
    runs.outcomes = PERFECT
    result = invoke(*args)
    assert result.exit_code == 0
    assert "checks against theory hold" in result.output
    runs.outcomes = [*PERFECT[:-1], outcome("cyclic", True, distance=0.1)]
    result = invoke(*args)
    assert result.exit_code == 1
    said = " ".join(result.output.split())
    assert "Not what theory says: cyclic code under attack: distance" in said
    assert "Found: 0.1." in said
    assert (tmp_path / "train.json").exists()


@pytest.mark.parametrize("file", ["train.json", "train.png"])
def test_a_full_disk_is_one_line(runs, tmp_path, file):
    (tmp_path / file).symlink_to("/dev/full")
    runs.outcomes = PERFECT
    result = invoke("train", "--output", str(tmp_path))
    assert result.exit_code == 1
    assert result.output.splitlines()[-1] == f"Error: cannot write to --output {tmp_path}: No space left on device"
    assert "plain averaging" in result.output  # the figures are not lost


# ----------------------------------------------------------------------- who is bad, and batches


@pytest.mark.parametrize("choice", BAD_CHOICES)
def test_bad_workers(choice):
    steps = [bad_workers(choice, 9, 3, step, seed=5) for step in range(40)]
    assert steps == [bad_workers(choice, 9, 3, step, seed=5) for step in range(40)]
    for bad in steps:
        assert len(set(bad)) == 3
        assert set(bad) <= set(range(9))
        assert list(bad) == sorted(bad)
    assert (len(set(steps)) > 20) == (choice == "random")
    assert bad_workers(choice, 9, 0, 0, seed=5) == ()
    if choice == "adjacent":
        windows = [{(first + i) % 9 for i in range(3)} for first in range(9)]
        assert all(set(bad_workers(choice, 9, 3, 0, seed)) in windows for seed in range(20))
        assert len({bad_workers(choice, 9, 3, 0, seed) for seed in range(40)}) == 9
