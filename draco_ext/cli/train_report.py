"""The output of ``draco train``: a table, a JSON file and a picture."""

from __future__ import annotations

import json
import os
import platform
from contextlib import suppress
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from math import isfinite
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from rich import box
from rich.table import Table

from draco_ext._version import __version__
from draco_ext.cli.faults import Fault
from draco_ext.cli.training import AUDIT, PROTECTED, Config, Outcome, Training
from draco_ext.cli.verdict import Check
from draco_ext.ops import build_info

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

SPLIT = ("compute", "encode", "communicate", "decode")


def describe(training: Training) -> str:
    """Return a readable name of a training."""
    if training.rule == AUDIT:
        return f"{training.label}, {'1 faulty' if training.attacked else 'none faulty'}"
    return f"{training.label}{'' if training.attacked else ', no adversaries'}"


def step_seconds(outcome: Outcome) -> np.ndarray:
    """Return the seconds of every step, all kinds together."""
    seconds: np.ndarray = np.sum([outcome.seconds[kind] for kind in SPLIT], axis=0)
    return seconds


def make_tables(config: Config, outcomes: list[Outcome]) -> tuple[Table, Table]:
    """Return the tables for the terminal: the result and the times of each training."""
    audits = any(outcome.audit is not None for outcome in outcomes)
    results = _table(_title(config), _RESULTS_CAPTION + (_audit_caption(config) if audits else ""))
    for name in ("test accuracy", "named (in steps)", "distance from clean run"):
        results.add_column(name, justify="right")
    times = _table("Milliseconds per step", _TIMES_CAPTION.format(config.workers, os.cpu_count()))
    for name in ("work", *SPLIT, "total"):
        times.add_column(name, justify="right")
    for outcome in outcomes:
        training = outcome.training
        label = training.label, str(max(map(len, outcome.bad), default=0))
        results.add_row(*label, f"{outcome.accuracy:.1%}", _named(outcome), format_distance(outcome.distance))
        milliseconds = [1e3 * outcome.mean_seconds(kind) for kind in SPLIT]
        times.add_row(
            *label,
            _work(outcome),
            *(f"{value:.2f}" for value in milliseconds),
            f"{sum(milliseconds):.1f}",
        )
    return results, times


_RESULTS_CAPTION = (
    "Distance: of the final parameters, relative. The clean run is that of the same code without bad workers, "
    "for all others that of plain averaging."
)
_TIMES_CAPTION = (
    "Work: samples per worker, in multiples of plain averaging's; of an audit before and after it has found a fault. "
    "Times are wall time of the worker "
    "that waited least for the others; {} workers, {} cores on this machine."
)


def _audit_caption(config: Config) -> str:
    return (
        f" Audit has one bad worker, whose gradients are all {Fault.FACTOR:g} times the right ones from the "
        f"{Fault.BEGIN + 1}rd step on; steps are audited with a chance of {config.audit_rate:g}."
    )


def _work(outcome: Outcome) -> str:
    """Return the work of a training, with an audit before and after a fault was found."""
    around = None if outcome.audit is None else outcome.audit.passes_around
    return ", ".join(f"{work:.3g}x" for work in around or (outcome.compute_factor,))


def _table(title: str, caption: str) -> Table:
    """Return a table with a line for each training."""
    table = Table(
        title=title,
        caption=caption,
        title_style="bold",
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=0,
    )
    table.add_column("training", no_wrap=True)
    table.add_column("bad", justify="right")
    return table


def _title(config: Config) -> str:
    bad = f"{config.adversaries} bad ({config.bad}), attack: {config.attack}"
    return (
        f"{config.workers} workers, {bad if config.adversaries else 'none bad'}, "
        f"{config.steps} steps of {config.batch_size} digits, seed {config.seed}"
        + (f", momentum {config.worker_momentum:g} at the workers" if config.worker_momentum else "")
    )


def _named(outcome: Outcome) -> str:
    """Return the named workers with their numbers of steps."""
    if all(suspects is None for suspects in outcome.suspects):
        return "cannot"
    if not outcome.named:
        return "nobody"
    if outcome.audit is not None and outcome.audit.found is not None:
        return f"{', '.join(map(str, outcome.named))} (after {outcome.audit.wrong_updates})"
    counts = set(outcome.named.values())
    if len(counts) == 1:
        return f"{', '.join(map(str, outcome.named))} ({counts.pop()})"
    names = [f"{worker} ({steps})" for worker, steps in outcome.named.items()]
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")


def format_distance(distance: float | None) -> str:
    """Return a readable distance."""
    if distance is None:
        return "-"
    if distance == 0:
        return "0 exactly"
    return f"{distance:.1e}" if isfinite(distance) else "not finite"


def write_json(path: Path, config: Config, outcomes: list[Outcome], checks: list[Check], seconds: float) -> None:
    """Write all figures of the comparison as JSON; infinities and NaN become null."""
    document = {
        "config": asdict(config),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": _machine(),
        "versions": _versions(),
        "build": build_info(),
        "seconds": seconds,
        "checks": [asdict(check) for check in checks],
        "trainings": [_as_dict(outcome) for outcome in outcomes],
    }
    path.write_text(json.dumps(finite(document), indent=1, allow_nan=False) + "\n")


