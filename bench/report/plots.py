"""Results as pictures: ratios to local files as bars, epochs as lines, percentiles of latency, promises.

The same results make the same bytes (with the same matplotlib). Colours are those of Okabe and Ito, which colour-blind
people can tell apart; everything is labelled where it is, and systems have markers of their own too.
"""

from __future__ import annotations

import io
import itertools
import math
import statistics
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from bench.ratios import OURS, is_synthetic, reached
from bench.report.names import (
    TITLES,
    metric_title,
    number,
    order_of,
    percentile_of,
    quantity,
    ratio,
    round_quantity,
    scale_of,
    slug,
    systems_of,
    title_of,
)
from bench.report.tables import geometric_mean, native_ratios, of_workload, promise_title, promises
from bench.results import Measure, Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INSTALL = "pip install 'cachefs[bench]'"
COLOURS = {
    "native": "#000000",
    "synthetic": "#7f7f7f",
    "cachefs": "#0072b2",
    "cachefs_pyfuse3": "#56b4e9",
    "rclone": "#e69f00",
    "s3fs": "#d55e00",
    "juicefs": "#009e73",
    "mountpoint-s3": "#cc79a7",
}
OTHER_COLOURS = ("#999933", "#882255", "#44aa99", "#661100")
MARKERS = "osD^vPX*<>ph"
WIDTH_IN = 8.5
DPI = 100
COLOURS_IN_FILE = 256
MOST_BARS = 60
MOST_PANELS = 6
MOST_LATENCIES = 10
LABEL_CHARACTERS = 24
HALF_WIDTH = 56
"""Characters of a panel's title."""
GREY = "#555555"


class Plot(msgspec.Struct, frozen=True):
    name: str
    """Of the file."""
    title: str
    workload: str
    png: bytes


def available() -> bool:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def colour_of(system: str) -> str:
    """The same wherever the system is drawn; where there are no systems, it is about ours."""
    return COLOURS.get(system or OURS) or OTHER_COLOURS[sum(system.encode()) % len(OTHER_COLOURS)]


def marker_of(system: str) -> str:
    known = list(TITLES)
    return MARKERS[known.index(system) if system in known else sum(system.encode()) % len(MARKERS)]


def plots_of(results: Results, workload: str) -> list[Plot]:
    """What can be drawn of it, each with a name that is unique within the results. Raises ImportError, see
    `available`.
    """
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        # Not as somebody has set it for drawings of their own.
        matplotlib.rcdefaults()
        matplotlib.rcParams["text.parse_math"] = False
        # What the font does not have is drawn as a box.
        warnings.filterwarnings("ignore", message="Glyph")
        return [
            *ratio_plots(results, workload),
            *epoch_plots(results, workload),
            *latency_plots(results, workload),
            *promise_plots(results, workload),
        ]


# Bars: ratios to local files.


class Group(msgspec.Struct, frozen=True):
    title: str
    state: str
    bars: dict[str, float]
    """System -> ratio."""
    cases: int = 1
    """That it is the mean of."""
    counted: dict[str, int] = {}
    """System -> cases, where it has not all of them."""


def ratio_plots(results: Results, workload: str) -> Iterator[Plot]:
    found = native_ratios(results, workload)
    if not found or epochs_of(of_workload(results, workload)):
        return
    systems = systems_of([each for each, _ in found])
    metrics = {each.metric for each, _ in found}
    what = metric_title(metrics.pop()) if len(metrics) == 1 else "speed"
    states = list(dict.fromkeys(each.labels.get("state", "") for each, _ in found))
    groups = {
        state: groups_of([pair for pair in found if pair[0].labels.get("state", "") == state]) for state in states
    }
    if sum(len(each) for each in groups.values()) * len(systems) <= MOST_BARS:
        yield _bars(workload, "ratios", what, list(groups.values()), systems)
        return
    for state, of_state in groups.items():
        name = f"ratios-{slug(state)}" if state else "ratios"
        yield _bars(workload, name, what, [of_state], systems)


