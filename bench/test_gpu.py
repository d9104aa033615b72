"""Decoders and robust averages side by side, on a GPU, in float32, timed by CUDA events.

    pytest bench/test_gpu.py [--quick] [--bench-output FOLDER]

As test_decode.py on the CPU; the yardstick is a device copy that moves as many bytes as the rule must. Before all that
is timed, 1 GiB that no rule looks at is read: it evicts the cache, and lets the host launch ahead. Small messages are
exchanged for others from call to call, too.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import os

import pytest
import torch

import draco_ext
from draco_ext.cli.bench.timing import Clock, compare
from draco_ext.cli.bench.workloads import (
    CYCLIC,
    Rule,
    baseline,
    cases,
    cyclic_rules,
    encode,
    relative_error,
    reversed_workers,
    votes,
)

SIZES = [(n, d) for d in (10**6, 25_600_000, 60_200_000) for n in (15, 45)]  # ..., ResNet-50, ResNet-152
FAST, SLOW = 21, 5  # rounds
BASELINES = ("mean", "coordinate-median", "geometric-median", "geometric-median-gram")


def rules(n: int) -> list[Rule]:
    """Return the lines of the table; those with the same messages are consecutive."""
    lines = [Rule(name, baseline(name), slow=name != "mean") for name in BASELINES]
    # Timed with reversed messages, too, since its number of iterations depends on the messages.
    lines += [Rule(f"{name}, 1 reversed", baseline(name), reversed=(0,), slow=True) for name in BASELINES[2:]]
    lines += [rule for rule in votes(n) if rule.own]
    cyclic = cyclic_rules(n)
    most = max(rule.adversaries for rule in cyclic)
    return [*lines, *cyclic, Rule(f"encode s={most}", encode, CYCLIC, most, decodes=False)]


def pytest_generate_tests(metafunc):
    sizes = SIZES[:1] if metafunc.config.option.quick else SIZES
    metafunc.parametrize(**cases("cuda", sizes, rules))


@pytest.fixture(scope="module", autouse=True)
def gpu():
    lacking = None
    if not torch.cuda.is_available():
        lacking = "no CUDA device"
    elif not draco_ext.build_info()["cuda"]:
        lacking = "draco_ext was built without CUDA"
    if lacking is not None and os.environ.get("FAIL_WITHOUT_CUDA") == "1":
        pytest.fail(f"{lacking}, and FAIL_WITHOUT_CUDA=1", pytrace=False)
    if lacking is not None:
        pytest.skip(f"{lacking}: nothing was measured on a GPU")
    return torch.cuda.get_device_properties(torch.cuda.current_device())


@pytest.fixture(scope="module")
def messages(request, gpu):
    """The honest messages of a workload, in copies that exceed the cache, kept while consecutive tests use them."""
    gc.collect()
    torch.cuda.empty_cache()
    load = request.param
    series = 1 + 4 * gpu.L2_cache_size // (4 * load.n * load.d)
    return load, [load.build(i) for i in range(series)]


@pytest.fixture(scope="module")
def clock(gpu):
    return Clock("cuda")


def test_speed(messages, rule, clock, add_row):
    load, series = messages
    error = relative_error(rule, "cuda", load.n)
    rows = load.code.redundancy if rule.apply is encode else load.n
    moved = (rows + 1) * load.d  # elements
    target = torch.empty(moved // 2, device="cuda")

    turns = itertools.cycle(series)

    def own():
        rule.apply(next(turns), load.code)

    def copy():
        target.copy_(next(turns).view(-1)[: len(target)])

    with contextlib.ExitStack() as stack:
        for messages in series:
            stack.enter_context(reversed_workers(messages, rule.reversed, rule.late))
        timing = compare(clock, own, copy, rounds=SLOW if rule.slow else FAST)

    add_row(
        report="cuda",
        n=load.n,
        d=load.d,
        rule=rule.name,
        seconds=timing.seconds,
        to_yardstick=timing.ratio,
        bytes=moved * target.element_size(),
        error=error,
        own=rule.own,
    )
