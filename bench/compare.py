"""What changed between two runs: `python -m bench compare A.json B.json`.

A measure changed when its medians differ by more than the ratio and what is usual in both runs has nothing in common.
Where there are local files to measure by, it is the ratio to them that is compared, so that a slower machine is no
change. Only what is ours can make it fail: local files, the S3 server and others are what it is measured by.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import click
import msgspec
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench.ratios import NATIVE, Key, apart, by_key, gap_of, is_ours, native_of, ratios, reached, times_as_good
from bench.report.command import load_results
from bench.report.names import metric_title, quantity, title_of
from bench.report.names import ratio as ratio_text
from bench.report.tables import SERVER, must, value_and_spread
from bench.results import Machine, Measure, Results

BROKEN = ("crashed", "hung", "failed")
Kind = Literal["better", "worse", "noise", "same"]
"""Noise: past the ratio, but within the spread of both."""


class CannotCompare(Exception):
    """The two are runs of different things."""


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """Of a measure that both have."""

    workload: str
    case: str
    system: str
    metric: str
    unit: str
    before: float
    after: float
    """Medians."""
    times: float
    """How many times as good it is now, by the numbers themselves; infinite (null in JSON) where there was nothing."""
    times_to_native: float | None
    """The same of the ratios to local files; None where there are none to measure by."""
    kind: Kind
    """By `times_to_native`, else by `times`."""
    counts: bool
    """Whether it being worse makes the comparison fail."""

    @property
    def decisive(self) -> float:
        return self.times if self.times_to_native is None else self.times_to_native


class Lost(msgspec.Struct, frozen=True, kw_only=True):
    """A measure that only one has, or a promise that only one keeps; or what broke after it had been measured."""

    workload: str
    case: str
    system: str
    metric: str
    why: str = ""
    """Such as "hung: no answer in 60 s"."""
    counts: bool = False
    """Of those that are gone: ours, and it crashed, hung or failed."""


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    before: str
    after: str
    """Names of the runs."""
    ratio: float
    warnings: list[str]
    changes: list[Change]
    new: list[Lost]
    gone: list[Lost]
    no_longer_kept: list[Lost]
    """Promises that were reached before."""
    failed: bool
    """Something that counts is worse, or gone."""


def compare(before: Results, after: Results, ratio: float) -> Comparison:
    """`ratio`: above 1. Raises CannotCompare when the scales are different, ValueError."""
    if ratio <= 1:
        raise ValueError(f"ratio is {ratio:g}: it has to be above 1")
    if before.scale != after.scale:
        raise CannotCompare(
            f"{before.name} is of scale {before.scale} and {after.name} of scale {after.scale}: they did different work"
        )
    old, new = by_key(before), by_key(after)
    both = [key for key in old if key in new and old[key].unit == new[key].unit and old[key].better == new[key].better]
    changes = [_change(key, old, new, ratio) for key in both if old[key].better]
    gone = [_gone(old[key], after) for key in old if key not in both]
    said = {(each.workload, each.why) for each in gone}
    gone += [
        each for each in _broken([old[key] for key in both], before, after) if (each.workload, each.why) not in said
    ]
    return Comparison(
        before=before.name,
        after=after.name,
        ratio=ratio,
        warnings=differences(before.machine, after.machine),
        changes=changes,
        new=[_only(new[key]) for key in new if key not in both],
        gone=gone,
        no_longer_kept=[
            _only(new[key], f"{value_and_spread(new[key])}, must be {must(new[key])}")
            for key in both
            if is_kept(old[key]) is True and is_kept(new[key]) is False
        ],
        failed=any(each.kind == "worse" and each.counts for each in changes) or any(each.counts for each in gone),
    )


def counts(measure: Measure) -> bool:
    """Ours; and what knows no systems, which is about ours, but for the S3 server by itself."""
    return is_ours(measure.system) or (measure.system == "" and measure.workload != SERVER)


def _change(key: Key, old: dict[Key, Measure], new: dict[Key, Measure], ratio: float) -> Change:
    before, after = old[key], new[key]
    times = times_changed(before, after)
    decisive, separate = times, apart(before.values, after.values)
    times_to_native = None
    old_native, new_native = native_of(old, before), native_of(new, after)
    if old_native is not None and new_native is not None:
        old_ratios, new_ratios = ratios(before, old_native), ratios(after, new_native)
        if old_ratios and new_ratios and statistics.median(old_ratios) > 0:
            decisive = times_to_native = statistics.median(new_ratios) / statistics.median(old_ratios)
            separate = apart(old_ratios, new_ratios)
    return Change(
        workload=before.workload,
        case=before.case,
        system=before.system,
        metric=before.metric,
        unit=before.unit,
        before=before.median,
        after=after.median,
        times=times,
        times_to_native=times_to_native,
        kind=_kind(decisive, separate, ratio),
        counts=counts(before),
    )


def _kind(times: float, separate: bool, ratio: float) -> Kind:
    if 1 / ratio <= times <= ratio:
        return "same"
    if not separate:
        return "noise"
    return "better" if times > 1 else "worse"


def times_changed(before: Measure, after: Measure) -> float:
    """How many times as good; where nothing is something that no ratio says, 0 or infinite by its direction."""
    old, new = before.median, after.median
    if old == new:
        return 1.0
    if old > 0 and new > 0:
        times = times_as_good(new, old, before.better)
        assert times is not None
        return times
    return float("inf") if (new > old) == (before.better == "more") else 0.0


def is_kept(measure: Measure) -> bool | None:
    """None: it is no promise."""
    return None if measure.required is None else reached(measure)


def _only(measure: Measure, why: str = "", counts: bool = False) -> Lost:
    return Lost(
        workload=measure.workload,
        case=measure.case,
        system=measure.system,
        metric=measure.metric,
        why=why,
        counts=counts,
    )


def _gone(measure: Measure, after: Results) -> Lost:
    gap = gap_of(after, measure.workload, measure.system, measure.case)
    if gap is None:
        return _only(measure)
    broken = gap.kind in BROKEN
    return _only(measure, f"{gap.kind}: {gap.why}", broken and counts(measure))


def _broken(both: Sequence[Measure], before: Results, after: Results) -> Iterator[Lost]:
    """Ours that broke in a later round than the first, so that there are figures of it."""
    known = {(gap.workload, gap.system, gap.case) for gap in before.gaps if gap.kind in BROKEN}
    for gap in after.gaps:
        if gap.kind not in BROKEN or (gap.workload, gap.system, gap.case) in known:
            continue
        about = (each for each in both if each.workload == gap.workload and gap.system in ("", each.system))
        if any(counts(each) and gap.case in ("", each.case) for each in about):
            yield Lost(
                workload=gap.workload,
                case=gap.case,
                system=gap.system,
                metric="",
                why=f"{gap.kind}: {gap.why}",
                counts=True,
            )


def differences(before: Machine, after: Machine) -> list[str]:
    """Of machines, where they make numbers hard to compare."""
    found = []
    for name, one, other in (
        ("processor", before.cpu, after.cpu),
        ("number of processors", before.processors, after.processors),
        ("GiB of memory", round(before.memory_bytes / 2**30), round(after.memory_bytes / 2**30)),
        ("medium", before.medium, after.medium),
        ("kernel", before.kernel, after.kernel),
        ("Python", before.python, after.python),
    ):
        if one != other:
            found.append(f"measured on different machines: {name} was {one}, is {other}")
    return found


def show(comparison: Comparison, console: Console) -> None:
    for warning in comparison.warnings:
        console.print(f"warning: {escape(warning)}", style="yellow")
    titles: dict[Kind, str] = {"worse": "worse", "better": "better", "noise": "changed, but within the spread"}
    for kind, title in titles.items():
        changed = [each for each in comparison.changes if each.kind == kind]
        if changed:
            console.print(_changes_table(title, changed, comparison))
    only = {"no longer kept": comparison.no_longer_kept, "gone": comparison.gone, "new": comparison.new}
    for title, lost in only.items():
        if lost:
            console.print(_lost_table(title, lost))
    same = sum(each.kind == "same" for each in comparison.changes)
    console.print(f"{same} of {len(comparison.changes)} measures are the same within a ratio of {comparison.ratio:g}")
    native = [each.times for each in comparison.changes if each.system == NATIVE and 0 < each.times < float("inf")]
    if native:
        console.print(f"the machine itself: local files are {_times(statistics.geometric_mean(native))} times as fast")
    if comparison.failed:
        worse = sum(each.kind == "worse" and each.counts for each in comparison.changes)
        gone = sum(each.counts for each in comparison.gone)
        console.print(f"worse by more than {comparison.ratio:g}: {worse}; broken: {gone}", style="red")


def _changes_table(title: str, changes: Sequence[Change], comparison: Comparison) -> Table:
    table = Table(title=title)
    for column in ("what", "system", "metric"):
        table.add_column(column, overflow="fold")
    for column in (comparison.before, comparison.after, "times as good", "of ratio to local files"):
        table.add_column(escape(column), justify="right")
    for each in sorted(
        changes, key=lambda change: (not change.counts, change.decisive if title != "better" else -change.decisive)
    ):
        table.add_row(
            escape(f"{each.workload}: {each.case}"),
            escape(title_of(each.system)) + ("" if each.counts else " (does not count)"),
            escape(metric_title(each.metric)),
            quantity(each.before, each.unit),
            quantity(each.after, each.unit),
            _times(each.times),
            "" if each.times_to_native is None else _times(each.times_to_native),
        )
    return table


def _times(value: float) -> str:
    return "∞" if value == float("inf") else ratio_text(value)


def _lost_table(title: str, lost: Sequence[Lost]) -> Table:
    table = Table(title=title)
    for column in ("what", "system", "metric", "why"):
        table.add_column(column, overflow="fold")
    for each in lost:
        words = (f"{each.workload}: {each.case}", title_of(each.system), metric_title(each.metric), each.why)
        table.add_row(*map(escape, words))
    return table


@click.command(name="compare")
@click.argument("before", metavar="A.json", type=click.Path(dir_okay=False, path_type=Path))
@click.argument("after", metavar="B.json", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--ratio",
    type=click.FloatRange(min=1, min_open=True, max=1000),
    default=1.2,
    show_default=True,
    help="A measure that is so many times as bad makes it fail.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@click.pass_context
def command(ctx: click.Context, before: Path, after: Path, ratio: float, as_json: bool) -> None:
    """Print what changed from A to B; exit with 1 when something of ours got worse by more than the ratio."""
    try:
        comparison = compare(load_results(before), load_results(after), ratio)
    except CannotCompare as error:
        raise click.ClickException(str(error)) from None
    if as_json:
        click.echo(msgspec.json.encode(comparison))
    else:
        wide = Console()
        show(comparison, wide if wide.is_terminal else Console(width=160))
    ctx.exit(1 if comparison.failed else 0)
