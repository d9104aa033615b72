"""Robust averages of other libraries, for comparison. None of them is required.

``pip install "draco_ext[bench]"`` installs them.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

from draco_ext import baselines


@dataclass(frozen=True)
class Peer:
    """A rule of another library.

    Attributes:
        name: its name in the tables.
        library: the library's name on PyPI.
        call: (messages, adversaries) -> gradient.
        definition: the definition that it claims to compute, for float64 messages: (messages, adversaries) -> gradient.
        iterates: whether its time depends on the messages.
    """

    name: str
    library: str
    call: Callable[[Tensor, int], Tensor]
    definition: Callable[[Tensor, int], Tensor]
    iterates: bool = False

    def missing(self) -> str | None:
        """Return why it cannot be used here, or None."""
        try:
            version(self.library)
        except PackageNotFoundError:
            return f"{self.library} is not installed"
        return None

    def distance(self, workers: int) -> float:
        """Return the relative distance of its result from its definition, on random messages with one reversed."""
        generator = torch.Generator().manual_seed(0)
        messages = torch.randn(workers, 1000, generator=generator) + torch.randn(1000, generator=generator)
        messages[0] *= -100
        expected = self.definition(messages.double(), 1)
        return float((self.call(messages, 1).double() - expected).norm() / expected.norm())

    def apply(self, messages: Tensor, code: object) -> Tensor:
        """Apply it as a rule of the benchmarks, with at most one bad worker."""
        return self.call(messages, 1)


def _byzfl() -> types.ModuleType:
    """Import byzfl's aggregators only: the package itself imports torchvision, whose PyPI build needs CUDA."""
    if "byzfl" not in sys.modules:
        spec = importlib.util.find_spec("byzfl")
        package = importlib.util.module_from_spec(importlib.machinery.ModuleSpec("byzfl", None, is_package=True))
        package.__path__ = list((spec and spec.submodule_search_locations) or ())
        sys.modules["byzfl"] = package
    return importlib.import_module("byzfl.aggregators.aggregators")


def _geom_median(messages: Tensor, adversaries: int) -> Tensor:
    module = importlib.import_module("geom_median.torch")
    median: Tensor = module.compute_geometric_median(messages, skip_typechecks=True).median
    return median


def _krum(messages: Tensor, neighbours: int) -> Tensor:
    """Return all messages in the order of their Krum scores, lowest first, computed from all differences."""
    squared = (messages[:, None] - messages).square().sum(2)
    scores = squared.sort(1).values[:, 1 : neighbours + 1].sum(1)
    return scores.argsort()


PEERS = (
    Peer(
        "byzfl Median",
        "byzfl",
        lambda messages, s: _byzfl().Median()(messages),
        lambda messages, s: messages.median(0).values,
    ),
    Peer(
        "byzfl TrMean",
        "byzfl",
        lambda messages, s: _byzfl().TrMean(s)(messages),
        lambda messages, s: messages.sort(0).values[s : len(messages) - s].mean(0),
    ),
    # This library uses the n-s-1 nearest messages; the paper has n-s-2.
    Peer(
        "byzfl Krum",
        "byzfl",
        lambda messages, s: _byzfl().Krum(s)(messages),
        lambda messages, s: messages[_krum(messages, len(messages) - s - 1)[0]],
    ),
    Peer(
        "byzfl MultiKrum",
        "byzfl",
        lambda messages, s: _byzfl().MultiKrum(s)(messages),
        lambda messages, s: messages[_krum(messages, len(messages) - s - 1)[: len(messages) - s]].mean(0),
    ),
    # The library makes three steps by default; the definition is the limit of these steps.
    Peer(
        "byzfl GeometricMedian",
        "byzfl",
        lambda messages, s: _byzfl().GeometricMedian()(messages),
        lambda messages, s: baselines.geometric_median(messages, iterations=10**4, tolerance=1e-12),
        iterates=True,
    ),
    Peer(
        "geom-median",
        "geom-median",
        _geom_median,
        lambda messages, s: baselines.geometric_median(messages, iterations=10**4, tolerance=1e-12),
        iterates=True,
    ),
)
