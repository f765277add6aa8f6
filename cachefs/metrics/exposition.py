"""Metrics as Prometheus reads them. Only here is its library used; loaded when a process is to be watched."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, InfoMetricFamily
from prometheus_client.registry import Collector

from cachefs import __version__
from cachefs.metrics.declared import Metric, read_histogram
from cachefs.metrics.times import BOUNDS_S

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_BUCKETS = [*map(repr, BOUNDS_S), "+Inf"]
_Family = CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily


class Exposition(Collector):
    """Reads everything at the moment it is asked for."""

    def __init__(self, role: str) -> None:
        self._role = role
        self._watched: list[tuple[Metric[Any], Any]] = []
        # Its own, not the global one: several processes' worth of metrics live in one test.
        self._registry = CollectorRegistry(auto_describe=False)
        ProcessCollector(registry=self._registry)
        self._registry.register(self)

    def add(self, metrics: Sequence[Metric[Any]], parts: Any) -> None:
        self._watched += [(metric, parts) for metric in metrics]

    def describe(self) -> list[Any]:
        return []

    def collect(self) -> Iterator[Any]:
        info = InfoMetricFamily("cachefs_build", "Which cachefs this is, and which of its processes.")
        info.add_metric([], {"version": __version__, "process": self._role})
        yield info
        for metric, parts in self._watched:
            value = metric.read(parts)
            if value is not None:
                yield _family(metric, value)

    def text(self) -> bytes:
        return generate_latest(self._registry)


def _family(metric: Metric[Any], value: Any) -> _Family:
    if metric.kind == "histogram":
        histogram = HistogramMetricFamily(metric.name, metric.help, labels=metric.labels)
        for labels, cell in read_histogram(value, metric.labels):
            counts = accumulate(cell[:-1])
            histogram.add_metric(
                labels, [(bound, count) for bound, count in zip(_BUCKETS, counts, strict=True)], cell[-1]
            )
        return histogram
    of_kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
    family = of_kind(metric.name, metric.help, labels=metric.labels)
    for labels, number in value.items() if isinstance(value, Mapping) else [((), value)]:
        family.add_metric(labels, number)
    return family
