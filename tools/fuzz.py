"""A fuzzer that calls all public functions with wrong arguments: `python tools/fuzz.py --calls 1000000`.

A call depends on the seed and its number only. It is a valid call in which none, some or all arguments are replaced.
It must return a result, or raise a TypeError or ValueError whose message begins with the argument's name. Calls to
`torch.ops.draco_ext`, which bypass the checks in Python, may raise anything. No input may change. A child process makes
the calls, so that a crash or an endless loop is reported with the number of the call, and the other calls still run.
"""

from __future__ import annotations

import contextlib
import ctypes
import decimal
import enum
import mmap
import random
import re
import struct
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import click
import numpy as np
import torch

import draco_ext
from draco_ext import CyclicCode, RepetitionCode, ops

PATIENCE = 60.0  # seconds after which a call counts as endless
IMPORTING = 120.0  # seconds for the imports before the first call
SIZES = (0, 1, 1, 2, 3, 5, 6, 7, 8, 9, 15, 33, 64, 130)
DTYPES = sorted({v for v in vars(torch).values() if isinstance(v, torch.dtype)}, key=str)


# ------------------------------------------------------------------------------------------------------ values


class Plain(torch.Tensor):
    """A subclass that behaves like a Tensor."""


class Stubborn(torch.Tensor):
    """A subclass for which no function is defined."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return NotImplemented


class Number(enum.IntEnum):
    """A subclass of int."""

    THREE = 3


def floats(draw: random.Random, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return random bits (which may be NaN) half of the time, otherwise ordinary numbers."""
    generator = torch.Generator().manual_seed(draw.getrandbits(40))
    if dtype.is_complex or draw.random() < 0.5:
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        return values.to(dtype) * 10.0 ** draw.choice((-40, -4, 0, 0, 0, 9))
    count = int(np.prod(shape))
    return (
        torch.randint(0, 256, (count * dtype.itemsize,), generator=generator, dtype=torch.uint8).view(dtype).view(shape)
    )


def arrange(draw: random.Random, t: torch.Tensor) -> torch.Tensor:
    """Return a tensor of the same shape, possibly with another layout in memory."""
    kind = draw.randrange(9)
    if kind == 0 and t.dim() >= 2:
        return t.transpose(0, 1).contiguous().transpose(0, 1)
    if kind == 1 and t.numel():
        return t[:1].expand(t.shape) if t.dim() else t
    if kind == 2 and t.dim():
        wide = torch.zeros((*t.shape[:-1], t.size(-1) + 5), dtype=t.dtype)
        wide[..., 3:-2] = t
        return wide[..., 3:-2]
    if kind == 3 and t.dim():
        return torch.stack([t, t], 1)[:, 0]  # every other row
    if kind == 4 and t.dim():
        return torch.stack([t, t], -1)[..., 0]  # every other element
    if kind == 5:  # dimensions of size 0 or 1 may have any stride
        huge = draw.choice((2**31, 2**40, 2**60))
        strides = [huge if size <= 1 else stride for size, stride in zip(t.shape, t.stride(), strict=True)]
        return t.as_strided(t.shape, strides) if t.numel() else t
    if kind == 6 and t.dim() == 2 and t.numel():  # rows that overlap
        return t.flatten().as_strided(t.shape, (draw.choice((0, 1)), 1))
    return t


def disguise(draw: random.Random, t: torch.Tensor) -> torch.Tensor:
    """Return the tensor in a form that few functions expect."""
    kind = draw.randrange(14)
    if kind == 0:
        return t.to("meta")
    if kind == 1:
        return t.to_sparse() if t.dim() else t
    if kind == 2:
        return t.to_sparse_csr() if t.dim() == 2 else t
    if kind == 3:
        return torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8)
    if kind == 4:
        return t.as_subclass(Plain)
    if kind == 5:
        return t.as_subclass(Stubborn)
    if kind == 6:
        return torch.nn.Parameter(t, requires_grad=draw.random() < 0.5)
    if kind == 7:
        return t.clone().requires_grad_()
    if kind == 8:  # a view with the negative bit set
        return torch.complex(t, t).conj().imag
    if kind == 9:
        return torch.zeros(t.numel() + 4, dtype=t.dtype)[4:].view(t.shape)
    if kind == 10 and t.dim() >= 2:
        return torch.nested.nested_tensor(list(t), layout=draw.choice((torch.strided, torch.jagged)))
    if kind == 11:
        with torch.inference_mode():
            return t.clone()
    if kind == 12:
        return t.to_mkldnn()
    return t.conj()


