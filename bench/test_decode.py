"""Decoders and robust averages side by side, on the CPU, in float32.

    pytest bench [--quick] [--bench-output FOLDER]

Each rule runs on messages as its workers send them: a robust average on n different gradients, a
decoder on the messages of its code. One read of the same messages is timed before and after every
round, so that a ratio compares neighbours in time, on a machine that may be shared. What a rule
makes of reversed messages is checked untimed, at a smaller d.
"""

from __future__ import annotations

import gc
import itertools
import statistics
import time

import pytest
from torch import Tensor
from workloads import REPETITION, Rule, baseline, cases, cyclic_rules, decode, relative_error, reverse

import draco_ext
from draco_ext import aggregators

SIZES = [(n, d) for d in (10**6, 10**7) for n in (15, 45)]
FAST, SLOW = 7, 3  # rounds
SORTING = ("coordinate-median", "trimmed-mean")
WEISZFELD = ("geometric-median", "geometric-median-gram")


def vote_torch(messages: Tensor, code: draco_ext.Code) -> Tensor:
    return aggregators.vote_torch(messages, code.redundancy)[0]


def rules(n: int) -> list[Rule]:
    """The lines of the table; those with the same messages are neighbours."""
    lines = [Rule("one read", lambda messages, code: messages.sum(), decodes=False)]
    for name in aggregators.AGGREGATORS:
        lines.append(Rule(name, baseline(name), slow=name in SORTING or name == "geometric-median"))
    # Its number of iterations depends on the messages.
    lines += [Rule(f"{name}, 1 reversed", baseline(name), reversed=True, slow=True) for name in WEISZFELD]
    lines += [
        Rule("vote s=1", decode, REPETITION),
        Rule("vote s=1, 1 reversed", decode, REPETITION, reversed=True),
        Rule("vote s=1 in plain torch", vote_torch, REPETITION),
    ]
    return lines + cyclic_rules(n)


def pytest_generate_tests(metafunc):
    sizes = SIZES[:1] if metafunc.config.option.quick else SIZES
    metafunc.parametrize(**cases("cpu", sizes, rules))


@pytest.fixture(scope="module")
def messages(request):
    """The honest messages of a workload, kept while neighbouring tests use them."""
    gc.collect()
    return request.param, request.param.build()


def test_speed(messages, rule, benchmark, add_row):
    load, messages = messages
    error = relative_error(rule, "cpu", load.n)

    reads = []

    def read() -> None:
        start = time.perf_counter()
        messages.sum()
        reads.append(time.perf_counter() - start)

    honest = messages[: rule.adversaries].clone()
    if rule.reversed:
        reverse(messages, rule.adversaries)
    rounds = SLOW if rule.slow else FAST
    benchmark.group = load.size
    benchmark.pedantic(
        rule.apply,
        args=(messages, load.code),
        setup=read,
        rounds=rounds if load.d > 10**6 else 3 * rounds,
        warmup_rounds=1,
    )
    read()
    messages[: rule.adversaries] = honest

    if benchmark.stats is not None:  # None under --benchmark-disable
        seconds = benchmark.stats.stats.data
        around = [(before + after) / 2 for before, after in itertools.pairwise(reads[1:])]
        add_row(
            device="cpu",
            n=load.n,
            d=load.d,
            rule=rule.name,
            seconds=statistics.median(seconds),
            to_yardstick=statistics.median(a / b for a, b in zip(seconds, around, strict=True)),
            bytes=messages.nbytes,
            error=error,
        )
