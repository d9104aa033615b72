"""The commands and their options; the modules beside implement them."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterator
from math import inf, isfinite, lcm
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

from draco_ext._version import __version__
from draco_ext.baselines import AGGREGATORS
from draco_ext.cli import doctor as doctors
from draco_ext.cli import ledger_report, network_model, planning, train_report
from draco_ext.cli.bench import report as bench_report
from draco_ext.cli.bench import suites as bench_suites
from draco_ext.cli.bench.neighbours import SEEDS
from draco_ext.cli.bench.timing import keep_memory
from draco_ext.cli.digits import TRAIN_SAMPLES
from draco_ext.cli.faults import BAD_CHOICES
from draco_ext.cli.options import BYTES_PER_SECOND, SECONDS, Count
from draco_ext.cli.training import (
    AUDIT,
    AUDIT_RATE,
    CODES,
    LEARNING,
    PROTECTED,
    Config,
    Outcome,
    Training,
    code_for,
    list_trainings,
    run,
)
from draco_ext.cli.verdict import judge
from draco_ext.ops import build_info
from draco_ext.protocol.transports import TRANSPORTS
from draco_ext.testing.attacks import ATTACKS
from draco_ext.testing.local import under_torchrun

DEFAULT_RULES = ("mean", "geometric-median-gram", "krum", *PROTECTED)
# Rules that need 2s+3 workers; the codes need 2s+1.
KRUM_RULES = ("krum", "multi-krum")

_SEED = click.IntRange(0, 2**32 - 1)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="draco_ext", message="%(prog)s %(version)s")
def draco() -> None:
    """Exact gradients from workers of which some lie or miscompute."""


@draco.command(context_settings={"show_default": True})
@click.option(
    "--rule",
    "rules",
    multiple=True,
    default=DEFAULT_RULES,
    type=click.Choice([*AGGREGATORS, *PROTECTED]),
    help="Code, audit or rule to train with; may be repeated.",
)
@click.option(
    "--transport",
    type=click.Choice(TRANSPORTS),
    default="allreduce",
    help="How the codes' messages travel, and who is trusted; see draco_ext.protect.",
)
@click.option("--workers", type=Count(), default=9, help="Number of workers, n; under torchrun its ranks.")
@click.option("--adversaries", type=Count(), default=3, help="Number of bad workers, s.")
@click.option("--attack", type=click.Choice([*ATTACKS]), default="constant", help="What they send.")
@click.option(
    "--bad",
    type=click.Choice([*BAD_CHOICES]),
    default="fixed",
    help="Who is bad. " + "; ".join(f"{name}: {what}" for name, what in BAD_CHOICES.items()) + ".",
)
@click.option(
    "--audit-rate",
    type=click.FloatRange(0, 1, min_open=True),
    default=AUDIT_RATE,
    help="Chance that the audit covers a step; with 1 every step is.",
)
@click.option("--steps", type=Count(1), default=LEARNING.steps, help="Steps to train.")
@click.option(
    "--batch-size",
    type=Count(1, TRAIN_SAMPLES),
    default=LEARNING.batch_size,
    help="Samples per step, of all workers together; by default less where the parts must be even.",
)
@click.option(
    "--learning-rate",
    type=click.FloatRange(0, inf, min_open=True, max_open=True),
    default=LEARNING.learning_rate,
    help="Learning rate of SGD.",
)
@click.option(
    "--momentum",
    type=click.FloatRange(0, 1, max_open=True),
    default=LEARNING.momentum,
    help="Momentum of SGD.",
)
@click.option(
    "--worker-momentum",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.0,
    help="Momentum that workers add to their own gradients before any rule or code, in place of SGD's; "
    "see draco_ext.baselines.WorkerMomentum.",
)
@click.option("--seed", type=_SEED, default=0, help="Seed of the data, the net and the attack.")
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("draco-train"),
    help="Folder for the figures, train.json, and the picture, train.png.",
)
@click.pass_context
def train(context: click.Context, /, output: Path, **options: Any) -> None:
    """Train through an attack, with several rules side by side.

    A small convolutional net learns scikit-learn's handwritten digits in real processes, with
    DistributedDataParallel and draco_ext.protect. Every code is trained with and without bad
    workers, and an audit with and without one whose gradients are all wrong. The exit status
    is 1 if a result is not what theory says. On ranks of several hosts: torchrun ... -m
    draco_ext.cli train.
    """
    console = Console(quiet=not _speaks())
    config = _check(Config(**options), context, console)
    _make_folder(output)
    start = time.perf_counter()
    outcomes = _run_with_progress(config, console)
    if not _speaks():
        return
    seconds = time.perf_counter() - start
    checks = judge(config, outcomes, learns=_learns(config))
    for table in train_report.make_tables(config, outcomes):
        console.print(table, end="\n\n")
    with _writing_to(output):
        train_report.write_json(output / "train.json", config, outcomes, checks, seconds)
        train_report.draw(output / "train.png", config, outcomes)
    console.print(f"Took {seconds:.0f} s. Figures and picture: {output}/train.json, train.png")
    wrong = [check for check in checks if not check.holds]
    for check in wrong:
        console.print(f"[red]Not what theory says:[/red] {check.statement}. Found: {check.found}.")
    if wrong:
        raise SystemExit(1)
    console.print(f"All {len(checks)} checks against theory hold.")


def _make_folder(output: Path) -> None:
    """Create the output folder, so that an error appears before hours of work."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise click.UsageError(f"--output {output}: {error.strerror}") from error