def any_tensor(draw: random.Random) -> torch.Tensor:
    """Return a tensor of any dtype, shape, layout and form."""
    shape = tuple(draw.choice(SIZES) for _ in range(draw.choice((0, 1, 1, 2, 2, 2, 3, 4))))
    while np.prod(shape) > 20000:
        shape = shape[1:]
    dtype = draw.choice(DTYPES) if draw.random() < 0.5 else torch.float32
    try:
        t = arrange(draw, floats(draw, shape).to(dtype))
        return disguise(draw, t) if draw.random() < 0.5 else t
    except (RuntimeError, NotImplementedError, TypeError):  # there is no such tensor
        return floats(draw, shape)


def any_int(draw: random.Random) -> object:
    if draw.random() < 0.3:
        return draw.randrange(-3, 12)
    edges = (255, 511, 512, 32766, 32767, 32768, 2**31 - 1, 2**31, 2**62, 2**62 + 3, 2**63 - 1, 2**63, 2**64, 10**30)
    return draw.choice((1, 1, -1)) * (draw.choice(edges) + draw.choice((-1, 0, 0, 1)))


def any_float(draw: random.Random) -> object:
    edges = (0.0, -0.0, 1e-6, 0.5, 2, -1e-9, 1e39, 1e308, 5e-324, 10**99, 10**400, -(10**400))
    return draw.choice((*edges, float("nan"), float("inf"), -float("inf")))


def anything(draw: random.Random) -> object:
    """Return a value of any type."""
    kind = draw.randrange(16)
    if kind < 5:
        return any_tensor(draw)
    if kind < 7:
        return any_int(draw)
    if kind < 9:
        return any_float(draw)
    if kind == 9:
        return None
    if kind == 10:
        return draw.choice(("", "abc", "mean", "cpu", "é" * 50, b"3"))
    if kind == 11:
        return draw.choice((True, False, 1j, Number.THREE, decimal.Decimal(3), object(), int, torch.float32, ...))
    if kind == 12:
        return np.zeros(draw.choice(((), (2,), (3, 4))), draw.choice(("f4", "i8", "?")))[()]
    if kind == 13:
        return [anything(draw) for _ in range(draw.randrange(4))]
    if kind == 14:
        return tuple(draw.randrange(-1, 9) for _ in range(draw.randrange(4)))
    return draw.choice((iter(()), {}, {3: 3}, {3}, range(3), (i for i in (3, 3)), draco_ext.CyclicCode(3, 1)))


# ------------------------------------------------------------------------------------------------- valid calls


def some_code(draw: random.Random) -> draco_ext.Code:
    s = draw.choice((0, 1, 1, 2, 2, 3))
    return draw.choice((RepetitionCode, CyclicCode))(2 * s + 1 + draw.randrange(6), s)


def columns(draw: random.Random) -> int:
    return draw.choice((0, 2, 2, 8, 8, 16, 34, 130, 1026)) if draw.random() < 0.99 else ops.TILE + 2


def mask(draw: random.Random, n: int) -> torch.Tensor | None:
    if draw.random() < 0.5:
        return None
    bits = torch.tensor([draw.choice((0, 0, 0, 1, 255)) for _ in range(n)], dtype=torch.uint8).view(torch.bool)
    return arrange(draw, bits)


def matrix(draw: random.Random, n: int, length: int, dtypes=ops.CYCLIC_DTYPES) -> torch.Tensor:
    m = floats(draw, (n, length), draw.choice(dtypes))
    if draw.random() < 0.3:
        m[:] = m[:1].clone()  # all agree
    return arrange(draw, m)


def tolerance(draw: random.Random) -> float:
    return draw.choice((0.0, 0.0, 0, 1e-6, 1.0))


def vote_arguments(draw):
    code = RepetitionCode(draw.choice((3, 4, 5, 7, 9, 12)), 1)
    messages = matrix(draw, code.workers, columns(draw) + draw.randrange(2), ops.VOTE_DTYPES)
    sizes = draw.choice((tuple, list))(code.group_sizes)
    options = {"missing": mask(draw, code.workers), "atol": tolerance(draw), "rtol": tolerance(draw)}
    return {"messages": messages, "group_sizes": sizes, "adversaries": 1, **options, "mean": draw.random() < 0.5}


def digest_arguments(draw):
    length = columns(draw) + draw.randrange(2)
    return {"values": floats(draw, (length,), draw.choice(ops.DIGEST_DTYPES)), "seed": draw.getrandbits(64) - 2**63}


