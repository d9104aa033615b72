"""Methods that learn in spite of bad workers, side by side on the digits, and what holds of them with any seed.

pytest bench/test_neighbours.py [--quick] [--bench-output FOLDER]
"""

from __future__ import annotations

import pytest

from draco_ext.cli.bench.neighbours import FULL, NEIGHBOURS, NONE, QUICK, SEEDS, run
from draco_ext.cli.bench.report import accuracies


@pytest.mark.parametrize("method", NEIGHBOURS, ids=[method.name.replace(" ", "-") for method in NEIGHBOURS])
def test_accuracy(method, request, add_row):
    quick = request.config.option.quick
    (row,) = run(method, QUICK if quick else FULL, SEEDS[:1] if quick else SEEDS)
    add_row(**vars(row))
    found = accuracies(row)
    if "code" in method.name:
        # The gradients are those of the run without bad workers: all bits of them, or within rounding.
        assert max(found.values()) - min(found.values()) < 0.01
    elif method.name in ("mean", "averaging of models", "PDMM"):
        assert found["bit flips"] < 0.5 < found[NONE]
    else:
        assert all(found[attack] > found[NONE] - 0.1 for attack in ("bit flips", "Gaussian noise"))
