"""Arithmetic of measures: how many times as good one is as another, and whether that is more than noise."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from bench.results import Better, Gap, Measure, Results

NATIVE = "native"
OURS = "cachefs"

Key = tuple[str, str, str, str]
"""Workload, case, system, metric."""

TRIMMED_FROM = 5
"""With so many rounds the lowest and the highest do not count when it is asked what is usual."""


def key_of(measure: Measure) -> Key:
    return measure.workload, measure.case, measure.system, measure.metric


def by_key(results: Results) -> dict[Key, Measure]:
    """In the order of the file; without measures that have no values."""
    return {key_of(each): each for each in results.measures if each.values}


def native_of(measures: dict[Key, Measure], measure: Measure) -> Measure | None:
    """The same on local files; of local files themselves: none."""
    if measure.system == NATIVE:
        return None
    native = measures.get((measure.workload, measure.case, NATIVE, measure.metric))
    return native if native is not None and native.unit == measure.unit else None


def is_ours(system: str) -> bool:
    return system == OURS or system.startswith((f"{OURS}_", f"{OURS}-"))


def is_synthetic(measure: Measure) -> bool:
    """Of a training job that reads nothing: what the others are to be compared with."""
    return measure.system == "synthetic" or "synthetic" in (measure.labels.get("input"), measure.labels.get("format"))


def is_peer(system: str) -> bool:
    """A file system of others: neither ours, nor something to measure all of them by."""
    return system not in ("", NATIVE, "synthetic") and not is_ours(system)


def usual(values: Sequence[float]) -> tuple[float, float]:
    """Lowest and highest, of five rounds and more without the extremes."""
    ordered = sorted(values)
    if len(ordered) >= TRIMMED_FROM:
        ordered = ordered[1:-1]
    return ordered[0], ordered[-1]


def apart(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether what is usual for them has nothing in common. Single rounds are apart unless they are equal."""
    (lowest, highest), (other_lowest, other_highest) = usual(one), usual(other)
    return highest < other_lowest or other_highest < lowest


def times_as_good(value: float, base: float, better: Better) -> float | None:
    """Above 1: `value` is better. None where no ratio says it: neither way is better, or something is not positive
    (but nothing at all, where more is better, is 0 times as good).
    """
    if not better:
        return None
    if better == "less":
        return base / value if value > 0 and base > 0 else None
    return value / base if value >= 0 and base > 0 else None


def ratios(one: Measure, base: Measure) -> list[float]:
    """`times_as_good` in each round, which lets what slowed both in a round cancel out; of the medians alone where they
    have not as many rounds. Empty where there is no ratio in one of them.
    """
    pairs = [(one.median, base.median)]
    if len(one.values) == len(base.values):
        pairs = list(zip(one.values, base.values, strict=True))
    found = [times_as_good(value, against, one.better) for value, against in pairs]
    return [each for each in found if each is not None] if None not in found else []


def ratio_to_native(measures: dict[Key, Measure], measure: Measure) -> float | None:
    native = native_of(measures, measure)
    found = ratios(measure, native) if native is not None else []
    return statistics.median(found) if found else None


def reached(measure: Measure) -> bool:
    """What is `required`: at least, or at most."""
    assert measure.required is not None
    if measure.better == "more":
        return measure.median >= measure.required
    return measure.median <= measure.required


def gap_of(results: Results, workload: str, system: str, case: str) -> Gap | None:
    """Why there is no measure of a case; what is said of the case before what is said of all."""
    said = [gap for gap in results.gaps if gap.system in (system, "") and gap.workload in (workload, "")]
    for gap in said:
        if gap.case == case:
            return gap
    return next((gap for gap in said if not gap.case), None)
