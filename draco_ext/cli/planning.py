"""The cost of each code at a given size, for ``draco plan``."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from rich.table import Table

from draco_ext.codes import Code, CyclicCode, RepetitionCode
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
        sent: the bytes that all ranks together send per step, by transport, without digests and projections, which are
            at most about 1e-3 of them.
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
            "allreduce": _all_reduced(code) * gradient,
            "allgather": n * (n - 1) * message,
            "server": (n - 1) * (message + gradient),
        },
        messages=n * message + gradient,
        amplification=code.noise_amplification() if code.exact or n <= _MOST_WORKERS_ANALYSED else None,
    )


def _all_reduced(code: Code) -> int:
    """Return the number of gradients that all ranks together send in the all-reduce; see `AllReduceRepetition`."""
    n, groups = code.workers, code.parts
    if not code.message_is_gradient:
        return 2 * (n - 1)
    return 0 if groups == 1 else 2 * (groups - 1) + n - groups


def make_table(workers: int, adversaries: int, parameters: int, dtype: str) -> Table:
    """Return a table of the costs of both codes, side by side."""
    n, s = workers, adversaries
    repetition, cyclic = RepetitionCode(n, s), CyclicCode(n, s)
    codes = [repetition, cyclic]
    costs = [cost(code, parameters, dtype) for code in codes]
    table = Table(
        title=f"{n} workers, {s} of them bad, {parameters:,} parameters in {dtype}",
        title_style="bold",
        show_lines=True,
        caption="Sent: by all ranks together, in protect's transports. "
        "Neither code survives a lying server, poisoned data, or a bug that all workers share.",
    )
    table.add_column("")
    table.add_column("repetition code")
    table.add_column("cyclic code")
    table.add_row("who computes what", _groups(repetition), _supports(cyclic))
    rows = [
        ("compute per worker", [f"{c.compute:.3g}x plain data-parallel" for c in costs]),
        ("sent per step, plain data-parallel", [_bytes(2 * (n - 1) * parameters * ITEM_BYTES[dtype])] * 2),
        *((f"sent per step, {name}", [_bytes(c.sent[name]) for c in costs]) for name in TRANSPORTS),
        ("all messages and the result", [_bytes(c.messages) for c in costs]),
        (
            "noise amplification",
            [_amplification(code, c.amplification) for code, c in zip(codes, costs, strict=True)],
        ),
    ]
    for name, cells in rows:
        table.add_row(name, *cells)
    table.add_row("cannot survive", _repetition_limits(repetition), _cyclic_limits(cyclic, dtype))
    return table


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


def _too_many(code: Code) -> str:
    return f"more than {code.adversaries} bad workers" if code.adversaries else "any bad worker"


def _repetition_limits(code: RepetitionCode) -> str:
    return (
        f"{_too_many(code)} in one group; honest members that differ in a bit "
        "(other hardware, nondeterministic kernels) unless decode is given a tolerance"
    )


def _cyclic_limits(code: CyclicCode, dtype: str) -> str:
    limits = (
        f"{_too_many(code)} anywhere. Errors near rounding, some 1e-6 of a message, stay in the "
        "gradient at that size, and whoever sent them is not named"
    )
    if dtype not in _CYCLIC_DTYPES:
        limits = f"{dtype} messages: it needs {' or '.join(_CYCLIC_DTYPES)}; {limits}"
    return limits