@contextlib.contextmanager
def _writing_to(output: Path) -> Iterator[None]:
    """Report errors of writing, such as a full disk; the figures are also on the console."""
    try:
        yield
    except OSError as error:
        raise click.ClickException(f"cannot write to --output {output}: {error.strerror or error}") from error


def _speaks() -> bool:
    """Return whether this process is the one that reports, which is rank 0 under torchrun."""
    return not under_torchrun() or int(os.environ["RANK"]) == 0


def _check(config: Config, context: click.Context, console: Console) -> Config:
    """Return the configuration with defaults adapted so that it can run; raise if it cannot run.

    Args:
        config: the configuration from the options.
        context: knows which options have default values.
        console: prints a note for each changed default.
    """

    def asked(option: str) -> bool:
        return context.get_parameter_source(option) is not click.core.ParameterSource.DEFAULT

    if under_torchrun():
        ranks = int(os.environ["WORLD_SIZE"])
        if asked("workers") and config.workers != ranks:
            raise click.UsageError(f"--workers must be torchrun's {ranks} ranks, got {config.workers}")
        config = dataclasses.replace(config, workers=ranks)
    for option in ("learning_rate", "momentum", "worker_momentum"):
        if not isfinite(getattr(config, option)):
            name = "--" + option.replace("_", "-")
            raise click.UsageError(f"{name} must be finite, got {getattr(config, option)}")
    if config.worker_momentum:
        if asked("momentum") and config.momentum:
            raise click.UsageError("--worker-momentum takes the place of SGD's --momentum: give one of them")
        config = dataclasses.replace(config, momentum=0.0)
    n, s = config.workers, config.adversaries
    _check_workers(n, s)
    rules = tuple(dict.fromkeys(config.rules))
    if n < 2 * s + 3 and not set(rules).isdisjoint(KRUM_RULES):
        problem = f"Krum needs n >= 2s+3: {2 * s + 3} --workers for {s} --adversaries, got {n}"
        if asked("rules"):
            raise click.UsageError(problem)
        console.print(f"Without Krum: {problem}.")
        rules = tuple(rule for rule in rules if rule not in KRUM_RULES)
    if n < 3 and AUDIT in rules:
        problem = f"an audit needs n >= 3 --workers, got {n}"
        if asked("rules"):
            raise click.UsageError(problem)
        console.print(f"Without Audit: {problem}.")
        rules = tuple(rule for rule in rules if rule != AUDIT)
    parts = lcm(*(code_for(rule, n, s).parts for rule in rules))
    batch_size = config.batch_size
    if not asked("batch_size"):
        batch_size = max(parts, batch_size // parts * parts)
    if batch_size % parts or batch_size > TRAIN_SAMPLES:
        raise click.UsageError(
            f"--batch-size must be a multiple of {parts}, so that parts are even, and at most {TRAIN_SAMPLES}, "
            f"got {batch_size}"
        )
    if batch_size != config.batch_size:
        console.print(f"With --batch-size {batch_size}: it must be a multiple of {parts}, so that parts are even.")
    return dataclasses.replace(config, rules=rules, batch_size=batch_size)


def _check_workers(workers: int, adversaries: int) -> None:
    """Raise a one-line error if no code can have these numbers of workers."""
    if adversaries < 0:
        raise click.UsageError(f"--adversaries must be at least 0, got {adversaries}")
    needed = 2 * adversaries + 1
    if workers < needed:
        raise click.UsageError(
            f"n >= 2s+1 workers are needed: {needed} --workers for {adversaries} --adversaries, got {workers}"
        )
    try:
        for rule in CODES:
            code_for(rule, workers, adversaries)
    except ValueError as error:
        raise click.UsageError(str(error)) from error


def _learns(config: Config) -> bool:
    """Return whether the net is known to learn well with these settings."""
    used = dataclasses.replace(config, momentum=config.momentum or config.worker_momentum)
    return config.steps >= LEARNING.steps and all(
        getattr(used, name) == value for name, value in LEARNING._asdict().items() if name != "steps"
    )


def _run_with_progress(config: Config, console: Console) -> list[Outcome]:
    """Run the comparison under a progress bar."""
    trainings = list_trainings(config)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} steps"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("starting the workers", total=len(trainings) * config.steps)

        def on_step(training: Training) -> None:
            progress.update(task, advance=1, description=train_report.describe(training))

        try:
            return run(config, on_step)
        except (
            ProcessRaisedException,
            ProcessExitedException,
        ) as error:
            raise click.ClickException(f"a process of the training stopped: {error}") from error
        except ConnectionError as error:
            raise click.ClickException(str(error)) from error


