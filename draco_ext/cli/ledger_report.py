"""``draco report``, which shows the findings about each rank as a table, as JSON and as a picture over the steps."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from rich import box
from rich.markup import escape
from rich.table import Table

from draco_ext.reporting.ledger import Finding, iter_ledger, ledger_files

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.artist import Artist
from matplotlib.lines import Line2D

# Every kind of finding with its colour, from Okabe and Ito's palette for colour-blind readers.
COLOURS = {
    "gradient": "#D55E00",
    "data": "#E69F00",
    "persistent": "#CC79A7",
    "transient": "#009E73",
    "state": "#0072B2",
    "undecided": "#56B4E9",
    "missing": "#999999",
}
MOST_DRAWN = 40  # rows of a picture
BINS = 400  # of steps in a row of a picture


class Who(NamedTuple):
    """A rank on a host; after a restart on other machines, the same rank is another `Who`."""

    rank: int
    worker: int
    host: str


class Moment(NamedTuple):
    """A step and the time of a finding in it, in seconds since the epoch."""

    step: int
    time: float


@dataclass(frozen=True)
class RankHistory:
    """The findings about one rank on one host.

    Attributes:
        who: the rank and its host.
        counts: for each kind of finding, the number of messages in each step.
        failed: the number of messages in buckets that could not be decoded, where a suspicion is not certain.
        largest: the largest deviation of an element; None if none is known or it is not finite.
        since: the first step with a finding.
        last_seen: the last step with a finding.
        last_clean_step: the last step in the ledgers without a finding; None if there is none.
    """

    who: Who
    counts: Mapping[str, Mapping[int, int]]
    failed: int
    largest: float | None
    since: Moment
    last_seen: Moment
    last_clean_step: int | None

    @property
    def kinds(self) -> dict[str, int]:
        """Return the number of messages of each kind, most frequent first."""
        totals = {kind: sum(steps.values()) for kind, steps in self.counts.items()}
        return dict(sorted(totals.items(), key=lambda item: (-item[1], item[0])))

    @property
    def steps(self) -> set[int]:
        """Return the steps with findings."""
        return {step for steps in self.counts.values() for step in steps}


@dataclass(frozen=True)
class LedgerReport:
    """The summary of a job's ledgers.

    Attributes:
        ranks: the ranks with findings; first those with most wrong messages, then those with missing ones.
        first: the lowest step and the earliest time in the ledgers; None if they are empty.
        last: the highest step and the latest time.
        failed_steps: the steps with a bucket that could not be decoded.
    """

    ranks: Sequence[RankHistory]
    first: Moment | None
    last: Moment | None
    failed_steps: tuple[int, ...]


class _Entry:
    """The findings of one rank in one file."""

    def __init__(self) -> None:
        self.counts: defaultdict[str, Counter[int]] = defaultdict(Counter)
        self.failed = 0
        self.largest: float | None = None
        self.times: dict[int, tuple[float, float]] = {}  # by step: times of the first and the last finding

    def add(self, finding: Finding) -> None:
        self.counts["missing" if finding.missing else finding.kind][finding.step] += 1
        self.failed += finding.failed
        self.largest = _largest(self.largest, finding.largest)
        first, last = self.times.get(finding.step, (finding.time, finding.time))
        self.times[finding.step] = (min(first, finding.time), max(last, finding.time))

    def merge(self, other: _Entry) -> None:
        """Merge the same rank's findings from another file; where both have a count, the larger one holds."""
        for kind, steps in other.counts.items():
            self.counts[kind] |= steps
        self.failed = max(self.failed, other.failed)
        self.largest = _largest(self.largest, other.largest)
        for step, (first, last) in other.times.items():
            mine = self.times.get(step, (first, last))
            self.times[step] = (min(first, mine[0]), max(last, mine[1]))


def _largest(*values: float | None) -> float | None:
    return max((value for value in values if value is not None), default=None)


