"""The suites of ``draco bench``, as jobs that yield rows."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

import draco_ext
from draco_ext import baselines, ops
from draco_ext.cli.bench import neighbours as methods
from draco_ext.cli.bench.report import Row
from draco_ext.cli.bench.timing import Clock, Timing, available_memory, compare, memory_limit, repeat
from draco_ext.cli.bench.workloads import (
    ONE_READ,
    Rule,
    Workload,
    cyclic_rules,
    others,
    part_gradient,
    relative_error,
    reversed_workers,
    votes,
    workload,
)
from draco_ext.cli.train_report import step_seconds
from draco_ext.cli.training import LEARNING, Config, Outcome, run
from draco_ext.testing.attacks import ATTACKS


@dataclass(frozen=True)
class Job:
    """A part of a suite."""

    label: str
    run: Callable[[], list[Row]]


@functools.lru_cache(maxsize=1)
def _built(load: Workload) -> Tensor:
    gc.collect()
    return load.build()


def decode(device: str, n: int, d: int, with_peers: bool) -> Iterator[Job]:
    """Yield jobs that compare decoders with robust averages on the messages of n workers."""
    clock = Clock(device)
    for rule in [ONE_READ, *others(n, with_peers), *votes(n), *cyclic_rules(n)]:
        yield Job(rule.name, functools.partial(_decode_row, rule, clock, device, n, d))


def _decode_row(rule: Rule, clock: Clock, device: str, n: int, d: int) -> list[Row]:
    load = workload(device, n, d, rule.code, rule.adversaries)
    row = Row("decode" if device == "cpu" else "cuda", n, d, rule.name, None, own=rule.own)
    if rule.peer is not None and (why := rule.peer.missing()):
        return [replace(row, note=why)]
    messages = _built(load)
    moved = messages.nbytes
    yardstick = messages.sum
    if device == "cuda":
        moved += d * messages.element_size()
        target = torch.empty(moved // 8, device=device)
        yardstick = functools.partial(target.copy_, messages.view(-1)[: len(target)])
    row = replace(row, bytes=moved)
    if rule.peer is None:
        error, timing = _measure(rule, clock, load, messages, yardstick)
        return [replace(row, seconds=timing.seconds, to_yardstick=timing.ratio, error=error)]
    try:
        with memory_limit():
            error, timing = _measure(rule, clock, load, messages, yardstick)
    except Exception as failure:  # other libraries' code may raise anything; the table shows it
        return [replace(row, note=f"failed: {str(failure).strip().splitlines()[0][:80]}")]
    distance = rule.peer.distance(n)
    note = f"{distance:.0e} from what it approximates" if distance > 1e-5 else ""
    return [replace(row, seconds=timing.seconds, to_yardstick=timing.ratio, error=error, note=note)]


def _measure(
    rule: Rule, clock: Clock, load: Workload, messages: Tensor, yardstick: Callable[[], object]
) -> tuple[float | None, Timing]:
    error = relative_error(rule, load.device, load.n)
    with reversed_workers(messages, rule.reversed, rule.late):
        return error, compare(clock, lambda: rule.apply(messages, load.code), yardstick)


# ---------------------------------------------------------------------------------------------------------- kernels


def same_messages(n: int, d: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the same message from every worker; with every code this is an honest set of messages.

    For the cyclic code this holds because the n-th roots of unity add up to 0.
    """
    gradient = part_gradient("cpu", 0, d).to(dtype)
    messages = torch.empty(n, d, dtype=dtype)
    for row in messages:
        row.copy_(gradient)
    return messages


KERNEL_ROUNDS = 21
# A call, its yardstick, and how many bytes the call reads.
Built = tuple[Callable[[], object], Callable[[], object], int]


@dataclass(frozen=True)
class Case:
    """A kernel and its yardstick.

    Attributes:
        name: its name in the table.
        yardstick: a description of the yardstick.
        n: the number of workers.
        d: the number of elements.
        build: returns the two calls, and the number of bytes that the first one reads.
        short: whether a call is too short to be timed alone.
    """

    name: str
    yardstick: str
    n: int
    d: int
    build: Callable[[], Built]
    short: bool = False

    def prepare(self) -> Prepared:
        """Make the calls."""
        gc.collect()
        call, yardstick, moved = self.build()
        if not self.short:
            return Prepared(self, call, 1, yardstick, 1, moved)
        return Prepared(self, *repeat(call), *repeat(yardstick), moved)


