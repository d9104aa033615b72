"""The output of the benchmarks: Markdown tables, JSON and pictures."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import matplotlib
import torch
from rich import box
from rich.table import Table
from rich.text import Text

from draco_ext import build_info
from draco_ext.cli.train_report import finite, processor

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle


@dataclass(frozen=True)
class Row:
    """A measured call, as medians over the rounds.

    Attributes:
        report: the name of its report, one of `REPORTS`.
        n: the number of workers.
        d: the number of elements of the gradient.
        rule: the name of the rule that was called.
        seconds: the time of a call; None if it could not run, see note.
        to_yardstick: the ratio of seconds to those of the report's yardstick, measured around every round.
        bytes: the number of bytes that were read or sent.
        error: the error relative to the honest mean, with reversed messages.
        own: whether the rule is this library's.
        split: seconds that are part of `seconds`, or other figures, by name; None: does not apply.
        note: a remark.
    """

    report: str
    n: int
    d: int
    rule: str
    seconds: float | None
    to_yardstick: float | None = None
    bytes: int = 0
    error: float | None = None
    own: bool = False
    split: Mapping[str, float | None] | None = None
    note: str = ""


# -------------------------------------------------------------------------------------------- what it was measured on


def _gpu() -> dict[str, str]:
    about = torch.cuda.get_device_properties(torch.cuda.current_device())
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", f"--id={about.uuid}"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        driver = "unknown"
    size = f"{about.total_memory / 2**30:.0f} GiB, {about.multi_processor_count} multiprocessors"
    return {"gpu": f"{about.name}, {size}, {about.L2_cache_size / 2**20:.0f} MiB L2", "driver": driver}


def machine(cuda: bool = False) -> dict[str, str]:
    """Return a description of the machine on which a table was measured."""
    about = {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": f"{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        **(_gpu() if cuda else {}),
        "torch": torch.__version__,
    }
    for library in ("byzfl", "geom-median"):
        try:
            about[library] = version(library)
        except PackageNotFoundError:
            continue
    about |= {f"draco_ext {key}": str(value) for key, value in build_info().items()}
    return {key: value for key, value in about.items() if value}


# ------------------------------------------------------------------------------------------------------------ tables


@dataclass(frozen=True)
class Report:
    """The way in which the rows of one kind are shown."""

    title: str
    legend: str
    column: str  # the heading of Row.to_yardstick
    show: Callable[[float], str] = "{:.2f}".format
    wraps: bool = False  # whether its notes are long, so that the terminal breaks their lines


_ERROR = (
    "error: relative to the honest mean when as many messages as the rule is told of are reversed (times -100), at "
    "d = 1e5."
)
_MEMORY = "Results lie in memory that was used before."
_OTHER = "x other: time over that of the fastest rule that is neither this library's nor the mean."
REPORTS = {
    "decode": Report(
        "decoding compared with one read of the messages",
        "ms: median. GB/s: bytes of the messages / ms. x read: relative to one read of the messages, messages.sum(), "
        f"just before and after; median. {_MEMORY} {_OTHER} {_ERROR}",
        "x read",
    ),
    "cuda": Report(
        "decoding on the GPU compared with a device copy of the same bytes",
        "ms: median, by CUDA events. GB/s: bytes that must move (messages read once, gradient written once; for an "
        "encode its rows and its message) / ms. of copy: that rate relative to the rate of a device copy that moves "
        f"as many bytes, just before and after; median. {_OTHER} {_ERROR}",
        "of copy",
        lambda ratio: f"{1 / ratio:.0%}",
    ),
    "kernels": Report(
        "kernels and calls, each beside its yardstick",
        "ms: median. GB/s: bytes read / ms. x yardstick: relative to the yardstick just before and after; median. "
        f"{_MEMORY}",
        "x yardstick",
    ),
    "out": Report(
        "decoding into memory that is there (out=) and into new memory",
        "ms: median. GB/s: bytes of the messages / ms. x read: relative to messages.sum() just before and after; "
        "median over processes, of the median in each. note: from process to process. The processes set nothing about "
        "their memory, so that the C library takes that of each large result from the system.",
        "x read",
    ),
    "scaling": Report(
        "time per byte over sizes",
        "ms: median. GB/s: bytes of the messages / ms. x read: relative to messages.sum(). "
        f"{_MEMORY} locator: the part of the "
        "time that the search for bad workers takes.",
        "x read",
    ),
    "paper": Report(
        "the paper's comparison: encoding and decoding of whole gradients, and the geometric median of as many",
        "seconds; 45 workers, float32, attacked by s workers that the decoder does not know of. The gradient comes in "
        "buckets of 25 MiB, as DistributedDataParallel has them: the time of a bucket, times their number. median: "
        "Weiszfeld on the messages; Gram: on their Gram matrix. Repetition has nothing to encode. median/...: how much "
        "longer the geometric median takes than encoding and decoding.",
        "",
    ),
    "accuracy": Report(
        "time to accuracy under attack",
        "work: samples that a worker computes, in multiples of plain averaging's: the price of the codes. Steps and "
        "seconds until that test accuracy, and the accuracy after all steps. Processes with DistributedDataParallel "
        "on this machine, d parameters; the first line is plain averaging without bad workers.",
        "",
    ),
    "neighbours": Report(
        "methods that learn in spite of bad workers, on scikit-learn's digits",
        "Test accuracy in % without bad workers and under each attack, the mean over seeds; where each agent has a "
        "model of its own, also the mean over good agents. KB: what a worker sends in a step. work: samples that a "
        "worker passes forward and backward, in multiples of plain averaging's; a forward pass counts a third. Both "
        "are means over attacks and seeds. Workers are simulated in one process.",
        "work",
        wraps=True,
    ),
    "step": Report(
        "communication and decoding of a step of n ranks over gloo on this machine, d parameters",
        "ms: median, of the backward pass that communicates, on rank 0, less one that does not but encodes. MB: "
        "what all ranks sent together. GB/s: that / ms. x DDP: time over plain DistributedDataParallel's in the same "
        "round; median. encode, communicate, decode: ms of rank 0 in that pass, which shares the cores with the "
        "others; communicate: waiting for them.",
        "x DDP",
    ),
}


def size_name(d: int) -> str:
    """Return a number of elements in a short form."""
    return f"{d:.3g}".replace("e+0", "e")


def _fastest_other(rows: list[Row]) -> dict[tuple[int, int], float]:
    fastest: dict[tuple[int, int], float] = {}
    for row in rows:
        if row.error is not None and not row.own and row.rule != "mean" and row.seconds is not None:
            fastest[row.n, row.d] = min(row.seconds, fastest.get((row.n, row.d), row.seconds))
    return fastest


def _cells(row: Row, report: Report, fastest: dict[tuple[int, int], float]) -> dict[str, str]:
    """Return a row's cells by the table's header."""
    cells = {"n": str(row.n), "d": size_name(row.d), "rule": row.rule}
    if row.report == "neighbours":
        accuracy = {attack: f"{100 * value:.1f}" for attack, value in accuracies(row).items()}
        work = "" if row.to_yardstick is None else report.show(row.to_yardstick)
        return cells | accuracy | {"KB": f"{row.bytes / 1e3:.0f}", report.column: work, "guarantee": row.note}
    if row.report in ("paper", "accuracy"):
        return cells | {name: "never" if value is None else f"{value:.3g}" for name, value in (row.split or {}).items()}
    seconds = row.seconds
    cells |= {
        "ms": "-" if seconds is None else f"{1e3 * seconds:.4g}",
        "MB": f"{row.bytes / 1e6:.1f}",
        "GB/s": "-" if seconds is None else f"{row.bytes / seconds / 1e9:.2f}",
        report.column: "-" if row.to_yardstick is None else report.show(row.to_yardstick),
    }
    if row.report in ("decode", "cuda"):
        other = fastest.get((row.n, row.d))
        cells["x other"] = ""
        if seconds is not None and other is not None and row.error is not None:
            cells["x other"] = f"{seconds / other:.3f}"
        cells["error"] = "" if row.error is None else f"{row.error:.1e}"
    if row.report == "step":
        cells |= {name: f"{1e3 * part:.1f}" for name, part in (row.split or {}).items() if part is not None}
    if row.report == "scaling":
        cells["locator"] = "" if row.split is None else f"{row.split['locator']:.2%}"
    cells["note"] = row.note
    return cells


def accuracies(row: Row) -> dict[str, float]:
    """Return a method's accuracy by attack, without those of single seeds, from a row of "neighbours"."""
    return {name: value for name, value in (row.split or {}).items() if value is not None and ", seed " not in name}