def read(paths: Iterable[str]) -> LedgerReport:
    """Read ledgers of one job.

    Args:
        paths: the files, as for `iter_ledger`. Each rank may have written one; a finding that is in several of them
            counts once.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file is no ledger.
    """
    entries: dict[Who, _Entry] = {}
    failed_steps: set[int] = set()
    for path in paths:
        for file in ledger_files(path):
            found: defaultdict[Who, _Entry] = defaultdict(_Entry)
            for finding in iter_ledger(file):
                found[Who(finding.rank, finding.worker, finding.host)].add(finding)
                if finding.failed:
                    failed_steps.add(finding.step)
            for who, entry in found.items():
                entries.setdefault(who, _Entry()).merge(entry)
    if not entries:
        return LedgerReport((), None, None, ())
    last_step = max(max(entry.times) for entry in entries.values())
    ranks = [_history(who, entry, last_step) for who, entry in entries.items()]
    times = [span for entry in entries.values() for span in entry.times.values()]
    ranks.sort(key=lambda rank: (-_wrong(rank), -sum(rank.kinds.values()), rank.who))
    return LedgerReport(
        ranks=ranks,
        first=Moment(min(rank.since.step for rank in ranks), min(time for time, _ in times)),
        last=Moment(last_step, max(time for _, time in times)),
        failed_steps=tuple(sorted(failed_steps)),
    )


def _wrong(rank: RankHistory) -> int:
    return sum(number for kind, number in rank.kinds.items() if kind not in ("missing", "undecided"))


def _history(who: Who, entry: _Entry, last_step: int) -> RankHistory:
    first, last = min(entry.times), max(entry.times)
    clean = last_step
    while clean in entry.times:
        clean -= 1
    return RankHistory(
        who=who,
        counts=entry.counts,
        failed=entry.failed,
        largest=entry.largest,
        since=Moment(first, entry.times[first][0]),
        last_seen=Moment(last, entry.times[last][1]),
        last_clean_step=clean if clean >= 0 else None,
    )