class Prepared(NamedTuple):
    """The calls of a case, each repeated until it is long enough to be timed."""

    case: Case
    call: Callable[[], object]
    times: int
    yardstick: Callable[[], object]
    yardstick_times: int
    bytes: int

    def row(self, seconds: float, ratio: float) -> Row:
        """Return the row, given the times of the two calls."""
        case = self.case
        return Row(
            "kernels",
            case.n,
            case.d,
            case.name,
            seconds / self.times,
            ratio * self.yardstick_times / self.times,
            self.bytes,
            own=True,
            note=f"of {case.yardstick}",
        )


def kernel_cases(d: int) -> Iterator[Case]:
    """Yield a case for every kernel, for a gradient of d elements on the CPU."""
    for group in (3, 5, 7, 11):
        yield _vote_case(45 // group * group, d, group, torch.float32)
    yield _vote_case(45, d // 2, 3, torch.float64)
    yield _vote_case(45, d, 3, torch.bfloat16)
    yield _vote_case(45, d, 3, torch.float16)
    yield Case("mean of 3 vectors, in place of one", "one read", 3, d, lambda: _mean(d))
    yield Case("encode one part", "message.add_(gradient)", 45, d, lambda: _encode_part(d))
    yield Case("encode, 11 parts", "one read", 45, d, lambda: _encode(d))
    bucket = min(d, 25 * 2**18)  # 25 MiB
    yield Case("digest of a bucket", "one read", 1, bucket, lambda: _digest(ops.digest, bucket))
    yield Case(
        "digest and statistics of a bucket", "one read", 1, bucket, lambda: _digest(ops.digest_and_stats, bucket)
    )
    yield Case("project", "one read", 45, d, lambda: _project(d))
    for code in (
        draco_ext.RepetitionCode(15, 1),
        draco_ext.CyclicCode(15, 1),
        draco_ext.CyclicCode(15, 2),
        draco_ext.SolonCode(15, 1, 2),
    ):
        arguments = (15, code.adversaries, *([code.blocks] if code.blocks > 1 else []))
        name = f"call of decode, {type(code).__name__}{arguments}"
        yield Case(name, "messages.sum()", 15, 1000, functools.partial(_short, code), short=True)


def _vote_case(n: int, d: int, group: int, dtype: torch.dtype) -> Case:
    def build() -> Built:
        messages = same_messages(n, d, dtype)
        words = messages if dtype.itemsize > 2 else messages.view(torch.float32)  # torch adds up 16-bit types slowly
        code = draco_ext.RepetitionCode(n, (group - 1) // 2)
        return lambda: draco_ext.decode(messages, code), words.sum, messages.nbytes

    return Case(f"vote of {group}, {str(dtype).removeprefix('torch.')}", "one read", n, d, build)


def _mean(d: int) -> Built:
    vectors = same_messages(3, d)
    return functools.partial(ops.vector_mean, list(vectors), out=vectors[1]), vectors.sum, vectors.nbytes


def _encode_part(d: int) -> Built:
    gradient, message, carry = part_gradient("cpu", 0, d), torch.zeros(d), torch.zeros(d)
    encode = functools.partial(ops.cyclic_encode_add_, message, carry, gradient, 45, 5, 0, 0)
    return encode, functools.partial(message.add_, gradient), 2 * gradient.nbytes


def _encode(d: int) -> Built:
    gradients = same_messages(11, d)
    return functools.partial(ops.cyclic_encode, gradients, 45, 5, 0), gradients.sum, gradients.nbytes


def _digest(digest: Callable[[torch.Tensor, int], object], d: int) -> Built:
    values = part_gradient("cpu", 0, d)
    return functools.partial(digest, values, 7), values.sum, values.nbytes


def _project(d: int) -> Built:
    messages = same_messages(45, d)
    return functools.partial(ops.cyclic_project, messages, 7), messages.sum, messages.nbytes


def _short(code: draco_ext.Code) -> Built:
    messages = same_messages(code.workers, 1000)
    return functools.partial(draco_ext.decode, messages, code), messages.sum, messages.nbytes


def kernels(d: int) -> Iterator[Job]:
    """Yield jobs that compare every kernel with its yardstick."""
    clock = Clock("cpu")
    for case in kernel_cases(d):
        yield Job(case.name, functools.partial(_kernel_row, case, clock))


def _kernel_row(case: Case, clock: Clock) -> list[Row]:
    prepared = case.prepare()
    timing = compare(clock, prepared.call, prepared.yardstick, rounds=KERNEL_ROUNDS)
    return [prepared.row(timing.seconds, timing.ratio)]


# ---------------------------------------------------------------------------------------------------------- scaling

SCALING_WORKERS = (7, 15, 45, 127, 255)


def scaling(most_bytes: int | None = None) -> Iterator[Job]:
    """Yield jobs for clean decodes of growing size, up to `most_bytes`, by default half of the available memory."""
    clock = Clock("cpu")
    most = available_memory() // 2 if most_bytes is None else most_bytes
    for n in SCALING_WORKERS:
        for d in (10**5, 3 * 10**5, 10**6, 3 * 10**6, 10**7, 3 * 10**7, 10**8, 3 * 10**8):
            if 4 * n * d <= most:
                yield Job(f"{n} workers, d = {d:.0e}", functools.partial(_scaling_rows, clock, n, d))


def _scaling_rows(clock: Clock, n: int, d: int) -> list[Row]:
    gc.collect()
    messages = same_messages(n, d)
    rows = []
    for name, code in (("vote, s = 1", draco_ext.RepetitionCode(n, 1)), ("cyclic, s = 2", draco_ext.CyclicCode(n, 2))):
        decode_once = functools.partial(draco_ext.decode, messages, code)
        timing = compare(clock, decode_once, messages.sum, rounds=11 if d > 10**6 else 41)
        split = None
        if code.uses_projections:
            projections, norms = code.project(messages, 7)
            search = functools.partial(code.locate, projections, norms, d, dtype=messages.dtype)
            split = {"locator": compare(clock, search, decode_once, rounds=5).ratio}
        rows.append(Row("scaling", n, d, name, timing.seconds, timing.ratio, messages.nbytes, own=True, split=split))
    return rows


# ------------------------------------------------------------------------------------------------ the paper's tables

PAPER_WORKERS = 45
BUCKET = 25 * 2**18  # elements: DistributedDataParallel's 25 MiB
# Parameters of the models of the paper's experiments; the FC net is that of its code, 784-800-500-10.
PAPER_MODELS = {
    "FC": 1_033_510,
    "LeNet": 431_080,
    "ResNet-18": 11_173_962,
    "AlexNet": 61_100_840,
    "ResNet-152": 60_192_808,
    "VGG-19": 143_667_240,
}


def paper(device: str) -> Iterator[Job]:
    """Yield jobs that encode and decode whole gradients under attack, as in the paper's tables."""
    clock = Clock(device)
    for attack in ("reversed", "constant"):
        for s in (1, 3, 5):
            yield Job(f"{attack}, s = {s}", functools.partial(_paper_rows, clock, device, attack, s))


def _paper_rows(clock: Clock, device: str, attack: str, s: int) -> list[Row]:
    """Return one row per model. A full bucket is measured once for all models that are larger."""
    n = PAPER_WORKERS
    seconds: dict[int, dict[str, float]] = {}
    for width in sorted({min(d, BUCKET) for d in PAPER_MODELS.values()}):
        seconds[width] = {
            name: compare(clock, call, lambda: None, rounds=5, patience=3).seconds
            for name, call in _paper_calls(device, attack, s, width)
        }
    rows = []
    for model, d in PAPER_MODELS.items():
        width = min(d, BUCKET)
        total = {name: d / width * value for name, value in seconds[width].items()}
        cyclic = total["cyclic encode"] + total["cyclic decode"]
        total |= {"median/repetition": total["median"] / total["repetition"], "median/cyclic": total["median"] / cyclic}
        total |= {"Gram/repetition": total["Gram"] / total["repetition"], "Gram/cyclic": total["Gram"] / cyclic}
        rows.append(Row("paper", n, d, f"{model}, {attack}, s = {s}", None, split=total, own=True))
    return rows


@functools.lru_cache(maxsize=3)
def _paper_gradients(device: str, d: int) -> Tensor:
    return torch.stack([part_gradient(device, part, d) for part in range(PAPER_WORKERS)])


def _paper_calls(device: str, attack: str, s: int, d: int) -> Iterator[tuple[str, Callable[[], object]]]:
    n = PAPER_WORKERS
    corrupt = functools.partial(ATTACKS[attack], generator=torch.Generator())
    gradients = _paper_gradients(device, d).clone()
    code = draco_ext.CyclicCode(n, s)
    yield "cyclic encode", functools.partial(code.encode, 0, gradients[: code.redundancy])
    for j in range(s):
        gradients[j] = corrupt(gradients[j])
    yield "mean", functools.partial(baselines.mean, gradients)
    yield "median", functools.partial(baselines.geometric_median, gradients)
    yield "Gram", functools.partial(baselines.geometric_median_gram, gradients)
    messages = gradients
    messages[:] = gradients[n - 1].clone()  # these are honest messages of both codes, see same_messages
    for j in range(s):
        messages[j] = corrupt(messages[j])
    yield "repetition", functools.partial(draco_ext.decode, messages, draco_ext.RepetitionCode(n, s))
    yield "cyclic decode", functools.partial(draco_ext.decode, messages, code)


# --------------------------------------------------------------------------------------------------------- accuracy

TARGET = 0.95
ACCURACY = Config(
    rules=("mean", "geometric-median", "krum", "repetition", "cyclic"),
    transport="allreduce",
    workers=9,
    adversaries=3,
    attack="constant",
    bad="fixed",
    seed=0,
    steps=150,
    batch_size=LEARNING.batch_size,
    learning_rate=LEARNING.learning_rate,
    momentum=LEARNING.momentum,
)


def accuracy(config: Config = ACCURACY) -> Iterator[Job]:
    """Yield jobs that train in real processes under attack until a test accuracy is reached."""
    yield Job(f"training, {config.steps} steps per rule", functools.partial(_accuracy_rows, config))


def _accuracy_rows(config: Config) -> list[Row]:
    return [_accuracy_row(config, outcome) for outcome in run(config, lambda training: None)]


def _accuracy_row(config: Config, outcome: Outcome) -> Row:
    elapsed = step_seconds(outcome).cumsum()
    reached = next((step for step, accuracy, _ in outcome.evaluations if step and accuracy >= TARGET), None)
    split = {
        "work": outcome.compute_factor,
        "ms per step": 1e3 * float(elapsed[-1]) / config.steps,
        f"steps to {TARGET:.0%}": reached,
        f"seconds to {TARGET:.0%}": None if reached is None else float(elapsed[reached - 1]),
        "accuracy": outcome.accuracy,
    }
    bad = config.adversaries if outcome.training.attacked else 0
    name = f"{outcome.training.label}, {bad} bad"
    return Row("accuracy", config.workers, outcome.parameters.size, name, None, split=split)


# ------------------------------------------------------------------------------------------------------- neighbours


def neighbours(settings: methods.Settings, seeds: Sequence[int]) -> Iterator[Job]:
    """Yield jobs that train the digits by each method under each attack."""
    for method in methods.NEIGHBOURS:
        yield Job(method.name, functools.partial(methods.run, method, settings, seeds))


class Options(NamedTuple):
    """The options of ``draco bench`` that suites use."""

    device: str
    workers: int
    parameters: int
    peers: bool
    quick: bool
    seeds: Sequence[int]


SUITES: dict[str, Callable[[Options], Iterator[Job]]] = {
    "decode": lambda options: decode(options.device, options.workers, options.parameters, options.peers),
    "kernels": lambda options: kernels(options.parameters),
    "scaling": lambda options: scaling(),
    "paper": lambda options: paper(options.device),
    "accuracy": lambda options: accuracy(),
    "neighbours": lambda options: neighbours(methods.QUICK if options.quick else methods.FULL, options.seeds),
}