def wrapped_table(rows: list[Row]) -> Table:
    """Return a table for the terminal, with each rule's long note below its name."""
    report = REPORTS[rows[0].report]
    cells = [_cells(row, report, {}) for row in rows]
    found = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    found.add_column("rule, and what is proved")
    shown = [name for name in cells[0] if name not in ("n", "d", "rule", "guarantee")]  # n and d: the same in all rows
    for name in shown:
        # Headings are broken between words, figures never.
        found.add_column(name, justify="right", width=max(len(line) for line in [*name.split(), "100.0"]))
    for row, line in zip(rows, cells, strict=True):
        rule = Text.assemble((row.rule, "bold" if row.own else ""), "\n", (row.note, "dim"))
        found.add_row(rule, *(line[name] for name in shown))
    return found


def table(rows: list[Row]) -> list[str]:
    """Return a Markdown table that is also aligned as plain text."""
    report, fastest = REPORTS[rows[0].report], _fastest_other(rows)
    cells = [_cells(row, report, fastest) for row in rows]
    header = [name for name in cells[0] if any(line.get(name) for line in cells)]
    lines = [dict(zip(header, header, strict=True)), *cells]
    widths = {name: max(2, *(len(line.get(name, "")) for line in lines)) for name in header}
    left = {"rule", "note", "guarantee"}
    text = [
        " | ".join(
            line.get(name, "").ljust(widths[name]) if name in left else line.get(name, "").rjust(widths[name])
            for name in header
        )
        for line in lines
    ]
    ruler = " | ".join("-" * widths[name] if name in left else "-" * (widths[name] - 1) + ":" for name in header)
    return [f"| {line} |" for line in (text[0], ruler, *text[1:])]


