"""A collector for Prometheus' client library, which shows the report of a guard."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from draco_ext.integrations import missing
from draco_ext.reporting.metrics import read_metrics
from draco_ext.training.base import GuardBase

try:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
    from prometheus_client.registry import Collector
except ImportError as error:
    raise missing("prometheus", error) from error


class GuardCollector(Collector):
    """A collector of the metrics of a guard's report, at the time when Prometheus asks for them.

    ``prometheus_client.REGISTRY.register(GuardCollector(guard))``. The names are those of `Report.metrics`, with
    ``draco_`` instead of ``draco/``, with ``_total`` at the end of counters, and with the rank as a label.

    Args:
        guard: the guard.
        labels: further labels of all metrics, for instance ``{"job": "pretraining"}``.

    Raises:
        TypeError: it is not a guard.
    """

    def __init__(self, guard: GuardBase, labels: dict[str, str] | None = None) -> None:
        if not isinstance(guard, GuardBase):
            raise TypeError(f"guard must be a Guard or AuditGuard, got {type(guard).__name__}")
        self._guard = guard
        self._labels = dict(labels or {})

    def collect(self) -> Iterator[Any]:
        """Yield the metrics."""
        for metric, values in read_metrics(self._guard.report()):
            family = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
            own = ["rank"] if metric.by_rank else []
            shown = family(f"draco_{metric.name}", metric.meaning, labels=[*self._labels, *own])
            for rank, value in values.items():
                shown.add_metric([*self._labels.values(), *([str(rank)] if own else [])], value)
            yield shown
