"""How systems, metrics and numbers are written."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Iterator

from bench.ratios import is_ours
from bench.results import Gap, Measure, Results

TITLES = {
    "native": "local files",
    "synthetic": "synthetic input",
    "cachefs": "cachefs",
    "cachefs_pyfuse3": "cachefs (pyfuse3)",
    "rclone": "rclone",
    "s3fs": "s3fs-fuse",
    "juicefs": "JuiceFS",
    "mountpoint-s3": "Mountpoint for S3",
}
"""In the order of columns and bars."""

METRICS = {
    "bytes_per_s": "throughput",
    "iops": "operations a second",
    "utilisation": "accelerator utilisation",
    "stall_s": "time that the accelerator waited",
    "under_store_bytes": "bytes that the store sent",
    "read_bytes": "bytes that were read",
    "master_requests": "requests to the master",
    "reading_s_per_gb": "processor time of reading a gigabyte",
    "serving_s_per_gb": "processor time of serving a gigabyte",
    "ratio": "ratio",
}

_SCALES = [(1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, "")]
_TIMES = [(1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns")]


def title_of(system: str) -> str:
    return TITLES.get(system, system)


def metric_title(metric: str) -> str:
    if metric in METRICS:
        return METRICS[metric]
    what, rate = metric.removesuffix("_per_s"), metric.endswith("_per_s")
    return f"{what.removesuffix('_s').replace('_', ' ')}{' a second' if rate else ''}"


def order_of(system: str) -> tuple[int, str]:
    """To sort systems: what all are measured by, ours, the others."""
    known = list(TITLES)
    if system in known:
        return known.index(system), ""
    return (known.index("cachefs_pyfuse3") if is_ours(system) else len(known)), system


def systems_of(measures: Iterable[Measure]) -> list[str]:
    return sorted({each.system for each in measures}, key=order_of)


def workloads_of(runs: Iterable[Results]) -> list[str]:
    """In the order in which they were run."""
    said: Iterator[Measure | Gap] = itertools.chain.from_iterable((*run.measures, *run.gaps) for run in runs)
    return list(dict.fromkeys(each.workload for each in said if each.workload))


def scale_of(largest: float, unit: str) -> tuple[float, str]:
    """What to divide by, and the name of the unit then, so that the largest has one to three digits before the point.
    A share stays what it is.
    """
    largest = abs(largest)
    if unit == "s":
        if largest == 0:
            return 1.0, "s"
        return next(((size, name) for size, name in _TIMES if largest >= size), _TIMES[-1])
    if unit in ("B", "B/s"):
        size, prefix = next(((size, prefix) for size, prefix in _SCALES if largest >= size), _SCALES[-1])
        return size, f"{prefix}{unit}"
    return 1.0, {"1/s": "/s"}.get(unit, unit)


def number(value: float, unit: str = "B") -> str:
    """Three digits that count, whole from 100 on; four of what has no unit and is near 1, with which it is compared."""
    if value == 0:
        return "0"
    if not math.isfinite(value):
        return "∞" if value > 0 else "-∞"
    if not unit and abs(value) >= 10 and float(value).is_integer():
        return f"{value:,.0f}"
    if abs(value) < 1e-4:
        return f"{value:.2g}"
    digits = 3 if not unit and 1 <= value < 10 else max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{digits}f}"


def quantity(value: float, unit: str) -> str:
    """With its unit."""
    size, name = scale_of(value, unit)
    return f"{number(value / size, unit)}{'' if name.startswith('/') else ' '}{name}".strip()


def round_quantity(value: float, unit: str) -> str:
    """Of a number that somebody has chosen: without zeros at its end."""
    size, name = scale_of(value, unit)
    text = number(value / size)
    if "." in text:
        text = text.rstrip("0").rstrip(".")
    return f"{text}{'' if name.startswith('/') else ' '}{name}".strip()


def ratio(value: float) -> str:
    """Two digits after the point, three where it is small: that is what such a ratio is good for."""
    if value >= 10:
        return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
    return f"{value:.2f}" if value >= 0.1 or value == 0 else f"{value:.3f}" if value >= 0.001 else "<0.001"


def slug(text: str) -> str:
    """Safe as a part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "unnamed"


def cell(text: str) -> str:
    """Safe between the bars of a Markdown table, and outside of it: one line, no HTML."""
    text = " ".join(text.split())
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")


PERCENTILE = re.compile(r"^(?:(?P<of>.+)_)?p(?P<percent>\d+(?:[._]\d+)?)_s$")


def percentile_of(metric: str) -> tuple[str, float] | None:
    """ "open_p99.9_s" -> ("open", 99.9); None for what is no percentile of times."""
    found = PERCENTILE.match(metric)
    return (found["of"] or "", float(found["percent"].replace("_", "."))) if found else None