def facts(cuda: bool) -> str:
    """Return the description of the machine as one line."""
    return "; ".join(f"{key}: {value}" for key, value in machine(cuda).items())


def write(folder: Path, rows: list[Row]) -> list[Path]:
    """Write one kind of rows as JSON, Markdown and, if it has one, a picture; return the files."""
    name = rows[0].report
    report, cuda = REPORTS[name], name == "cuda"
    folder.mkdir(parents=True, exist_ok=True)
    json_file, text_file = folder / f"{name}.json", folder / f"{name}.md"
    document = {"machine": machine(cuda), "rows": [asdict(row) for row in rows]}
    json_file.write_text(json.dumps(finite(document), indent=1, allow_nan=False) + "\n")
    text_file.write_text("\n\n".join([facts(cuda), report.legend, "\n".join(table(rows))]) + "\n")
    files = [json_file, text_file]
    if name in _DRAWINGS:
        files.append(folder / f"{name}.png")
        _DRAWINGS[name](files[-1], rows)
    return files


# ---------------------------------------------------------------------------------------------------------- pictures

# Okabe and Ito's colours, which every kind of colour vision can tell apart.
_OWN, _OTHERS, _READ = "#0072B2", "#E69F00", "#999999"
_LINES = ("#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00")


def _panel(panel: Axes) -> None:
    panel.grid(color="#EEEEEE")
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _draw_decode(path: Path, rows: list[Row]) -> None:
    """Draw bars for the largest size: time relative to one read of the messages."""
    size = max((row.n * row.d, row.n, row.d) for row in rows)[1:]
    bars = [(row.to_yardstick, row) for row in rows if (row.n, row.d) == size and row.to_yardstick is not None]
    bars.sort(key=lambda bar: -bar[0])
    figure, panel = plt.subplots(figsize=(9, 0.6 + 0.3 * len(bars)), layout="constrained")
    kinds = [_OWN if row.own else _READ if row.error is None or row.rule == "mean" else _OTHERS for _, row in bars]
    drawn = panel.barh([row.rule for _, row in bars], [reads for reads, _ in bars], color=kinds)
    labels = [f" {_short(reads)}" + ("" if row.error is None else f"   error {row.error:.1g}") for reads, row in bars]
    panel.bar_label(drawn, labels, fontsize=8)
    names = {_OWN: "draco_ext", _OTHERS: "robust averages and other code", _READ: "not robust, to compare with"}
    handles = [Rectangle((0, 0), 1, 1, color=colour) for colour in names]
    panel.legend(handles, names.values(), frameon=False, loc="upper right")
    panel.set(xscale="log", xlabel="time, in reads of the messages")
    panel.set_xlim(0.7, 20 * max((reads for reads, _ in bars), default=1))
    panel.set_title(f"{size[0]} messages of {size_name(size[1])} float32", fontsize=11)
    _panel(panel)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _draw_scaling(path: Path, rows: list[Row]) -> None:
    """Draw time per byte, and time relative to one read, over d: a line for each n, a row of panels for each rule."""
    rules = list(dict.fromkeys(row.rule for row in rows))
    figure, panels = plt.subplots(len(rules), 2, figsize=(11, 3.6 * len(rules)), squeeze=False, layout="constrained")
    for (left, right), rule in zip(panels, rules, strict=True):
        for colour, n in zip(_LINES, sorted({row.n for row in rows}), strict=False):
            line = [row for row in rows if row.rule == rule and row.n == n]
            d = [row.d for row in line]
            per_byte = [1e9 * row.seconds / row.bytes for row in line if row.seconds is not None]
            left.plot(d, per_byte, "o-", color=colour, label=f"n = {n}")
            right.plot(d, [row.to_yardstick for row in line], "o-", color=colour)
        left.set(xscale="log", ylim=(0, None), xlabel="d", ylabel="ns per byte of the messages", title=rule)
        right.set(xscale="log", ylim=(0, None), xlabel="d", ylabel="time / one read of the messages", title=rule)
        left.legend(frameon=False)
        for panel in (left, right):
            _panel(panel)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _draw_neighbours(path: Path, rows: list[Row]) -> None:
    """Draw a panel for each attack: the accuracy of each method, with a dot for each seed."""
    attacks = list(accuracies(rows[0]))
    height = 1.3 + 0.34 * len(rows)
    figure, panels = plt.subplots(1, len(attacks), figsize=(13, height), sharey=True, layout="constrained")
    places = range(len(rows))
    for panel, attack in zip(panels, attacks, strict=True):
        for place, row in zip(places, rows, strict=True):
            mean = accuracies(row)[attack]
            panel.barh(place, 100 * mean, height=0.66, color=_OWN if row.own else _OTHERS)
            seeds = [value for name, value in (row.split or {}).items() if name.startswith(f"{attack}, seed ")]
            panel.plot([100 * value for value in seeds if value is not None], [place] * len(seeds), "k.", markersize=3)
            inside = mean > 0.5
            panel.text(
                4 if inside else 100 * mean + 8,
                place,
                f"{100 * mean:.1f}",
                va="center",
                fontsize=8,
                color="white" if inside and row.own else "black",
            )
        panel.set(xlim=(0, 103), title=attack if attack != "none" else "no bad workers")
        panel.title.set_fontsize(10)
        _panel(panel)
        panel.grid(visible=False, axis="y")
    panels[0].set_yticks(places, [row.rule for row in rows])
    panels[0].invert_yaxis()
    figure.supxlabel("test accuracy in %: bars are means, dots are seeds", fontsize=10)
    names = {_OWN: "draco_ext", _OTHERS: "others"}
    handles = [Rectangle((0, 0), 1, 1, color=colour) for colour in names]
    figure.legend(handles, names.values(), frameon=False, loc="lower left", ncols=2, fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)


_DRAWINGS: dict[str, Callable[[Path, list[Row]], None]] = {
    "decode": _draw_decode,
    "cuda": _draw_decode,
    "scaling": _draw_scaling,
    "neighbours": _draw_neighbours,
}
