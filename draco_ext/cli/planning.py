"""The cost of each code at a given size, for ``draco plan``."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from rich.table import Table

from draco_ext.cli.network_model import buckets, traffic
from draco_ext.codes import Audit, ByzShieldCode, Code, CyclicCode, RepetitionCode, SolonCode
from draco_ext.codes.audit import FIRST_STEPS
from draco_ext.codes.collusion import worst_colluders
from draco_ext.protocol.transports import TRANSPORTS

ITEM_BYTES = {"float32": 4, "float64": 8, "float16": 2, "bfloat16": 2}
_CYCLIC_DTYPES = ("float32", "float64")
# With more workers, the code's n x n tables take too long to compute for an overview.
_MOST_WORKERS_ANALYSED = 1024


@dataclass(frozen=True)
class Cost:
    """The cost of one code at one size.

    Attributes:
        compute: the number of samples that a worker computes, in multiples of plain data-parallel training's.
        sent: the bytes of messages and gradients that all ranks together send per step, by transport that takes the
            code. What is added to
            verify them is in the table of `draco_ext.cli.network_model`.
        messages: the bytes of all messages and the decoded gradient, for a rank that decodes them at once.
        amplification: the amplification of the messages' rounding noise; None if not computed.
    """

    compute: float
    sent: dict[str, int]
    messages: int
    amplification: float | None


def cost(code: Code, parameters: int, dtype: str) -> Cost:
    """Return the cost of a code for a model of this many parameters."""
    item = ITEM_BYTES[dtype]
    n, gradient, message = code.workers, parameters * item, code.message_length(parameters) * item
    return Cost(
        compute=len(code.assignment(0)) * n / code.parts,
        sent={
            name: traffic(code, name, buckets(parameters, item), item).payload
            for name in (TRANSPORTS if code.blocks == 1 else ("server",))
        },
        messages=n * message + gradient,
        amplification=code.noise_amplification() if code.exact or n <= _MOST_WORKERS_ANALYSED else None,
    )


def make_table(
    workers: int,
    adversaries: int,
    parameters: int,
    dtype: str,
    audit_rate: float | None = None,
    compression: int | None = None,
) -> Table:
    """Return a table of the costs of both codes side by side.

    Args:
        workers: n.
        adversaries: s.
        parameters: the size of the model.
        dtype: of gradients.
        audit_rate: the rate of an Audit that stands beside them.
        compression: the compression of Solon's code that stands beside them.

    Raises:
        ValueError: a code, or Audit, cannot have these arguments.
    """
    n, s = workers, adversaries
    repetition, cyclic = RepetitionCode(n, s), CyclicCode(n, s)
    columns = {
        "repetition code": {
            "who computes what": _groups(repetition),
            **_costs(repetition, parameters, dtype),
            "what holds": f"{_few_enough(s)} in a group: every gradient is right, to the last bit",
            "cannot survive": _repetition_limits(repetition),
        },
        "cyclic code": {
            "who computes what": _supports(cyclic),
            **_costs(cyclic, parameters, dtype),
            "what holds": f"{_few_enough(s)}: every gradient is right, up to rounding",
            "cannot survive": _cyclic_limits(cyclic, dtype),
        },
    }
    if compression is not None:
        solon = SolonCode(n, s, compression)
        columns[f"Solon's code, k = {compression}"] = {
            "who computes what": _supports(solon),
            **_costs(solon, parameters, dtype),
            "what holds": f"{_few_enough(s)}: every gradient is right, up to rounding, from one round of messages that "
            f"are {compression} times shorter",
            "cannot survive": _cyclic_limits(solon, dtype),
        }
    if audit_rate is not None:
        columns[f"audit, rate {audit_rate:g}"] = _audit(Audit(n, s, audit_rate), parameters, dtype)
    table = Table(
        title=f"{n} workers, {s} of them bad, {parameters:,} parameters in {dtype}",
        title_style="bold",
        show_lines=True,
        caption="Sent: by all ranks together, in protect's transports. "
        "Nothing here survives a lying server, poisoned data, or a bug that all workers share.",
    )
    table.add_column("")
    for name in columns:
        table.add_column(name)
    for row in columns["repetition code"]:
        table.add_row(row, *(cells[row] for cells in columns.values()))
    return table


@dataclass(frozen=True)
class Batches:
    """The batches of one way to train.

    Attributes:
        mini_batch: the samples in a mini-batch of a rank.
        mini_batches: the mini-batches of a rank in a step.
        global_batch: the samples in a step.
    """

    mini_batch: int
    mini_batches: int
    global_batch: int


def batches(workers: int, adversaries: int, batch_size: int, audit_rate: float | None = None) -> dict[str, Batches]:
    """Return what becomes of a DistributedDataParallel script's batches, by way to train.

    Args:
        workers: n.
        adversaries: s.
        batch_size: the samples in a rank's mini-batch of the plain script.
        audit_rate: the rate of an audit; None: without an audit.
    """
    n, s, b = workers, adversaries, batch_size
    parts = RepetitionCode(n, s).parts
    ways = {
        "plain DDP": Batches(b, 1, n * b),
        "repetition, batch per rank kept": Batches(b, 1, parts * b),
        "repetition, global batch kept": Batches(n * b // parts, 1, n * b // parts * parts),
        "cyclic, global batch kept": Batches(b, len(CyclicCode(n, s).assignment(0)), n * b),
    }
    if audit_rate is not None:
        Audit(n, s, audit_rate)
        ways[f"audit, rate {audit_rate:g}"] = Batches(b, 1, n * b)
    return ways


def make_batch_table(
    workers: int,
    adversaries: int,
    batch_size: int,
    learning_rate: float | None = None,
    samples: int | None = None,
    audit_rate: float | None = None,
) -> Table:
    """Return a table of what becomes of a script's batch size, learning rate and number of steps.

    Args:
        workers: n.
        adversaries: s.
        batch_size: the samples in a rank's mini-batch of the plain script.
        learning_rate: the plain script's.
        samples: the size of the data set.
        audit_rate: the rate of an audit, to see it beside the codes.

    Raises:
        ValueError: a code, or Audit, cannot have these arguments.
    """
    ways = batches(workers, adversaries, batch_size, audit_rate)
    plain = ways["plain DDP"].global_batch
    table = Table(
        title=f"A script with mini-batches of {batch_size:,} on {workers} workers, {adversaries} of them bad",
        title_style="bold",
        caption="A smaller global batch needs a lower learning rate: in proportion with SGD, by the square root with "
        "Adam, as rules of thumb. Schedules and warm-ups that count steps grow with the steps in an epoch. If a larger "
        "mini-batch does not fit into memory, accumulate gradients over several.",
    )
    columns: dict[str, list[str]] = {
        "": list(ways),
        "a rank's samples in a step": [
            f"{way.mini_batches} x {way.mini_batch:,}" if way.mini_batches > 1 else f"{way.mini_batch:,}"
            for way in ways.values()
        ],
        "global batch": [f"{way.global_batch:,}" for way in ways.values()],
    }
    if samples is not None:
        columns["steps in an epoch"] = [f"{math.ceil(samples / way.global_batch):,}" for way in ways.values()]
    if learning_rate is not None:
        shares = [way.global_batch / plain for way in ways.values()]
        columns["learning rate, SGD"] = [f"{learning_rate * share:.4g}" for share in shares]
        columns["learning rate, Adam"] = [f"{learning_rate * math.sqrt(share):.4g}" for share in shares]
    for name in columns:
        table.add_column(name)
    for row in zip(*columns.values(), strict=True):
        table.add_row(*row)
    return table


def make_collusion_table(workers: int, adversaries: int, colluders: int) -> Table:
    """Return a table of the share of a batch that colluders spoil, more than s of them included, by placement.

    Args:
        workers: n.
        adversaries: s.
        colluders: the largest number of colluders.

    Raises:
        ValueError: a code cannot have these arguments.
    """
    n, s = workers, adversaries
    groups = RepetitionCode(n, s)
    placements: dict[str, Code | str] = {"groups (DETOX)": groups}
    try:
        placements["lines of a plane (ByzShield)"] = ByzShieldCode(n, s)
    except ValueError as error:
        placements["lines of a plane (ByzShield)"] = f"not offered: {error}"
    table = Table(
        title=f"What colluders spoil of a batch: {n} workers, votes that correct {s} bad",
        title_style="bold",
        caption="Votes on so many parts are lost, if the colluders are those that spoil most. A second stage (beyond=) "
        "bounds the gradient while it is less than half of the parts.",
    )
    table.add_column("colluders", justify="right")
    table.add_column("one part each", justify="right")
    for name in placements:
        table.add_column(name, justify="right")
    for count in range(colluders + 1):
        cells = []
        for code in placements.values():
            if isinstance(code, str):
                cells.append(code if count == 0 else "")
            else:
                spoilt = len(code.distorted_parts(worst_colluders(code, count)))
                cells.append(f"{spoilt} of {code.parts} ({100 * spoilt / code.parts:.3g}%)")
        table.add_row(f"{count}", f"{count} of {n} ({100 * count / n:.3g}%)", *cells)
    return table


def _costs(code: Code, parameters: int, dtype: str) -> dict[str, str]:
    """Return a code's cells in the rows of costs."""
    costs = cost(code, parameters, dtype)
    return {
        "compute per worker": f"{costs.compute:.3g}x plain data-parallel",
        "sent per step, plain data-parallel": _bytes(_sent_by_plain(code.workers, parameters, dtype)),
        **{
            f"sent per step, {name}": _bytes(costs.sent[name]) if name in costs.sent else "not offered"
            for name in TRANSPORTS
        },
        "all messages and the result": _bytes(costs.messages),
        "noise amplification": _amplification(code, costs.amplification),
        "wrong updates before a bad worker is named": "0" if code.exact else "0, but for errors near rounding",
    }


