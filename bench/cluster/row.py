"""One promise, and what became of it."""

from __future__ import annotations

from bench.results import Measure

WORKLOAD = "cluster"


def row(
    case: str, required: float, measured: float, *, at_most: bool = True, unit: str = "", note: str = ""
) -> Measure:
    """`unit`: "1/s" for a rate, "" for a ratio or share."""
    return Measure(
        workload=WORKLOAD,
        case=case,
        system="",
        metric="per_s" if unit else "ratio",
        unit=unit,
        better="less" if at_most else "more",
        values=[measured],
        required=required,
        note=note,
    )
