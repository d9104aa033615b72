"""Options of the benchmarks and the table that each of them ends with: one for the CPU, one for the GPU."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import torch

import draco_ext


@dataclass(frozen=True)
class Row:
    """One measured rule; medians over the rounds."""

    device: str  # "cpu", "cuda" or, for a whole step, "step"
    n: int
    d: int
    rule: str
    seconds: float
    to_yardstick: float  # seconds / those of the device's yardstick, around every round
    bytes: int
    error: float | None = None  # relative to the honest mean, with reversed messages
    split: dict[str, float] | None = None  # seconds that are part of the others


ROWS = pytest.StashKey[list[Row]]()


def pytest_addoption(parser):
    group = parser.getgroup("draco_ext benchmark")
    group.addoption("--quick", action="store_true", help="only n = 15, d = 1e6")
    group.addoption("--bench-output", type=Path, metavar="FOLDER", help="write <device>.json and <device>.md there")


def pytest_configure(config):
    config.stash[ROWS] = []
    # Its table would repeat ours, without the ratios.
    config.option.benchmark_quiet = True


@pytest.fixture
def add_row(request):
    """Adds a `Row` to the table, given its fields by name."""
    return lambda **fields: request.config.stash[ROWS].append(Row(**fields))


def _cpu() -> str:
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), name)
    return f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def _gpu() -> dict[str, str]:
    about = torch.cuda.get_device_properties(torch.cuda.current_device())
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", f"--id={about.uuid}"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        driver = "unknown"
    size = f"{about.total_memory / 2**30:.0f} GiB, {about.multi_processor_count} multiprocessors"
    return {"gpu": f"{about.name}, {size}, {about.L2_cache_size / 2**20:.0f} MiB L2", "driver": driver}


def machine(device: str) -> dict[str, str]:
    """What a table was measured on."""
    about = {"date": time.strftime("%Y-%m-%d"), "cpu": _cpu(), **(_gpu() if device == "cuda" else {})}
    about["torch"] = torch.__version__
    about |= {f"draco_ext {key}": str(value) for key, value in draco_ext.build_info().items()}
    return {key: value for key, value in about.items() if value}


@dataclass(frozen=True)
class Report:
    """How the rows of a device are shown."""

    title: str
    legend: str
    column: str  # of Row.to_yardstick
    show: Callable[[float], str]


_ERROR = (
    "error: relative to the honest mean when as many messages as the rule is told of are reversed (times -100), at "
    "d = 1e5."
)
REPORTS = {
    "cpu": Report(
        "decoding compared with one read of the messages",
        "ms: median. GB/s: bytes of the messages / ms. x read: relative to one read of the messages, messages.sum(), "
        f"just before and after; median. x mean: that over mean's. {_ERROR}",
        "x read",
        lambda ratio: f"{ratio:.2f}",
    ),
    "cuda": Report(
        "decoding on the GPU compared with a device copy of the same bytes",
        "ms: median, by CUDA events. GB/s: bytes that must move (messages read once, gradient written once; for an "
        "encode its rows and its message) / ms. of copy: that rate relative to the rate of a device copy that moves "
        f"as many bytes, just before and after; median. x mean: time over mean's. {_ERROR}",
        "of copy",
        lambda ratio: f"{1 / ratio:.0%}",
    ),
    "step": Report(
        "communication and decoding of a step of n ranks over gloo on this machine, d parameters",
        "ms: median, of the backward pass that communicates, on rank 0, less one that does not but encodes. MB: "
        "what all ranks sent together. GB/s: that / ms. x DDP: time over plain DistributedDataParallel's in the same "
        "round; median. encode, communicate, decode: ms of rank 0 in that pass, which shares the cores with the "
        "others; communicate: waiting for them.",
        "x DDP",
        lambda ratio: f"{ratio:.2f}",
    ),
}


def table(rows: list[Row]) -> list[str]:
    """Markdown that is also aligned as plain text."""
    report = REPORTS[rows[0].device]
    means = {(row.n, row.d): row.to_yardstick for row in rows if row.rule == "mean"}
    split = list(rows[0].split or ())
    header = ["n", "d", "rule", "ms", "MB", "GB/s", report.column, *(split or ("x mean", "error"))]
    cells = [header]
    for row in rows:
        mean = means.get((row.n, row.d))
        cells.append(
            [
                str(row.n),
                f"{row.d:.3g}".replace("e+0", "e"),
                row.rule,
                f"{1e3 * row.seconds:.3f}",
                f"{row.bytes / 1e6:.1f}",
                f"{row.bytes / row.seconds / 1e9:.2f}",
                report.show(row.to_yardstick),
            ]
        )
        if split:
            cells[-1] += [f"{1e3 * seconds:.1f}" for seconds in row.split.values()]
            continue
        cells[-1] += [
            "" if mean is None or row.error is None else f"{row.to_yardstick / mean:.2f}",
            "" if row.error is None else f"{row.error:.1e}",
        ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    left = header.index("rule")
    lines = [
        " | ".join(
            text.ljust(width) if column == left else text.rjust(width)
            for column, (text, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in cells
    ]
    rule = " | ".join("-" * width if column == left else "-" * (width - 1) + ":" for column, width in enumerate(widths))
    return [f"| {line} |" for line in (lines[0], rule, *lines[1:])]


def pytest_terminal_summary(terminalreporter, config):
    for device, report in REPORTS.items():
        rows = [row for row in config.stash[ROWS] if row.device == device]
        if not rows:
            continue
        about = machine(device)
        facts = [f"{key}: {value}" for key, value in about.items()]
        terminalreporter.section(report.title)
        for line in [*facts, report.legend, *table(rows)]:
            terminalreporter.write_line(line)

        folder = config.option.bench_output
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            text = "\n\n".join(["; ".join(facts), report.legend, "\n".join(table(rows))])
            (folder / f"{device}.md").write_text(text + "\n")
            results = {"machine": about, "rows": [asdict(row) for row in rows]}
            (folder / f"{device}.json").write_text(json.dumps(results, indent=2) + "\n")
            terminalreporter.write_line(f"wrote {folder}/{device}.md and {device}.json")
