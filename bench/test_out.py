"""Decoding with and without ``out=``, in processes that set nothing about their memory.

    pytest bench/test_out.py [--quick] [--bench-output FOLDER]

The other benchmarks have the C library keep freed memory; here every result above 32 MB is new memory, as in a script
that uses draco_ext. A row is the median over processes, each with the median of its rounds.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys

import pytest
import torch

import draco_ext
from draco_ext import CyclicCode, RepetitionCode
from draco_ext.cli.bench.suites import same_messages
from draco_ext.cli.bench.timing import Clock, compare

N, ROUNDS = 45, 15
RULES = {"vote s=1": RepetitionCode(N, 1), "cyclic s=5": CyclicCode(N, 5)}


def measure(rule: str, d: int) -> None:
    """Print seconds and ratio of a clean decode, with ``out=`` and without, as JSON."""
    code, messages, gradient, clock = RULES[rule], same_messages(N, d), torch.zeros(d), Clock("cpu")
    calls = {
        "out=": lambda: draco_ext.decode(messages, code, out=gradient),
        "new": lambda: draco_ext.decode(messages, code),
    }
    timings = {name: compare(clock, call, messages.sum, ROUNDS, patience=60) for name, call in calls.items()}
    print(json.dumps({name: (timing.seconds, timing.ratio) for name, timing in timings.items()}))


@pytest.mark.parametrize("rule", RULES)
def test_speed(rule, request, add_row):
    d, processes = (10**6, 2) if request.config.option.quick else (10**7, 5)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "LD_PRELOAD"))}
    command = [sys.executable, __file__, rule, str(d)]
    runs = [
        json.loads(subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout)
        for _ in range(processes)
    ]
    for name in runs[0]:
        seconds, ratios = zip(*[run[name] for run in runs], strict=True)
        add_row(
            report="out",
            n=N,
            d=d,
            rule=f"{rule}, {name}",
            seconds=statistics.median(seconds),
            to_yardstick=statistics.median(ratios),
            bytes=4 * N * d,
            own=True,
            note=f"{min(ratios):.2f} to {max(ratios):.2f}",
        )


if __name__ == "__main__":
    measure(sys.argv[1], int(sys.argv[2]))
