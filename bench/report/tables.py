"""Results as tables of words and numbers."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import msgspec

from bench import ratios
from bench.ratios import by_key, gap_of, is_peer, native_of, ratio_to_native, reached
from bench.report.names import (
    cell,
    metric_title,
    number,
    percentile_of,
    quantity,
    ratio,
    round_quantity,
    scale_of,
    systems_of,
    title_of,
)
from bench.report.reasons import UNKNOWN, why_ahead
from bench.results import Gap, Measure, Results

SERVER = "server"
"""The workload that is the S3 server by itself."""
SAMPLE_RATES = {"images_per_s", "samples_per_s"}
"""Of training, which the server alone has no rate of: files, or bytes out of larger ones, are what it reads."""
NOTHING = "–"
AHEAD_FROM = 1.01
"""Times as good; below that it is the same."""


class Table(msgspec.Struct, frozen=True):
    """Cells are Markdown."""

    columns: list[str]
    rows: list[list[str]]

    def markdown(self) -> list[str]:
        lines = [self.columns, ["---"] + ["---:"] * (len(self.columns) - 1), *self.rows]
        return [f"| {' | '.join(line)} |" for line in lines]

    def markdown_of_words(self) -> list[str]:
        """With all columns to the left."""
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        return [f"| {' | '.join(line)} |" for line in lines]


def of_workload(results: Results, workload: str) -> list[Measure]:
    return [each for each in by_key(results).values() if each.workload == workload]


def spread(measure: Measure, size: float) -> str:
    """(lowest–highest) in units of `size`; empty where all rounds are the same, or there is only one."""
    lowest, highest = min(measure.values), max(measure.values)
    if lowest == highest:
        return ""
    return f" ({number(lowest / size, measure.unit)}–{number(highest / size, measure.unit)})"


def value_and_spread(measure: Measure) -> str:
    size, _ = scale_of(measure.median, measure.unit)
    return quantity(measure.median, measure.unit) + spread(measure, size)


def headline_metrics(measures: Sequence[Measure]) -> dict[str, str]:
    """Case -> the metric that tells most of it: the first where more is better, else the first where less is. Cases
    that only explain have none.
    """
    found: dict[str, str] = {}
    for better in ("more", "less"):
        for each in measures:
            if each.better == better:
                found.setdefault(each.case, each.metric)
    return {case: found[case] for case in dict.fromkeys(each.case for each in measures) if case in found}


def comparison(results: Results, workload: str, metrics: dict[str, str]) -> Table:
    """Cases x systems of one metric for each case: median, spread, ratio to native."""
    everything = by_key(results)
    chosen = [each for each in of_workload(results, workload) if metrics.get(each.case) == each.metric]
    systems = systems_of(chosen)
    several = len(set(metrics.values())) > 1
    rows = []
    for case, metric in metrics.items():
        measured = {each.system: each for each in chosen if each.case == case}
        size, unit = scale_of(max((abs(each.median) for each in measured.values()), default=0.0), _unit(measured))
        title = f"{case} ({metric_title(metric)})" if several else case
        row = [cell(title), cell(unit) or NOTHING]
        for system in systems:
            if system not in measured:
                gap = gap_of(results, workload, system, case)
                row.append(f"*{gap.kind}*" if gap else NOTHING)
                continue
            measure = measured[system]
            to_native = ratio_to_native(everything, measure)
            text = f"{number(measure.median / size, measure.unit)}{spread(measure, size)}"
            row.append(text if to_native is None else f"{text} **{ratio(to_native)}**")
        rows.append(row)
    rows += ceilings(results, workload, set(metrics.values()), len(systems))
    return Table(["", "unit", *(cell(title_of(system)) or "measured" for system in systems)], rows)


def _unit(measured: dict[str, Measure]) -> str:
    return next((each.unit for each in measured.values()), "")


def ceilings(results: Results, workload: str, metrics: set[str], systems: int) -> list[list[str]]:
    """What the S3 server gives by itself, to be compared with what is read from it."""
    if workload == SERVER:
        return []
    if metrics & SAMPLE_RATES:
        metrics = metrics | {"files_per_s", "bytes_per_s"}
    found = [each for each in of_workload(results, SERVER) if each.metric in metrics]
    return [
        [f"*the S3 server alone, {cell(each.case)}: {cell(value_and_spread(each))}*", *[""] * (systems + 1)]
        for each in found
    ]


def explaining(measures: Sequence[Measure]) -> list[str]:
    """Metrics besides the headline ones, in the order of the file."""
    headlines = set(headline_metrics(measures).items())
    return list(dict.fromkeys(each.metric for each in measures if (each.case, each.metric) not in headlines))


def cases_of(measures: Sequence[Measure], metric: str) -> dict[str, str]:
    """As `comparison` takes them."""
    return {each.case: metric for each in measures if each.metric == metric}


def metric_caption(measures: Sequence[Measure], metric: str) -> str:
    """What it is, and which way is better."""
    found = percentile_of(metric)
    what = f"{found[0]} latency, {found[1]:g}th percentile".strip() if found else metric_title(metric)
    better = next((each.better for each in measures if each.metric == metric), "")
    return f"{what}{f' ({better} is better)' if better else ''}"


def promises(runs: Sequence[Results]) -> list[Measure]:
    return [each for run in runs for each in by_key(run).values() if each.required is not None]


def promise_table(measures: Sequence[Measure], *, notes: bool = True) -> Table:
    rows = []
    for each in measures:
        assert each.required is not None
        text = value_and_spread(each)
        row = [cell(promise_title(each)), must(each), f"**{text}**" if reached(each) else text]
        row.append("yes" if reached(each) else "no")
        rows.append([*row, cell(each.note)] if notes else row)
    return Table(["what", "must reach", "measured", "reached", *(["note"] if notes else [])], rows)


def promise_title(measure: Measure) -> str:
    return f"{measure.case} ({title_of(measure.system)})" if measure.system not in ("", ratios.OURS) else measure.case


def must(measure: Measure) -> str:
    assert measure.required is not None
    sign = "at least" if measure.better == "more" else "at most"
    return f"{sign} {round_quantity(measure.required, measure.unit)}"


class Ahead(msgspec.Struct, frozen=True):
    """Where a system of others is better than ours at a case."""

    theirs: Measure
    by: dict[str, float]
    """Metric -> times as good."""
    clear: bool
    """Beyond the spread of both in one of them at least."""
    run: str


def ahead(results: Results) -> list[Ahead]:
    """By workload and case, as in the file."""
    everything = by_key(results)
    found: dict[tuple[str, str, str], list[tuple[Measure, float, bool]]] = {}
    for theirs in everything.values():
        ours = everything.get((theirs.workload, theirs.case, ratios.OURS, theirs.metric))
        if ours is None or not is_peer(theirs.system) or ours.unit != theirs.unit:
            continue
        times = times_ahead(theirs, ours)
        if times is not None and times >= AHEAD_FROM:
            clear = ratios.apart(theirs.values, ours.values)
            found.setdefault((theirs.workload, theirs.case, theirs.system), []).append((theirs, times, clear))
    return [
        Ahead(
            each[0][0],
            {theirs.metric: times for theirs, times, _ in each},
            any(clear for _, _, clear in each),
            results.name,
        )
        for each in found.values()
    ]


def times_ahead(theirs: Measure, ours: Measure) -> float | None:
    """Of medians: what the tables show. Infinite where one has nothing of what less is better of, or ours nothing of
    what more is better of.
    """
    times = ratios.times_as_good(theirs.median, ours.median, theirs.better)
    if times is None and theirs.better and min(theirs.median, ours.median) == 0:
        gained = theirs.median > ours.median if theirs.better == "more" else theirs.median < ours.median
        return float("inf") if gained else None
    return times


def ahead_table(found: Sequence[Ahead], *, runs: bool = False) -> list[str]:
    """Lines: a table, and the reasons that it refers to by number. `runs`: say which."""
    rows = []
    numbers: dict[str, int] = {}
    for each in found:
        theirs = each.theirs
        by = ", ".join(f"{cell(metric_short(metric))} {ratio_or_all(times)}" for metric, times in each.by.items())
        case = f"{theirs.workload}: {theirs.case}{f' (run {each.run})' if runs else ''}"
        why = why_ahead(theirs)
        said = why if why == UNKNOWN else f"({numbers.setdefault(why, len(numbers) + 1)})"
        rows.append([cell(case), cell(title_of(theirs.system)), by, said])
    table = Table(["case", "who", "times as good as cachefs", "why"], rows)
    return [*table.markdown_of_words(), "", *(f"{number}. {cell(why)}" for why, number in numbers.items())]


def metric_short(metric: str) -> str:
    found = percentile_of(metric)
    return f"{found[0]} p{found[1]:g}".strip() if found else metric_title(metric)


def ratio_or_all(times: float) -> str:
    return "∞" if times == float("inf") else ratio(times)


def gap_lines(gaps: Sequence[Gap]) -> list[str]:
    """One for each system and reason, with the cases it is about."""
    grouped: dict[tuple[str, str, str], list[str]] = {}
    for gap in gaps:
        cases = grouped.setdefault((gap.system, gap.kind, gap.why), [])
        if gap.case not in cases:
            cases.append(gap.case)
    lines = []
    for (system, kind, why), cases in grouped.items():
        named = [cell(case) for case in cases if case]
        about = f" in {'; '.join(named)}" if named else ""
        who = f"**{cell(title_of(system))}** " if system else ""
        lines.append(f"- {who}{kind}{about}: {cell(why)}")
    return lines


def geometric_mean(values: Sequence[float]) -> float:
    """Of ratios; 0 where one of them is."""
    return statistics.geometric_mean(values) if all(value > 0 for value in values) else 0.0


def native_ratios(results: Results, workload: str) -> list[tuple[Measure, float]]:
    """The headline measure of each case and system, with its ratio to native where there is one."""
    everything = by_key(results)
    measures = of_workload(results, workload)
    comparable = [each for each in measures if native_of(everything, each) is not None]
    headlines = headline_metrics(comparable)
    found = []
    for each in comparable:
        to_native = ratio_to_native(everything, each)
        if headlines.get(each.case) == each.metric and to_native is not None:
            found.append((each, to_native))
    return found
