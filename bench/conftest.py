"""The options of the benchmarks, and the tables at their end (draco_ext/cli/bench/report.py)."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from draco_ext.cli.bench import report
from draco_ext.cli.bench.timing import Timing, keep_memory


def pytest_addoption(parser):
    group = parser.getgroup("draco_ext benchmark")
    group.addoption("--quick", action="store_true", help="only the smallest size")
    group.addoption("--ranks", type=int, default=6, metavar="N", help="processes of test_step.py (6)")
    group.addoption("--bench-output", type=Path, metavar="FOLDER", help="write JSON, Markdown and pictures there")


ROWS = pytest.StashKey[list[report.Row]]()


def pytest_configure(config):
    config.stash[ROWS] = []
    keep_memory()
    # Its table would repeat ours, without the ratios.
    config.option.benchmark_quiet = True


@pytest.fixture
def add_row(request):
    """Add a `report.Row` to the table, given its fields by name."""
    return lambda **fields: request.config.stash[ROWS].append(report.Row(**fields))


@pytest.fixture
def beside(benchmark):
    """Time a call with pytest-benchmark, and a yardstick before and after every round; return the `Timing`.

    None under --benchmark-disable.
    """

    def run(call, yardstick, rounds):
        reads = []

        def read():
            start = time.perf_counter()
            yardstick()
            reads.append(time.perf_counter() - start)

        benchmark.pedantic(call, setup=read, rounds=rounds, warmup_rounds=1)
        read()
        if benchmark.stats is None:
            return None
        return Timing.of(benchmark.stats.stats.data, reads[1:])

    return run


def pytest_terminal_summary(terminalreporter, config):
    for name, kind in report.REPORTS.items():
        rows = [row for row in config.stash[ROWS] if row.report == name]
        if not rows:
            continue
        terminalreporter.section(kind.title)
        for line in [report.facts(name == "cuda"), kind.legend, *report.table(rows)]:
            terminalreporter.write_line(line)
        folder = config.option.bench_output
        if folder is not None:
            terminalreporter.write_line(f"wrote {', '.join(map(str, report.write(folder, rows)))}")