def digests_arguments(draw):
    return {**digest_arguments(draw), "seed": [draw.getrandbits(64) - 2**63 for _ in range(draw.randrange(4))]}


def stats_arguments(draw):
    length = columns(draw) + draw.randrange(2)
    return {"values": floats(draw, (length,), draw.choice(ops.VOTE_DTYPES)), "seed": draw.getrandbits(64) - 2**63}


def cyclic_sizes(draw):
    s = draw.choice((0, 1, 1, 2, 2, 3))
    return 2 * s + 1 + draw.randrange(6), s


def encode_arguments(draw):
    n, s = cyclic_sizes(draw)
    gradients = matrix(draw, 2 * s + 1, columns(draw) + draw.randrange(2))
    return {"gradients": gradients, "workers": n, "adversaries": s, "worker": draw.randrange(n)}


def encode_add_arguments(draw):
    n, s = cyclic_sizes(draw)
    worker, d, dtype = draw.randrange(n), columns(draw) + draw.randrange(2), draw.choice(ops.CYCLIC_DTYPES)
    part = draw.choice(CyclicCode(n, s).assignment(worker))
    length = d + d % 2
    vectors = {"message": length, "carry": length, "gradient": d}
    if draw.random() < 0.2:  # one memory, of which the three take parts that may overlap
        memory = floats(draw, (5 * length + 4,), dtype)
        at = [draw.choice((0, 1, d, length, length + 1)) for _ in vectors]
        begins = {"message": 0, "carry": at[0], "gradient": at[0] + at[1] if at[2] else at[1]}
        values = {name: memory[begins[name] : begins[name] + size] for name, size in vectors.items()}
    else:
        values = {name: floats(draw, (size,), dtype) for name, size in vectors.items()}
    return {**values, "workers": n, "adversaries": s, "worker": worker, "part": part, "first": draw.random() < 0.3}


def project_arguments(draw):
    n = draw.randrange(1, 12)
    seed = draw.getrandbits(64) - 2**63
    return {"messages": matrix(draw, n, columns(draw)), "seed": seed, "missing": mask(draw, n)}


def locate_arguments(draw):
    n, s = cyclic_sizes(draw)
    length = columns(draw)
    tiles, k = ops.projections_shape(length)
    if draw.random() < 0.5:
        projections, norms = ops.cyclic_project(matrix(draw, n, length).contiguous(), 1)
    else:  # that no messages have
        projections = torch.view_as_complex(floats(draw, (n, tiles, k, 2), torch.float64))
        norms = floats(draw, (n, tiles), torch.float64)
    options = {"missing": mask(draw, n), "dtype": draw.choice(ops.CYCLIC_DTYPES)}
    options |= {"atol": tolerance(draw), "rtol": tolerance(draw), "mean": draw.random() < 0.5}
    return {"projections": projections, "norms": norms, "adversaries": s, "length": length, **options}


def combine_arguments(draw):
    n, length = draw.randrange(1, 12), columns(draw)
    weights = floats(draw, (n,), torch.complex128)
    if draw.random() < 0.2:
        weights = weights.conj()
    length_of = draw.choice((None, length, max(0, length - 1)))
    return {"messages": matrix(draw, n, length), "weights": weights, "length": length_of}


def decode_cyclic_arguments(draw):
    n, s = cyclic_sizes(draw)
    length = columns(draw)
    options = {"missing": mask(draw, n), "expected": mask(draw, n), "length": draw.choice((None, length))}
    options |= {"atol": tolerance(draw), "rtol": tolerance(draw), "mean": draw.random() < 0.5}
    seed = draw.choice((None, 0, draw.getrandbits(64) - 2**63))
    return {"messages": matrix(draw, n, length), "adversaries": s, **options, "seed": seed}


def decode_arguments(draw):
    code = some_code(draw)
    length = columns(draw)
    dtypes = ops.VOTE_DTYPES if isinstance(code, RepetitionCode) else ops.CYCLIC_DTYPES
    options = {"missing": mask(draw, code.workers), "expected": mask(draw, code.workers)}
    options |= {"reduction": draw.choice(("mean", "sum")), "atol": tolerance(draw), "rtol": tolerance(draw)}
    return {"messages": matrix(draw, code.workers, length, dtypes), "code": code, **options, "length": None}