def make_table(report: LedgerReport) -> Table:
    """Make the table for the terminal: a line for each rank."""
    first, last = report.first, report.last
    span = f"{first.step:,} to {last.step:,}, {_span(first, last)}" if first and last else "none"
    table = Table(
        title=f"Findings in steps {span}",
        title_justify="left",
        caption=_CAPTION,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("rank", justify="right")
    table.add_column("host", overflow="fold")
    table.add_column("messages", no_wrap=True)
    for name in ("steps", "since", "last seen", "last clean"):
        table.add_column(name, justify="right", no_wrap=True)
    for rank in report.ranks:
        kinds = "\n".join(f"{count:,} [{COLOURS.get(kind, 'default')}]{kind}[/]" for kind, count in rank.kinds.items())
        if rank.failed:
            kinds += f"\n({rank.failed:,} uncertain)"
        table.add_row(
            str(rank.who.rank),
            escape(rank.who.host),
            kinds,
            f"{len(rank.steps):,}",
            _format_moment(rank.since),
            _format_moment(rank.last_seen),
            "-" if rank.last_clean_step is None else f"{rank.last_clean_step:,}",
        )
    return table


_CAPTION = (
    "Last clean: the last of these steps in which nothing was found of the rank. "
    "Uncertain: of a step that failed. A missing message is no suspicion."
)


def _format_moment(moment: Moment) -> str:
    return f"{moment.step:,}\n{_date(moment.time):%m-%d %H:%M}"


def _span(first: Moment, last: Moment) -> str:
    return f"{_date(first.time):%Y-%m-%d %H:%M} to {_date(last.time):%Y-%m-%d %H:%M} UTC"


def _date(time: float) -> datetime:
    return datetime.fromtimestamp(time, timezone.utc)


def as_json(report: LedgerReport) -> dict[str, Any]:
    """Return the report for programs; steps are the guard's, times are in ISO 8601."""
    return {
        "first": _moment_as_json(report.first),
        "last": _moment_as_json(report.last),
        "failed_steps": list(report.failed_steps),
        "ranks": [
            {
                "rank": rank.who.rank,
                "worker": rank.who.worker,
                "host": rank.who.host,
                "kinds": rank.kinds,
                "messages": sum(rank.kinds.values()),
                "steps": len(rank.steps),
                "messages_in_failed_steps": rank.failed,
                "since": _moment_as_json(rank.since),
                "last_seen": _moment_as_json(rank.last_seen),
                "last_clean_step": rank.last_clean_step,
                "largest_deviation": rank.largest,
            }
            for rank in report.ranks
        ],
    }


def _moment_as_json(moment: Moment | None) -> dict[str, Any] | None:
    return moment and {"step": moment.step, "time": _date(moment.time).isoformat(timespec="seconds")}


def draw(path: Path, report: LedgerReport) -> None:
    """Draw the steps with findings of each rank: a darker mark has findings in more of the steps that it covers.

    Args:
        path: the file of the picture; its suffix determines the format.
        report: the report, which must have findings.

    Raises:
        OSError: the file cannot be written.
        ValueError: matplotlib knows no format with this suffix.
    """
    first, last = report.first, report.last
    if first is None or last is None:
        raise ValueError("report must have findings, got none")
    shown = report.ranks[:MOST_DRAWN]
    edges = _bin_edges(first.step, last.step)
    figure, axes = plt.subplots(figsize=(10, 1.8 + 0.42 * len(shown)), layout="constrained")
    for row, rank in enumerate(shown):
        kinds = list(rank.kinds)
        for lane, kind in enumerate(kinds):
            image = _marks(rank.counts[kind], edges, COLOURS.get(kind, "#000000"))
            top = row - 0.4 + 0.8 * lane / len(kinds)
            extent = (edges[0] - 0.5, edges[-1] - 0.5, top + 0.8 / len(kinds), top)
            axes.imshow(image, extent=extent, aspect="auto", interpolation="nearest")
    axes.set(xlabel="step", xlim=(edges[0] - 0.5, edges[-1] - 0.5), ylim=(len(shown) - 0.5, -0.5))
    axes.set_yticks(range(len(shown)), [_label(rank) for rank in shown])
    axes.set_yticks([row - 0.5 for row in range(1, len(shown))], minor=True)
    axes.grid(axis="y", which="minor", color="#EEEEEE")
    axes.tick_params(axis="y", which="both", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    left_out = len(report.ranks) - len(shown)
    more = f", and {left_out} more ranks" if left_out else ""
    axes.set_title(f"What was found of each rank{more}, {_span(first, last)}", loc="left", fontsize=11)
    found = [kind for kind in COLOURS if any(kind in rank.counts for rank in shown)]
    handles: list[Artist] = [Line2D([], [], color=COLOURS[kind], linewidth=6) for kind in found]
    if report.failed_steps:
        lines = axes.vlines(report.failed_steps, -0.5, len(shown) - 0.5, "#000000", "dotted", linewidth=0.8, zorder=-1)
        handles.append(lines)
        found.append("step failed:\nuncertain")
    axes.legend(handles, found, loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False)
    try:
        figure.savefig(path, dpi=150)
    finally:
        plt.close(figure)


def _label(rank: RankHistory) -> str:
    return f"rank {rank.who.rank} on {rank.who.host}: {sum(rank.kinds.values()):,}"


def _bin_edges(first: int, last: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    width = max(1, -(-(last - first + 1) // BINS))
    count = max(10, -(-(last - first + 1) // width))
    return first + width * np.arange(count + 1)


def _marks(
    counts: Mapping[int, int], edges: np.ndarray[Any, np.dtype[np.int64]], colour: str
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return a row of pixels; a bin with findings in all its steps has the full colour, and one step is visible."""
    share = np.histogram(list(counts), edges)[0] / np.diff(edges)
    pixels = np.tile(matplotlib.colors.to_rgba(colour), (1, len(share), 1))
    pixels[0, :, 3] = np.where(share > 0, 0.45 + 0.55 * share, 0)
    return pixels
