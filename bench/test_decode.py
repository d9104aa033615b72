"""Decoders and robust averages side by side, on the CPU, in float32.

    pytest bench/test_decode.py [--quick] [--bench-output FOLDER]

Each rule runs on messages as its workers send them: a robust average on n different gradients, a
decoder on the messages of its code. One read of the same messages is timed before and after every
round, so that a ratio compares neighbours in time, on a machine that may be shared. What a rule
makes of reversed messages is checked untimed, at a smaller d. The libraries that people install
take part in `draco bench` alone: some of their rules run for half a minute.
"""

from __future__ import annotations

import gc

import pytest

from draco_ext.cli.bench.workloads import (
    ONE_READ,
    Rule,
    cases,
    cyclic_rules,
    others,
    relative_error,
    reversed_workers,
    votes,
)

SIZES = [(n, d) for d in (10**6, 10**7) for n in (15, 45)]
FAST, SLOW = 7, 3  # rounds


def rules(n: int) -> list[Rule]:
    """Return the lines of the table; those with the same messages are consecutive."""
    return [ONE_READ, *others(n, with_peers=False), *votes(n), *cyclic_rules(n)]


def pytest_generate_tests(metafunc):
    sizes = SIZES[:1] if metafunc.config.option.quick else SIZES
    metafunc.parametrize(**cases("cpu", sizes, rules))


@pytest.fixture(scope="module")
def messages(request):
    """The honest messages of a workload, kept while consecutive tests use them."""
    gc.collect()
    return request.param, request.param.build()


def test_speed(messages, rule, benchmark, beside, add_row):
    load, messages = messages
    error = relative_error(rule, "cpu", load.n)
    benchmark.group = load.size
    rounds = SLOW if rule.slow else FAST
    with reversed_workers(messages, rule.reversed, rule.late):
        timing = beside(lambda: rule.apply(messages, load.code), messages.sum, rounds if load.d > 10**6 else 3 * rounds)
    if timing is not None:
        add_row(
            report="decode",
            n=load.n,
            d=load.d,
            rule=rule.name,
            seconds=timing.seconds,
            to_yardstick=timing.ratio,
            bytes=messages.nbytes,
            error=error,
            own=rule.own,
        )