def code_encode_arguments(draw):
    code = some_code(draw)
    gradients = matrix(draw, len(code.assignment(0)), columns(draw) + draw.randrange(2))
    return {"code": code, "worker": draw.randrange(code.workers), "gradients": gradients}


def code_arguments(draw):
    s = draw.randrange(4)
    return {"workers": 2 * s + 1 + draw.randrange(5), "adversaries": s}


def encode(code, worker, gradients):
    return code.encode(worker, gradients)


def assignment(code, worker):
    return code.assignment(worker)


def message_length(code, d):
    return code.message_length(d)


# Planted, to see that each is noticed: only run where they are asked for.
def crash(number):
    return ctypes.string_at(0) if number == 7 else number


def hang(number):
    while number == 7:
        pass


def undocumented(number):
    return {}[number] if number == 7 else number


def unnamed(number):
    if number == 7:
        raise ValueError("it is wrong")


def change(messages):
    return messages.add_(1)


def leak(number, kept=[]):  # noqa: B006
    kept.append(bytearray(4096))


# name -> (function, what makes its arguments, arguments that are not spoilt)
TARGETS = {
    "majority_vote": (ops.majority_vote, vote_arguments, ()),
    "digest": (ops.digest, digest_arguments, ()),
    "digest of seeds": (ops.digest, digests_arguments, ()),
    "digest_and_stats": (ops.digest_and_stats, stats_arguments, ()),
    "cyclic_encode": (ops.cyclic_encode, encode_arguments, ()),
    "cyclic_encode_add_": (ops.cyclic_encode_add_, encode_add_arguments, ()),
    "cyclic_project": (ops.cyclic_project, project_arguments, ()),
    "cyclic_locate": (ops.cyclic_locate, locate_arguments, ()),
    "cyclic_combine": (ops.cyclic_combine, combine_arguments, ()),
    "cyclic_decode": (ops.cyclic_decode, decode_cyclic_arguments, ()),
    "projections_shape": (ops.projections_shape, lambda draw: {"length": columns(draw)}, ()),
    "decode": (draco_ext.decode, decode_arguments, ()),
    "encode": (encode, code_encode_arguments, ("code",)),
    "assignment": (assignment, lambda draw: {"code": some_code(draw), "worker": 0}, ("code",)),
    "message_length": (message_length, lambda draw: {"code": some_code(draw), "d": 0}, ("code",)),
    "RepetitionCode": (RepetitionCode, code_arguments, ()),
    "CyclicCode": (CyclicCode, code_arguments, ()),
}


def raw(function):
    """Call the op itself with the same arguments, without the checks in Python."""
    op = getattr(torch.ops.draco_ext, function.__name__)
    names = [argument.name for argument in op.default._schema.arguments]

    def call(**arguments):
        length = arguments.get("length", 0)
        if length is None:
            arguments["length"] = arguments["messages"].size(1)
        if "dtype" in arguments:
            arguments["float64"] = arguments.pop("dtype") == torch.float64
        if function is ops.digest and isinstance(arguments["seed"], int):
            arguments["seed"] = [arguments["seed"]]
        return op(*(arguments[name] for name in names))

    return call


RAW = {
    f"raw_{name}": (raw(function), make, ())
    for name, (function, make, _) in TARGETS.items()
    if hasattr(torch.ops.draco_ext, name)
}
EVERY = {**TARGETS, **RAW}
HIDDEN = {
    f"planted_{f.__name__}": (f, lambda draw: {"number": draw.randrange(5, 10)}, ("number",))
    for f in (crash, hang, undocumented, unnamed, leak)
} | {"planted_change": (change, lambda draw: {"messages": floats(draw, (3, 2))}, ("messages",))}


# ----------------------------------------------------------------------------------------------------- one call


class Bug(Exception):
    """A wrong result of a call."""


