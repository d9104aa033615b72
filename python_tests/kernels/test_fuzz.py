"""Short runs of tools/fuzz.py, and that it notices what it is there to notice."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FUZZ = Path(__file__).resolve().parents[2] / "tools" / "fuzz.py"


def fuzz(*arguments):
    run = subprocess.run(
        [sys.executable, FUZZ, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "2"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )
    return run.returncode, run.stdout


def test_every_call_is_answered(long):
    calls = 5000 if long else 1500
    status, output = fuzz("--calls", calls)
    assert status == 0, output
    outcomes = dict(re.findall(r"(\w+) (\d+)(?:, |$)", output.splitlines()[-1]))
    assert sum(map(int, outcomes.values())) == calls
    for outcome in ("result", "TypeError", "ValueError"):
        assert int(outcomes[outcome]) > calls / 10, outcomes


@pytest.mark.long
def test_nothing_leaks():
    status, output = fuzz("--leaks", "--calls", 6000)
    assert status == 0, output


def test_wrong_answers_are_told():
    targets = [f"--target=planted_{name}" for name in ("undocumented", "unnamed", "change")]
    status, output = fuzz("--calls", 40, *targets)
    assert status == 1
    for message in (
        r"planted_undocumented\(number=7\) raised KeyError: 7",
        r"planted_unnamed\(number=7\) raised a ValueError that names no argument: it is wrong",
        r"planted_change\(.*\) changed messages \(result\)",
    ):
        assert re.search(rf"BUG call \d+: {message}", output), output


@pytest.mark.long
def test_the_number_of_a_call_is_enough_to_see_it_again():
    _, output = fuzz("--calls", 40, "--target=planted_change")
    number = re.search(r"BUG call (\d+): planted_change\(.*\) changed messages", output)
    status, output = fuzz("--only", number[1], "--target=planted_change")
    assert status == 1
    assert "changed messages" in output


@pytest.mark.long
def test_crashes_and_endless_calls_are_told_and_survived():
    targets = [f"--target=planted_{name}" for name in ("crash", "hang")]
    status, output = fuzz("--calls", 4, "--seed", 19, "--patience", 2, *targets)  # one of each
    assert status == 1
    assert re.search(r"BUG call \d+: crashed \(exit status -?\d+\)", output), output
    assert re.search(r"BUG call \d+: was endless", output), output


def test_planted_leak():
    status, output = fuzz("--leaks", "--calls", 3000, "--target", "planted_leak")
    assert status == 1, output