def groups_of(found: Sequence[tuple[Measure, float]]) -> list[Group]:
    """One for each case; where those are too many, one for each combination of the first labels, with the geometric
    mean over the cases that have them.
    """
    systems = {each.system for each, _ in found}
    most = max(1, MOST_BARS // len(systems))
    cases = dict.fromkeys(each.case for each, _ in found)
    if len(cases) <= most:
        return [
            Group(case, _state(found, case), {each.system: value for each, value in found if each.case == case})
            for case in cases
        ]
    names = [name for name in dict.fromkeys(name for each, _ in found for name in each.labels) if name != "state"]
    kept: list[str] = []
    for name in names:
        if len({_labels(each, [*kept, name]) for each, _ in found}) > most:
            break
        kept.append(name)
    means: dict[tuple[str, ...], dict[str, list[float]]] = {}
    for each, value in found:
        means.setdefault(_labels(each, kept), {}).setdefault(each.system, []).append(value)
    state = found[0][0].labels.get("state", "")
    groups = []
    for labels, by_system in means.items():
        title = " ".join(each for each in labels if each) or "all"
        bars = {system: geometric_mean(values) for system, values in by_system.items()}
        most_counted = max(map(len, by_system.values()))
        counted = {system: len(values) for system, values in by_system.items() if len(values) < most_counted}
        groups.append(Group(title, state, bars, most_counted, counted))
    return groups


def _state(found: Sequence[tuple[Measure, float]], case: str) -> str:
    return next(each.labels.get("state", "") for each, _ in found if each.case == case)


def _labels(measure: Measure, names: Sequence[str]) -> tuple[str, ...]:
    return tuple(measure.labels.get(name, "") for name in names)


def _bars(workload: str, kind: str, what: str, panels: list[list[Group]], systems: list[str]) -> Plot:
    title = f"{workload}: {what} relative to local files; longer is better"
    mean = any(group.cases > 1 for panel in panels for group in panel)
    heights = [sum(len(group.bars) + 1.9 for group in panel) for panel in panels]
    figure, axes = _figure(title, heights, inches=[0.155 * each + 0.55 for each in heights])
    for axis, panel in zip(axes, panels, strict=True):
        y, longest = 0.0, max((value for group in panel for value in group.bars.values()), default=0.0)
        limit = longest * 1.22 or 1.0
        for group in panel:
            heading = _short(f"{group.title}, {group.cases} cases" if group.cases > 1 else group.title)
            axis.text(0, y + 0.1, heading, fontsize=8.5, fontweight="bold", va="center")
            y += 1.1
            for system in systems:
                if system not in group.bars:
                    continue
                value = group.bars[system]
                axis.barh(y, value, 0.82, color=colour_of(system), zorder=2)
                only = f" ({group.counted[system]} of {group.cases} cases)" if system in group.counted else ""
                text = f"{title_of(system)}  {ratio(value)}{only}"
                axis.text(value + limit * 0.006, y, text, fontsize=7.5, va="center", zorder=4, bbox=_HALO)
                y += 1
            y += 0.8
        axis.set_ylim(y - 0.4, -0.8)
        axis.set_xlim(0, limit)
        axis.set_yticks([])
        if limit >= 1:
            axis.axvline(1, color=COLOURS["native"], linewidth=1.2, zorder=3)
            axis.text(
                1, 1.0, "local files", fontsize=7.5, ha="center", va="bottom", transform=axis.get_xaxis_transform()
            )
        state = panel[0].state
        under = "geometric means of ratios to local files" if mean else "ratio to local files"
        beyond = "" if limit >= 1 else "; local files, 1, are beyond the right edge"
        axis.set_xlabel(f"{f'{state}: ' if state else ''}{under}{beyond}", fontsize=8, color=GREY)
        _bare(axis, grid="x")
    return Plot(f"{slug(workload)}-{kind}.png", title, workload, _png(figure))


# Lines: epochs.


def epoch_plots(results: Results, workload: str) -> Iterator[Plot]:
    everything = of_workload(results, workload)
    jobs = epochs_of(everything)
    for metric in dict.fromkeys(each.metric for found in jobs.values() for each in found if each.better):
        if percentile_of(metric):
            continue
        panels = {title: [each for each in found if each.metric == metric] for title, found in jobs.items()}
        panels = {title: found for title, found in panels.items() if found}
        synthetic = [each.median for each in everything if each.metric == metric and is_synthetic(each)]
        ceiling = statistics.median(synthetic) if synthetic else None
        yield _lines(workload, metric, dict(list(panels.items())[:MOST_PANELS]), ceiling)


def epochs_of(measures: Sequence[Measure]) -> dict[str, list[Measure]]:
    """Jobs that read the same data epoch after epoch, from the first on: title -> measures. Empty where the number of
    an epoch only says in which order the work was done.
    """
    jobs: dict[tuple[str, ...], list[Measure]] = {}
    for each in measures:
        if each.labels.get("epoch", "").isdecimal() and not is_synthetic(each):
            jobs.setdefault(_job(each), []).append(each)
    for found in jobs.values():
        numbers = sorted({int(each.labels["epoch"]) for each in found})
        if len(numbers) < 2 or numbers != list(range(1, len(numbers) + 1)):
            return {}
    varying = [i for i in range(max(map(len, jobs), default=0)) if len({job[i : i + 1] for job in jobs}) > 1]
    titles = [", ".join(job[i] for i in varying if i < len(job)) for job in jobs]
    return dict(zip(titles if len(set(titles)) == len(jobs) else map(", ".join, jobs), jobs.values(), strict=True))


def common_end(cases: Sequence[str]) -> str:
    """The words between commas that all cases end with, such as what is smaller than it really is."""
    parts = zip(*(case.split(", ")[:0:-1] for case in cases), strict=False)
    common = [each[0] for each in itertools.takewhile(lambda each: len(set(each)) == 1, parts)]
    return ", ".join(reversed(common))


def _job(measure: Measure) -> tuple[str, ...]:
    return tuple(value for name, value in measure.labels.items() if name not in ("epoch", "state", "input"))


def _lines(workload: str, metric: str, panels: dict[str, list[Measure]], ceiling: float | None) -> Plot:
    """`ceiling`: of synthetic input."""
    everything = [each for found in panels.values() for each in found]
    first = everything[0]
    size, unit = scale_of(max(each.median for each in everything), first.unit)
    way = "higher" if first.better == "more" else "lower"
    what = metric_title(metric)
    named = "" if unit in ("", "/s") else f", {unit}"
    accelerators = ", ".join(dict.fromkeys(each.labels.get("accelerator", "") for each in everything))
    on = f" on {accelerators}" if accelerators else ""
    title = f"{workload}{on}: {what}{named}, by epoch; {way} is better"
    figure, axes = _grid(title, len(panels), each_in=2.5)
    figure.supxlabel(common_end([each.case for each in everything]), fontsize=8, color=GREY)
    for axis, (caption, found) in zip(axes, panels.items(), strict=False):
        epochs = sorted({int(each.labels["epoch"]) for each in found})
        ends: list[tuple[float, str]] = []
        # Ours is drawn over the others.
        for system in reversed(systems_of(found)):
            points = sorted((int(each.labels["epoch"]), each) for each in found if each.system == system)
            x = [epoch for epoch, _ in points]
            y = [each.median / size for _, each in points]
            low = [each.median / size - min(each.values) / size for _, each in points]
            high = [max(each.values) / size - each.median / size for _, each in points]
            colour = colour_of(system)
            axis.errorbar(
                x, y, [low, high], color=colour, marker=marker_of(system), markersize=4.5, linewidth=1.6, elinewidth=0.8
            )
            ends.append((y[-1], system))
        top = max(max(each.values) / size for each in found)
        if ceiling is not None:
            top = max(top, ceiling / size)
            height, colour = [ceiling / size] * 2, COLOURS["synthetic"]
            axis.plot([epochs[0], epochs[-1]], height, color=colour, linewidth=1.2, linestyle="--", zorder=1)
            ends.append((ceiling / size, "synthetic"))
        axis.set_ylim(0, top * 1.08 or 1.0)
        room = 0.45 * (epochs[-1] - epochs[0])
        axis.set_xlim(epochs[0] - 0.15 * room, epochs[-1] + room)
        axis.set_xticks(epochs, [f"{epoch}, cold" if epoch == 1 else str(epoch) for epoch in epochs], fontsize=8)
        _end_labels(axis, ends, epochs[-1], room)
        axis.set_title(_short(caption or what, HALF_WIDTH), fontsize=9, loc="left")
        _bare(axis, grid="y")
    return Plot(f"{slug(workload)}-epochs-{slug(metric)}.png", title, workload, _png(figure))


def _end_labels(axis: Axes, ends: list[tuple[float, str]], x: float, room: float) -> None:
    """Names at the ends of lines, moved apart where they would lie on each other; those that end alike have one."""
    bottom, top = axis.get_ylim()
    gap = (top - bottom) * 0.08
    alike: dict[str, list[tuple[float, str]]] = {}
    for value, system in sorted(ends, key=lambda each: (each[0], order_of(each[1]))):
        alike.setdefault(number(value), []).append((value, system))
    texts = [
        textwrap.wrap(
            f"{', '.join(title_of(system) for _, system in found)} {shown}", LABEL_CHARACTERS, break_on_hyphens=False
        )
        for shown, found in alike.items()
    ]
    values = [found[0][0] for found in alike.values()]
    halves = [gap * len(lines) / 2 for lines in texts]
    placed: list[float] = []
    for value, half in zip(values, halves, strict=True):
        placed.append(max(value, placed[-1] + halves[len(placed) - 1] + half) if placed else max(value, bottom + half))
    limit = top + gap
    for i in reversed(range(len(placed))):
        placed[i] = min(placed[i], limit - halves[i])
        limit = placed[i] - halves[i]
    for found, value, y, lines in zip(alike.values(), values, placed, texts, strict=True):
        colour = colour_of(found[0][1]) if len(found) == 1 else GREY
        axis.plot([x, x + room * 0.12], [value, y], color=colour, linewidth=0.6)
        axis.text(x + room * 0.15, y, "\n".join(lines), fontsize=7.5, color=colour, va="center", clip_on=False)


# Dumb-bells: percentiles of latency.


def latency_plots(results: Results, workload: str) -> Iterator[Plot]:
    panels: dict[tuple[str, str], dict[str, dict[float, Measure]]] = {}
    for each in of_workload(results, workload):
        found = percentile_of(each.metric)
        if found and each.median > 0:
            of, percent = found
            panels.setdefault((each.case, of), {}).setdefault(each.system, {})[percent] = each
    drawn = {
        key: systems for key, systems in panels.items() if any(len(percentiles) > 1 for percentiles in systems.values())
    }
    if drawn:
        yield _latencies(workload, dict(some_of(list(drawn.items()), MOST_LATENCIES)), len(drawn))


def some_of(items: list[Any], most: int) -> list[Any]:
    """As many as there is room for, from the whole of them."""
    return items if len(items) <= most else [items[i * len(items) // most] for i in range(most)]


def _latencies(workload: str, panels: dict[tuple[str, str], dict[str, dict[float, Measure]]], cases: int) -> Plot:
    """`cases`: how many there are, drawn or not."""
    percents = sorted({percent for systems in panels.values() for found in systems.values() for percent in found})
    marks = {percent: _MARKS[min(i, len(_MARKS) - 1)] for i, percent in enumerate(percents)}
    legend = ", ".join(f"{written} p{percent:g}" for percent, (_, written) in marks.items())
    some = f", {len(panels)} of {cases} cases" if len(panels) < cases else ""
    title = f"{workload}: latency ({legend}){some}; further left is better"
    rows = max(len(systems) for systems in panels.values())
    figure, axes = _grid(title, len(panels), each_in=0.45 + 0.2 * rows, share_x=True)
    values = [each.median for systems in panels.values() for found in systems.values() for each in found.values()]
    for axis, ((case, of), systems) in zip(axes, panels.items(), strict=False):
        names = sorted(systems, key=order_of)
        for y, system in enumerate(names):
            found = systems[system]
            colour, x = colour_of(system), [found[percent].median for percent in sorted(found)]
            axis.plot([x[0], x[-1]], [y, y], color=colour, linewidth=2.2, zorder=2, solid_capstyle="butt")
            for percent in found:
                axis.plot([found[percent].median], [y], marks[percent][0], color=colour, markersize=4.5, zorder=3)
        axis.set_xscale("log")
        axis.set_xlim(min(values) / 1.5, max(values) * 1.5)
        axis.set_ylim(len(names) - 0.4, -0.6)
        axis.set_yticks(range(len(names)), [title_of(name) for name in names], fontsize=8)
        axis.xaxis.set_major_formatter(lambda value, _: round_quantity(value, "s"))
        axis.minorticks_off()
        axis.set_title(_short(f"{of} {case}".strip(), HALF_WIDTH), fontsize=8.5, loc="left")
        _bare(axis, grid="x")
    return Plot(f"{slug(workload)}-latency.png", title, workload, _png(figure))


_MARKS = (("o", "●"), ("s", "■"), ("D", "◆"), ("^", "▲"))
"""Of percentiles, as matplotlib names them and as they are written."""


# Promises.


def promise_plots(results: Results, workload: str) -> Iterator[Plot]:
    found = [
        each
        for each in promises([results])
        if each.workload == workload and each.required and each.required > 0 and each.median > 0
    ]
    if not found:
        return
    title = f"{workload}: measured against what is promised, right of the line is kept"
    figure, (axis,) = _figure(title, [1.0], inches=[0.44 * len(found) + 0.6])
    values = [_kept_by(each) for each in found]
    low, high = min([*values, 0.8]) / 1.3, max([*values, 1.25]) * 1.9
    for y, (each, value) in enumerate(zip(found, values, strict=True)):
        kept = reached(each)
        colour = COLOURS["cachefs"] if kept else COLOURS["s3fs"]
        axis.plot([1, value], [y, y], color=colour, linewidth=5, solid_capstyle="butt", zorder=2)
        axis.plot([value], [y], "o" if kept else "X", color=colour, markersize=7, zorder=3)
        sign = "≥" if each.better == "more" else "≤"
        said = f"{quantity(each.median, each.unit)} ({sign} {round_quantity(each.required or 0.0, each.unit)})"
        axis.text(low * 1.02, y - 0.36, _short(promise_title(each)), fontsize=8, va="center", zorder=4, bbox=_HALO)
        axis.annotate(
            said, (max(value, 1.0), y), (7, 0), textcoords="offset points", fontsize=7.5, va="center", color=colour
        )
    axis.axvline(1, color="#000000", linewidth=1.2, zorder=1)
    axis.set_xscale("log")
    axis.set_xlim(low, high)
    axis.set_ylim(len(found) - 0.5, -0.75)
    axis.set_yticks([])
    ticks = [tick for tick in (0.01, 0.03, 0.1, 0.25, 0.5, 1, 2, 4, 10, 30, 100) if low < tick < high]
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis.set_xlabel("times as good as promised", fontsize=8, color=GREY)
    _bare(axis, grid="x")
    yield Plot(f"{slug(workload)}-promises.png", title, workload, _png(figure))


def _kept_by(measure: Measure) -> float:
    required = measure.required or 1.0
    return measure.median / required if measure.better == "more" else required / measure.median


def _short(text: str, most: int = 110) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


# What all have in common.

_HALO = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}


def _figure(title: str, heights: Sequence[float], inches: Sequence[float]) -> tuple[Figure, list[Axes]]:
    """Panels below each other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH_IN, sum(inches) + 0.45), dpi=DPI, layout="constrained")
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    axes = figure.subplots(len(heights), 1, squeeze=False, gridspec_kw={"height_ratios": list(inches)})
    return figure, list(axes.flat)


def _grid(title: str, count: int, each_in: float, *, share_x: bool = False) -> tuple[Figure, list[Axes]]:
    """Two panels beside each other."""
    from matplotlib.figure import Figure

    columns = min(2, count)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(WIDTH_IN, rows * each_in + 0.6), dpi=DPI, layout="constrained")
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    axes = list(figure.subplots(rows, columns, squeeze=False, sharex=share_x).flat)
    for axis in axes[count:]:
        axis.set_axis_off()
    for axis in axes[max(0, count - columns) : count]:
        axis.tick_params(axis="x", labelbottom=True)
    return figure, axes


def _bare(axis: Axes, grid: Literal["x", "y"]) -> None:
    for side in ("top", "right", "left" if grid == "x" else "bottom"):
        axis.spines[side].set_visible(False)
    axis.grid(axis=grid, color="#dddddd", linewidth=0.7, zorder=0)
    axis.set_axisbelow(True)
    axis.tick_params(labelsize=8, length=0 if grid == "x" else 3)


def _png(figure: Figure) -> bytes:
    """With few colours, which makes it small, and without anything of the time or the program."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    image = Image.frombuffer("RGBA", canvas.get_width_height(), canvas.buffer_rgba(), "raw", "RGBA", 0, 1)
    written = io.BytesIO()
    few = image.convert("RGB").quantize(COLOURS_IN_FILE, dither=Image.Dither.NONE)
    few.save(written, "PNG", optimize=True)
    return written.getvalue()