def spoil(draw: random.Random, arguments: dict[str, object], keep: tuple[str, ...]) -> None:
    """Replace none, some or all arguments by others, mostly of the same type."""
    names = [name for name in arguments if name not in keep]
    for name in draw.sample(names, min(len(names), draw.choice((0, 0, 1, 1, 1, 1, 2, 2, 20)))):
        old = arguments[name]
        if draw.random() < 0.4:
            arguments[name] = anything(draw)
        elif isinstance(old, torch.Tensor):
            shaken = draw.randrange(4)
            try:
                if shaken == 0:
                    arguments[name] = disguise(draw, old)
                elif shaken == 1:
                    arguments[name] = old.to(draw.choice(DTYPES))
                elif shaken == 2:
                    arguments[name] = draw.choice((old[:-1], old[:0], old[None], old[..., :-1], old.flatten()))
                else:  # the memory of another argument
                    others = [a for a in arguments.values() if type(a) is torch.Tensor and a.numel()]
                    others = [a for a in others if not a.is_quantized]  # torch crashes on views of these
                    arguments[name] = draw.choice(others).flatten()[: old.size(0)].view(old.dtype)
            except (RuntimeError, NotImplementedError, TypeError, IndexError):
                arguments[name] = any_tensor(draw)
        elif isinstance(old, bool) or old is None:
            arguments[name] = anything(draw)
        elif isinstance(old, int):
            arguments[name] = any_int(draw)
        elif isinstance(old, float):
            arguments[name] = any_float(draw)
        else:
            arguments[name] = anything(draw)


def memory(arguments: dict[str, object]) -> dict[str, torch.Tensor]:
    """Return the bytes in memory of each argument that is an ordinary tensor on the CPU."""
    found = {}
    for name, t in arguments.items():
        if type(t) in (torch.Tensor, Plain, torch.nn.Parameter) and t.is_cpu and t.layout == torch.strided:
            if t.is_nested or t.is_quantized:
                continue
            try:
                whole = torch.empty(0, dtype=torch.uint8).set_(t.detach().untyped_storage())
            except (RuntimeError, NotImplementedError):
                continue
            found[name] = whole
    return found


def describe(value: object) -> str:
    with torch._C.DisableTorchFunctionSubclass():
        if not isinstance(value, torch.Tensor):
            return repr(value)[:100]
        kind = f"{type(value).__name__} {value.dtype} {value.device} {value.layout} grad={value.requires_grad}"
        return f"<{kind}>" if value.is_nested else f"<{kind} {tuple(value.shape)} {layout_of(value)}>"


def layout_of(t: torch.Tensor) -> str:
    return f"{t.stride()}+{t.storage_offset()}" if t.layout == torch.strided else ""


def one_call(seed: int, number: int, names: tuple[str, ...]) -> str:
    """Make a call and return its outcome; raise Bug if it is wrong."""
    draw = random.Random(seed * 2**40 + number)
    name = draw.choice(names)
    function, make, keep = EVERY[name] if name in EVERY else HIDDEN[name]
    arguments = make(draw)
    spoil(draw, arguments, keep)
    before = {n: whole.clone() for n, whole in memory(arguments).items()}
    shown = " ".join(f"{name}({', '.join(f'{n}={describe(v)}' for n, v in arguments.items())})".split())
    outcome, error = "result", None
    try:
        function(**arguments)
    except Exception as raised:
        outcome, error = type(raised).__name__, raised
    after = memory(arguments)
    stubborn = any(isinstance(value, Stubborn) for value in arguments.values())
    if error is not None and not name.startswith("raw_"):
        said = " ".join(str(error).split())
        if not isinstance(error, (TypeError, ValueError)):
            raise Bug(f"{shown} raised {outcome}: {said}") from error
        if not stubborn and not any(re.match(rf"{n}\b", said) for n in arguments):
            raise Bug(f"{shown} raised a {outcome} that names no argument: {said}") from error
    written = set()
    if name.endswith("encode_add_") and (error is None or name.startswith("raw_")) and "message" in before:
        sums = {after[n].data_ptr() for n in ("message", "carry") if n in after}
        written = {n for n, whole in after.items() if whole.data_ptr() in sums}
    for n in before.keys() - written:
        if not torch.equal(before[n], after[n]):
            raise Bug(f"{shown} changed {n} ({outcome})")
    return outcome


# ---------------------------------------------------------------------------------------------------- processes


def child(seed: int, first: int, last: int, names: tuple[str, ...], progress: str) -> None:
    """Make the calls; write the number of the current one to the file `progress`, and bugs to the standard output."""
    torch.set_num_threads(2)
    warnings.simplefilter("ignore")
    outcomes: dict[str, int] = {}
    with open(progress, "r+b") as file, mmap.mmap(file.fileno(), 8) as at:
        for number in range(first, last):
            at[:] = struct.pack("<q", number)
            try:
                outcome = one_call(seed, number, names)
                outcomes[outcome] = outcomes.get(outcome, 0) + 1
            except Bug as bug:
                print(f"BUG call {number}: {bug}", flush=True)
    print("OUTCOMES", *(f"{name}={count}" for name, count in sorted(outcomes.items())), flush=True)


