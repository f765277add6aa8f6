"""Numbers about a running process: declared with what reads them, and shown as Prometheus wants them."""

from cachefs.metrics.declared import Metric, Value, by_label, counter, errors_of, gauge, histogram
from cachefs.metrics.merged import Labelled
from cachefs.metrics.monitor import Monitor
from cachefs.metrics.times import BOUNDS_S, Times

__all__ = [
    "BOUNDS_S",
    "Labelled",
    "Metric",
    "Monitor",
    "Times",
    "Value",
    "by_label",
    "counter",
    "errors_of",
    "gauge",
    "histogram",
]