def _sent_by_plain(workers: int, parameters: int, dtype: str) -> int:
    """Return the bytes that all ranks together send in a ring all-reduce of one gradient."""
    return 2 * (workers - 1) * parameters * ITEM_BYTES[dtype]


def _audit(audit: Audit, parameters: int, dtype: str) -> dict[str, str]:
    """Return Audit's cell in each row of the table."""
    n, s = audit.workers, audit.adversaries
    plain = _bytes(_sent_by_plain(n, parameters, dtype))
    chance, auditors = f"{100 * audit.rate:.3g}%", f"{s} other worker{'s' if s > 1 else ''}"
    beginning = f"; once {audit.cost(0, FIRST_STEPS) * FIRST_STEPS:.4g} passes more in the first {FIRST_STEPS} steps"
    beginning += ", one less with FSDP2"
    if audit.rate == 1:
        when, audited, updates, once = "every step", "gradient", "0", ""
        beginning = ""
    else:
        when, audited = f"the first {FIRST_STEPS} steps and {chance} of the others", "audited gradient"
        updates = (
            f"0 if it is wrong in the first step; else {audit.expected_wrong_updates():.4g} expected, at most "
            f"{audit.wrong_updates_quantile(0.99):,} with a "
            "probability of 99%, however rarely it is wrong; fewer if its errors trigger audits"
        )
        once = f"a fault that occurs once: corrected with a probability of {chance} only; "
    return {
        "who computes what": f"{n} parts, a worker each; in {when} each part again by {auditors}",
        "compute per worker": f"{1 + audit.cost():.4g}x plain data-parallel, with false triggers in 0.1% of steps"
        + beginning,
        "sent per step, plain data-parallel": plain,
        **dict.fromkeys((f"sent per step, {name}" for name in TRANSPORTS), "not offered"),
        "sent per step, allreduce": f"{plain}, and if it is audited each part's inputs to {auditors}",
        "all messages and the result": "none are kept",
        "noise amplification": "1: the gradient has plain data-parallel's bits",
        "wrong updates before a bad worker is named": updates,
        "what holds": f"{_few_enough(s)}: every {audited} is right, to the last bit, or its step fails",
        "cannot survive": f"{once}{_too_many(s)} in a step; workers that lie about what they communicate; a fault in "
        "adding gradients up, or in the sum that a worker receives; honest workers that differ in a bit unless there "
        "is a tolerance",
    }


