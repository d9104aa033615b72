"""A comparison of every kernel with its yardstick, on the CPU.

pytest bench/test_kernels.py [--quick] [--bench-output FOLDER]
"""

from __future__ import annotations

import pytest

from draco_ext.cli.bench.suites import KERNEL_ROUNDS, kernel_cases


def pytest_generate_tests(metafunc):
    cases = list(kernel_cases(10**6 if metafunc.config.option.quick else 10**7))
    metafunc.parametrize("case", cases, ids=[case.name.replace(" ", "-") for case in cases])


@pytest.mark.benchmark(group="kernels")
def test_speed(case, beside, add_row):
    prepared = case.prepare()
    timing = beside(prepared.call, prepared.yardstick, KERNEL_ROUNDS)
    if timing is not None:
        add_row(**vars(prepared.row(timing.seconds, timing.ratio)))