def _network_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of `network_model.Network` to a command."""
    options = (
        click.option("--latency", type=SECONDS, default="20us", help="Time of a short message from rank to rank."),
        click.option("--bandwidth", type=BYTES_PER_SECOND, default="25GB/s", help="Of a rank's link, each way."),
        click.option("--overhead", type=SECONDS, default="1us", help="Time that each message costs its sender."),
        click.option("--memory", type=BYTES_PER_SECOND, default="50GB/s", help="Speed of digests and of decoding."),
        click.option("--tree", is_flag=True, help="Collectives wait as in a tree, not as in a ring."),
    )
    for option in reversed(options):
        command = option(command)
    return command


@draco.command(context_settings={"show_default": True})
@click.option("--workers", type=Count(), required=True, help="Number of workers, n.")
@click.option("--adversaries", type=Count(), required=True, help="Bad workers to survive, s.")
@click.option("--parameters", type=Count(1), help="Size of the model, d: print what each code costs.")
@click.option(
    "--dtype",
    type=click.Choice([*planning.ITEM_BYTES]),
    default="float32",
    help="What gradients are sent in.",
)
@click.option(
    "--batch-size",
    type=Count(1),
    help="Samples in a rank's mini-batch of the script as it is: print what becomes of it.",
)
@click.option(
    "--learning-rate",
    type=click.FloatRange(0, inf, min_open=True, max_open=True),
    help="Learning rate of the script as it is; with --batch-size.",
)
@click.option("--samples", type=Count(1), help="Size of the data set; with --batch-size.")
@click.option(
    "--audit",
    "audit_rate",
    type=click.FloatRange(0, 1, min_open=True),
    help="Rate of draco_ext.Audit, to see it beside the codes.",
)
@click.option("--compression", type=Count(1), help="Compression of draco_ext.SolonCode, to see it beside the codes.")
@click.option("--colluders", type=Count(1), help="Print what up to so many colluders spoil, by placement of the parts.")
@_network_options
def plan(
    workers: int,
    adversaries: int,
    parameters: int | None,
    dtype: str,
    batch_size: int | None,
    learning_rate: float | None,
    samples: int | None,
    audit_rate: float | None,
    compression: int | None,
    colluders: int | None,
    **network: Any,
) -> None:
    """Print what each code costs at this size, what it cannot survive, and what becomes of a script's batches.

    With --parameters what each code costs, and a model of the bytes and the time of a step's exchange in a network of
    the given speed; with --batch-size what becomes of a script's batch size, learning rate and number of steps. With
    --audit also what it costs to recompute parts in some steps only, and how many wrong updates that lets pass. With
    --compression also the code whose messages are so many times shorter, for servers that cannot ask back. With
    --colluders how many parts of a batch more than s colluders spoil; this tries all sets of them.
    """
    _check_workers(workers, adversaries)
    if parameters is None and batch_size is None and colluders is None:
        raise click.UsageError(
            "plan needs --parameters for the costs, --batch-size for the batches, or --colluders for what they spoil"
        )
    if colluders is not None and colluders > workers:
        raise click.UsageError(f"--colluders must be at most the {workers} workers, got {colluders}")
    for option, value in (("--learning-rate", learning_rate), ("--samples", samples)):
        if batch_size is None and value is not None:
            raise click.UsageError(f"{option} needs --batch-size")
    if learning_rate is not None and not isfinite(learning_rate):
        raise click.UsageError(f"--learning-rate must be finite, got {learning_rate}")
    if compression is not None and workers < 2 * adversaries + compression:
        most = workers - 2 * adversaries
        raise click.UsageError(f"--compression must be at most workers - 2 * adversaries = {most}, got {compression}")
    tables = []
    try:
        if parameters is not None:
            tables.append(planning.make_table(workers, adversaries, parameters, dtype, audit_rate, compression))
        if batch_size is not None:
            tables.append(
                planning.make_batch_table(workers, adversaries, batch_size, learning_rate, samples, audit_rate)
            )
    except ValueError as error:
        raise click.UsageError(f"--audit: {error}") from error
    if parameters is not None:
        item, speeds = planning.ITEM_BYTES[dtype], network_model.Network(**network)
        tables.append(network_model.make_table(workers, adversaries, parameters, item, speeds, compression))
    if colluders is not None:
        tables.append(planning.make_collusion_table(workers, adversaries, colluders))
    console = Console()
    for table in tables:
        console.print(table)


@draco.command(context_settings={"show_default": True})
@click.option("--workers", type=Count(2), default=3, help="Ranks to start on this machine; not for torchrun.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with versions and the build, as for an issue.")
def doctor(workers: int, as_json: bool) -> None:
    """Test whether ranks compute the same bits.

    Every rank computes the gradient of the same batch twice. The repetition code accuses ranks that differ in a bit,
    so honest ranks must not differ. If gradients differ, the exit status is 1, and the output says where, and which
    setting may help. For the ranks of a real job: torchrun ... -m draco_ext.cli doctor. For your own model:
    Guard.self_test.
    """
    console = Console()
    try:
        diagnosis = doctors.diagnose(workers)
    except (ProcessRaisedException, ProcessExitedException) as error:
        raise click.ClickException(f"a rank stopped: {error}") from error
    except ConnectionError as error:
        raise click.ClickException(str(error)) from error
    if _speaks() and as_json:
        click.echo(json.dumps(doctors.as_json(diagnosis), indent=1))
    elif _speaks():
        console.print(doctors.make_table(diagnosis.facts))
        colour = "green" if diagnosis.result.reproducible else "red"
        console.print(f"[{colour}]{diagnosis.result}[/{colour}]", soft_wrap=True)
    if not diagnosis.result.reproducible:
        raise SystemExit(1)


@draco.command()
@click.argument("ledgers", nargs=-1, required=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option(
    "--picture",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Draw it over the steps into this file; its ending says the format.",
)
def report(ledgers: tuple[str, ...], as_json: bool, picture: Path | None) -> None:
    """Tell from the ledgers of a job who was bad, where, how often and since when.

    LEDGERS are the files that protect(..., ledger="bad.jsonl") has written: one file, or one for each rank.
    bad-{rank}.jsonl stands for the files of all ranks. A finding that is in several files counts once.
    """
    console = Console()
    try:
        found = ledger_report.read(ledgers)
    except OSError as error:
        raise click.ClickException(
            f"cannot read {error.filename}: {error.strerror}" if error.strerror else str(error)
        ) from error
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    if as_json:
        click.echo(json.dumps(ledger_report.as_json(found), indent=1))
    elif found.ranks:
        console.print(ledger_report.make_table(found))
    else:
        console.print("Nothing was found of any rank.")
    if picture is not None and found.ranks:
        try:
            ledger_report.draw(picture, found)
        except (OSError, ValueError) as error:
            raise click.UsageError(f"--picture {picture}: {getattr(error, 'strerror', None) or error}") from error


@draco.command(context_settings={"show_default": True})
@click.argument("suites", nargs=-1, type=click.Choice([*bench_suites.SUITES, "all"]))
@click.option("--workers", type=Count(5), default=45, help="Messages, n: decode.")
@click.option("--parameters", type=Count(1000), default=10**7, help="Elements, d: decode and kernels.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", help="Where: decode and paper.")
@click.option("--peers/--no-peers", default=True, help="With the libraries that people install: decode.")
@click.option(
    "--seed",
    "seeds",
    multiple=True,
    type=_SEED,
    default=SEEDS,
    help="Seed of data, net and attacks; may be repeated: neighbours.",
)
@click.option("--quick", is_flag=True, help="Few steps, to see that it runs: neighbours.")
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("draco-bench"),
    help="Folder for each suite's JSON, Markdown and picture.",
)
def bench(suites: tuple[str, ...], output: Path, **options: Any) -> None:
    """Measure decoders and compare them with what people use instead.

    \b
    decode      decoders, robust averages and other libraries
    kernels     every kernel beside its yardstick
    scaling     time per byte for growing sizes
    paper       the paper's comparison, on gradients of the sizes of its models
    accuracy    time to accuracy under attack
    neighbours  other methods that learn in spite of bad workers: accuracy, bytes, compute, guarantees
    all         all of them

    Without a name: decode. Every call alternates with a yardstick, usually one read of the same messages. A rule that
    cannot run is reported. To install the other libraries: pip install "draco_ext[bench]".
    """  # noqa: D301, since a raw docstring would show click's mark for lines that stay as they are
    console = Console()
    if options["device"] == "cuda" and not (torch.cuda.is_available() and build_info()["cuda"]):
        raise click.UsageError("--device cuda needs a CUDA device and a draco_ext built with CUDA")
    _make_folder(output)
    keep_memory()
    chosen = [*bench_suites.SUITES] if "all" in suites else list(dict.fromkeys(suites)) or ["decode"]
    for suite in chosen:
        jobs = list(bench_suites.SUITES[suite](bench_suites.Options(**options)))
        rows = _measure(jobs, console)
        cuda = rows[0].report == "cuda"
        kind = bench_report.REPORTS[rows[0].report]
        console.rule(kind.title)
        lines = [bench_report.facts(cuda), kind.legend, *([] if kind.wraps else bench_report.table(rows))]
        for line in lines:
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        if kind.wraps:
            console.print(bench_report.wrapped_table(rows))
        with _writing_to(output):
            files = bench_report.write(output, rows)
        console.print(f"Wrote {', '.join(map(str, files))}", soft_wrap=True)


def _measure(jobs: list[bench_suites.Job], console: Console) -> list[bench_report.Row]:
    """Run jobs one after another under a progress bar."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
        task = progress.add_task("", total=len(jobs))
        rows = []
        for job in jobs:
            progress.update(task, description=job.label)
            rows += job.run()
            progress.advance(task)
        return rows