def _groups(code: RepetitionCode) -> str:
    """Return the groups as ranges of workers."""
    last = np.cumsum(code.group_sizes)
    ranges = [
        f"{end - size} to {end - 1}" if size > 1 else f"{end - 1}"
        for end, size in zip(last, code.group_sizes, strict=True)
    ]
    shown = ", ".join(ranges[:4]) + (f", ... {ranges[-1]}" if len(ranges) > 4 else "")
    if code.parts == 1:
        return f"1 group computes the whole batch: workers {shown}"
    return f"{code.parts} groups, a part each: workers {shown}"


def _supports(code: CyclicCode) -> str:
    """Return the supports as offsets from the part's number."""
    offsets = [str(int(offset)) for offset in code.supports[0]]
    shown = ", ".join(offsets[:8]) + (f", ... {offsets[-1]}" if len(offsets) > 8 else "")
    return f"{code.parts} parts; part k by the workers k + {{{shown}}} mod {code.workers}"


def _bytes(count: int) -> str:
    """Return a size both rounded with a unit and exactly."""
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    exact = f"{count:,} B"
    return exact if unit == "B" else f"{value:.4g} {unit} ({exact})"


def _amplification(code: Code, amplification: float | None) -> str:
    if amplification is None:
        return f"not computed above {_MOST_WORKERS_ANALYSED} workers"
    if code.exact:
        return "1: a vote passes bits on"
    return f"{amplification:.3g} at worst, bad workers adjacent"


def _few_enough(adversaries: int) -> str:
    return f"with at most {adversaries} bad worker{'' if adversaries == 1 else 's'}"


def _too_many(adversaries: int) -> str:
    return f"more than {adversaries} bad workers" if adversaries else "any bad worker"


def _repetition_limits(code: RepetitionCode) -> str:
    return (
        f"{_too_many(code.adversaries)} in one group; honest members that differ in a bit "
        "(other hardware, nondeterministic kernels) unless decode is given a tolerance"
    )


def _cyclic_limits(code: CyclicCode, dtype: str) -> str:
    limits = (
        f"{_too_many(code.adversaries)} anywhere. Errors near rounding, some 1e-6 of a message, stay in the "
        "gradient at that size, and whoever sent them is not named"
    )
    if dtype not in _CYCLIC_DTYPES:
        limits = f"{dtype} messages: it needs {' or '.join(_CYCLIC_DTYPES)}; {limits}"
    return limits