def _as_dict(outcome: Outcome) -> dict[str, Any]:
    """Return the figures of a training under readable names."""
    elapsed = np.concatenate([[0.0], step_seconds(outcome).cumsum()])
    return {
        "rule": outcome.training.rule,
        "label": describe(outcome.training),
        "attacked": outcome.training.attacked,
        "accuracy": outcome.accuracy,
        "distance": outcome.distance,
        "distance_from": outcome.distance_from and asdict(outcome.distance_from),
        "parameters": outcome.parameters.size,
        "parameters_sha256": outcome.parameters_sha256,
        "parts": outcome.parts,
        "work_per_worker": outcome.compute_factor,
        "message_bytes": outcome.message_bytes,
        "seconds_per_step": {kind: outcome.mean_seconds(kind) for kind in outcome.seconds}
        | {"total": float(step_seconds(outcome).mean())},
        "named": outcome.named,
        "failed_steps": outcome.failed,
        "audit": outcome.audit and asdict(outcome.audit),
        "steps": {
            "loss": outcome.losses,
            "seconds": outcome.seconds,
            "suspects": outcome.suspects,
            "bad": outcome.bad,
            "changes": outcome.changes,
        },
        "evaluations": [
            {"step": step, "seconds": elapsed[step], "accuracy": accuracy, "loss": loss}
            for step, accuracy, loss in outcome.evaluations
        ],
    }


def finite(value: Any) -> Any:
    """Return the value with None for infinities and NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    if isinstance(value, float):
        return float(value) if isfinite(value) else None
    return value


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "draco_ext": __version__}
    for name in ("torch", "numpy", "scikit-learn"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "unknown"
    return versions


def processor() -> str:
    """Return the name of this machine's processor."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if "model name" in line:
                return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


def _machine() -> dict[str, Any]:
    return {"system": platform.platform(), "processor": processor(), "cores": os.cpu_count()}


# Okabe and Ito's palette for colour-blind readers.
_Look = tuple[str, str | tuple[int, tuple[int, int]]]  # colour, and matplotlib's line style
_LOOKS: dict[str, _Look] = {
    "mean": ("#D55E00", "-"),
    "geometric-median-gram": ("#E69F00", "-"),
    "krum": ("#CC79A7", "-"),
    "repetition": ("#0072B2", "-"),
    "cyclic": ("#56B4E9", (0, (4, 2))),
    AUDIT: ("#000000", (0, (1, 1))),
}
_OTHER_LOOK: _Look = ("#009E73", "-.")
_CLEAN_LOOK: _Look = ("#BBBBBB", "-")


def draw(path: Path, config: Config, outcomes: list[Outcome]) -> None:
    """Draw the accuracy over steps and over time, one line per training.

    The clean run of a code or an audit is left out, since the line of the attacked run would cover it.
    """
    attacked = {o.training.rule for o in outcomes if o.training.attacked}
    shown = [
        outcome
        for outcome in outcomes
        if outcome.training.attacked or outcome.training.rule == "mean" or outcome.training.rule not in attacked
    ]
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.4), sharey=True, layout="constrained")
    for outcome in shown:
        elapsed = np.concatenate([[0.0], step_seconds(outcome).cumsum()])
        steps = [step for step, _, _ in outcome.evaluations]
        accuracy = [100 * value for _, value, _ in outcome.evaluations]
        look = _look(outcome.training)
        panels[0].plot(steps, accuracy, **look)
        panels[1].plot(elapsed[steps], accuracy, **look)
    panels[0].set(xlabel="steps", ylabel="test accuracy (%)", ylim=(0, 101), xlim=(0, config.steps))
    panels[1].set(xlabel="seconds of training", xlim=(0, None))
    for panel in panels:
        panel.grid(color="#EEEEEE")
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(_title(config), fontsize=11)
    _legend(panels[1], shown)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _look(training: Training) -> dict[str, Any]:
    """Return the colour and line style of a training."""
    if training.rule == "mean" and not training.attacked:
        (color, style), width = _CLEAN_LOOK, 5.0
    else:
        (color, style), width = _LOOKS.get(training.rule, _OTHER_LOOK), 1.8
    return {"color": color, "linestyle": style, "linewidth": width, "solid_capstyle": "round"}


def _legend(panel: Axes, shown: list[Outcome]) -> None:
    """Name the lines in a legend beside the panel, best accuracy first."""
    ranked = sorted(shown, key=lambda outcome: -outcome.accuracy)
    handles = [Line2D([], [], **_look(outcome.training)) for outcome in ranked]
    names = [
        f"{describe(o.training)}\n{o.accuracy:.1%}"
        + (f", distance from clean run: {format_distance(o.distance)}" if o.training.rule in PROTECTED else "")
        for o in ranked
    ]
    panel.legend(
        handles,
        names,
        loc="upper left",
        bbox_to_anchor=(1.02, 1.0),
        frameon=False,
        labelspacing=0.9,
        handlelength=2.4,
    )