def run(seed: int, calls: int, names: tuple[str, ...], patience: float = PATIENCE) -> tuple[list[str], dict[str, int]]:
    """Return the bugs, each with the number of its call, and the number of times that each outcome occurred."""
    bugs: list[str] = []
    outcomes: dict[str, int] = {}
    first = 0
    with tempfile.NamedTemporaryFile() as progress, tempfile.TemporaryFile("w+") as output:

        def current() -> int:
            progress.seek(0)
            return struct.unpack("<q", progress.read(8))[0]

        while first < calls and len(bugs) < 50:
            arguments = ["--seed", str(seed), "--first", str(first), "--calls", str(calls), "--child", progress.name]
            for name in names:
                arguments += ["--target", name]
            progress.seek(0)
            progress.write(struct.pack("<q", -1))
            progress.flush()
            output.seek(0)
            output.truncate()
            process = subprocess.Popen(
                [sys.executable, __file__, *arguments], stdout=output, stderr=subprocess.STDOUT, text=True
            )
            seen, since = -2, time.monotonic()
            while process.poll() is None:
                time.sleep(0.05)
                now = current()
                if now != seen:
                    seen, since = now, time.monotonic()
                elif time.monotonic() - since > (IMPORTING if now < 0 else patience):
                    process.kill()
                    process.wait()
            output.seek(0)
            lines = output.read().splitlines()
            bugs += [line for line in lines if line.startswith("BUG ")]
            for line in lines:
                if line.startswith("OUTCOMES "):
                    for word in line.split()[1:]:
                        name, count = word.split("=")
                        outcomes[name] = outcomes.get(name, 0) + int(count)
            if process.returncode == 0:
                break
            what = "was endless" if process.returncode == -9 else f"crashed (exit status {process.returncode})"
            tail = "\n".join(line for line in lines[-40:] if not line.startswith(("BUG ", "OUTCOMES ")))
            bugs.append(f"BUG call {current()}: {what}\n{tail}")
            first = current() + 1
    return bugs, outcomes


def resident() -> int:
    """Return the resident memory of this process in bytes."""
    return int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def growth(seed: int, calls: int, names: tuple[str, ...], different: int = 1000) -> int:
    """Return the number of bytes by which the process has grown while it repeated the same calls."""
    warnings.simplefilter("ignore")
    numbers = []
    for number in range(different):
        with contextlib.suppress(Bug):  # bugs are ignored when memory is measured
            one_call(seed, number, names)
            numbers.append(number)
    start = 0
    for made in range(calls):
        if made == calls // 3:  # by then the allocators have reached their steady state
            start = resident()
        one_call(seed, numbers[made % len(numbers)], names)
    return resident() - start


@click.command()
@click.option("--calls", default=100_000, show_default=True, help="How many calls to make.")
@click.option("--seed", default=20180327, show_default=True, help="What they are drawn from.")
@click.option("--target", "targets", multiple=True, help="Only these functions.")
@click.option("--only", type=int, help="Only the call of this number, in this process.")
@click.option("--leaks", is_flag=True, help="Instead make few calls again and again and measure the memory.")
@click.option("--patience", default=PATIENCE, show_default=True, help="Seconds until a call counts as endless.")
@click.option("--first", default=0, hidden=True)
@click.option("--child", "progress", hidden=True)
def main(calls, seed, targets, only, leaks, patience, first, progress):
    """Call all public functions with wrong arguments; the exit status is 1 if there is a bug."""
    names = targets or tuple(EVERY)
    if unknown := [name for name in names if name not in EVERY and name not in HIDDEN]:
        raise click.BadParameter(f"no {unknown[0]}; there are {', '.join(EVERY)}")
    if progress is not None:
        child(seed, first, calls, names, progress)
    elif only is not None:
        click.echo(one_call(seed, only, names))
    elif leaks:
        grown = growth(seed, calls, names)
        click.echo(f"{calls} calls, grown by {grown / 2**20:.2f} MiB after the first third")
        sys.exit(grown > 2 * 2**20)
    else:
        start = time.monotonic()
        bugs, outcomes = run(seed, calls, names, patience)
        taken = time.monotonic() - start
        click.echo("\n".join(bugs))
        click.echo(f"{calls} calls in {taken:.0f} s, {calls / taken:.0f} a second, {len(bugs)} bugs; seed {seed}")
        click.echo(", ".join(f"{name} {count}" for name, count in sorted(outcomes.items())))
        sys.exit(bool(bugs))


if __name__ == "__main__":
    main()
