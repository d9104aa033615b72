"""Decoders and robust averages side by side, on a GPU, in float32, timed by CUDA events.

    pytest bench/test_gpu.py [--quick] [--bench-output FOLDER]

As test_decode.py on the CPU; the yardstick is a device copy that moves as many bytes as the rule must. Before all that
is timed, 1 GiB that no rule looks at is read: it evicts the cache, and lets the host launch ahead. Small messages are
exchanged for others from round to round, too.
"""

from __future__ import annotations

import gc
import os
import statistics
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from workloads import CYCLIC, REPETITION, Rule, baseline, cases, cyclic_rules, decode, encode, relative_error, reverse

import draco_ext

SIZES = [(n, d) for d in (10**6, 25_600_000, 60_200_000) for n in (15, 45)]  # ..., ResNet-50, ResNet-152
FAST, SLOW = 21, 5  # rounds
BASELINES = ("mean", "coordinate-median", "geometric-median", "geometric-median-gram")


def rules(n: int) -> list[Rule]:
    """The lines of the table; those with the same messages are neighbours."""
    lines = [Rule(name, baseline(name), slow=name != "mean") for name in BASELINES]
    # Its number of iterations depends on the messages.
    lines += [Rule(f"{name}, 1 reversed", baseline(name), reversed=True, slow=True) for name in BASELINES[2:]]
    lines += [
        Rule("vote s=1", decode, REPETITION),
        Rule("vote s=1, 1 reversed", decode, REPETITION, reversed=True),
    ]
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
    """Honest messages of a workload, kept while neighbouring tests use them: as many times as exceed the cache."""
    gc.collect()
    torch.cuda.empty_cache()
    load = request.param
    series = 1 + 4 * gpu.L2_cache_size // (4 * load.n * load.d)
    return load, [load.build(i) for i in range(series)]


@pytest.fixture(scope="module")
def unrelated(gpu):
    return torch.ones(2**28, device="cuda")


def seconds_of(call: Callable[[], object], unrelated: Tensor) -> Callable[[], float]:
    """Runs the call; what is returned gives its seconds once the device is done."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    unrelated.sum()
    start.record()
    call()
    end.record()
    return lambda: start.elapsed_time(end) / 1e3


def test_speed(messages, rule, unrelated, add_row):
    load, series = messages
    error = relative_error(rule, "cuda", load.n)
    rows = load.code.redundancy if rule.apply is encode else load.n
    moved = (rows + 1) * load.d  # elements
    target = torch.empty(moved // 2, device="cuda")

    honest = [messages[: rule.adversaries].clone() for messages in series]
    if rule.reversed:
        for messages in series:
            reverse(messages, rule.adversaries)
    seconds, ratios = [], []
    warmup, rounds = 2, SLOW if rule.slow else FAST
    for i in range(warmup + rounds):
        messages = series[i % len(series)]
        calls = [
            lambda: target.copy_(messages.view(-1)[: len(target)]),  # noqa: B023 (called at once)
            lambda: rule.apply(messages, load.code),  # noqa: B023
        ]
        timings = [seconds_of(call, unrelated) for call in (calls[0], calls[1], calls[0])]
        torch.cuda.synchronize()
        before, own, after = (timing() for timing in timings)
        if i >= warmup:
            seconds.append(own)
            ratios.append(own / ((before + after) / 2))
    for messages, rows_before in zip(series, honest, strict=True):
        messages[: rule.adversaries] = rows_before

    add_row(
        device="cuda",
        n=load.n,
        d=load.d,
        rule=rule.name,
        seconds=statistics.median(seconds),
        to_yardstick=statistics.median(ratios),
        bytes=moved * target.element_size(),
        error=error,
    )
