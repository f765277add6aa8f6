"""The short table of the README: what is promised, and how cachefs compares."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from bench.ratios import NATIVE, OURS, Key, by_key, is_peer, is_synthetic, key_of, ratios
from bench.report.markdown import replaced
from bench.report.names import cell, ratio, systems_of, title_of, workloads_of
from bench.report.tables import Table, geometric_mean, headline_metrics, of_workload, promise_table, promises
from bench.results import Measure, Results

K = TypeVar("K")
V = TypeVar("V")
SCALES = ("smoke", "standard", "full")
GROUPED_BY = ("work", "format", "pattern", "state")
"""Labels that tell kinds of work apart whose means would say nothing."""


def write_readme(results: list[Results], path: Path) -> None:
    """Between the markers. Raises NoPlace, OSError."""
    text = path.read_text(encoding="utf-8")
    path.write_text(replaced(text, readme_part(results), path), encoding="utf-8")


def readme_part(results: Sequence[Results]) -> str:
    lines = [*_where(results), ""]
    results = sorted(results, key=weight, reverse=True)
    compared = [Comparison(run) for run in results]
    rows = first_of({row.title: row for row in each.rows} for each in compared)
    if rows:
        peers = systems_of([measure for each in compared for measure in each.peers])
        columns = ["cachefs against", title_of(NATIVE), *map(title_of, peers)]
        cells = [[cell(row.title), *(row.cell(system) for system in (NATIVE, *peers))] for row in rows]
        lines += [*Table([cell(column) for column in columns], cells).markdown(), ""]
    promised = first_of({key_of(measure): measure for measure in promises([run])} for run in results)
    if promised:
        lines += [*promise_table(promised, notes=False).markdown_of_words(), ""]
    return "\n".join(lines)


def weight(run: Results) -> tuple[int, str]:
    """Where runs have the same, what is said of it comes from the largest scale, and of those from the last run."""
    return (SCALES.index(run.scale) if run.scale in SCALES else -1), run.began


def first_of(runs: Iterable[dict[K, V]]) -> list[V]:
    found: dict[K, V] = {}
    for run in runs:
        for key, value in run.items():
            found.setdefault(key, value)
    return list(found.values())


def _where(results: Sequence[Results]) -> list[str]:
    machines = dict.fromkeys(
        f"{run.machine.processors} processors ({run.machine.cpu}), {run.machine.kernel}, caches and local files "
        f"on {run.machine.medium}"
        for run in results
    )
    return [cell(f"Measured on {'; and on '.join(machines)}.")]


class Row:
    """A kind of work: a workload and the labels of `GROUPED_BY`."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.times: dict[str, list[float]] = {}
        """Other system -> how many times as good as it cachefs is, for each case."""

    def cell(self, system: str) -> str:
        """Geometric mean; with what it is of, where it is not of all cases."""
        times = self.times.get(system)
        if not times:
            return ""
        cases = max(map(len, self.times.values()))
        return f"{ratio(geometric_mean(times))}{f' ({len(times)} of {cases} cases)' if len(times) < cases else ''}"


class Comparison:
    def __init__(self, run: Results) -> None:
        self.rows: list[Row] = []
        self.peers: list[Measure] = []
        everything = by_key(run)
        for workload in workloads_of([run]):
            self._add(everything, of_workload(run, workload), workload)

    def _add(self, everything: dict[Key, Measure], measures: list[Measure], workload: str) -> None:
        headlines = headline_metrics(measures)
        ours = [each for each in measures if each.system == OURS and headlines.get(each.case) == each.metric]
        rows: dict[tuple[str, ...], Row] = {}
        for each in ours:
            if is_synthetic(each):
                continue
            against = [other for other in measures if self._same(each, other)]
            for other in against:
                found = ratios(each, other)
                if not found:
                    continue
                kind = tuple(each.labels.get(name, "") for name in GROUPED_BY)
                row = rows.setdefault(kind, Row(_title(workload, each)))
                row.times.setdefault(other.system, []).append(statistics.median(found))
                if is_peer(other.system):
                    self.peers.append(other)
        self.rows += rows.values()

    @staticmethod
    def _same(ours: Measure, other: Measure) -> bool:
        named = other.system == NATIVE or is_peer(other.system)
        return named and (other.case, other.metric, other.unit) == (ours.case, ours.metric, ours.unit)


def _title(workload: str, measure: Measure) -> str:
    words = [measure.labels[name] for name in GROUPED_BY if measure.labels.get(name)]
    return f"{workload}: {', '.join(words)}" if words else workload
