"""What changed between two runs: arithmetic, what counts, and what is refused."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from bench import ratios
from bench.compare import CannotCompare, Change, compare, show
from bench.compare import command as compare_command
from bench.results import Better, Gap, Machine, Measure, Results, save

MACHINE = Machine(kernel="6.18", cpu="one", processors=2, memory_bytes=8 << 30, medium="tmpfs", python="3.11.7")


def measure(system: str, values: list[float], **others: Any) -> Measure:
    filled = {"workload": "fio", "case": "a", "metric": "bytes_per_s", "unit": "B/s", "better": "more", **others}
    return Measure(system=system, values=values, **filled)


def results(*measures: Measure, **others: Any) -> Results:
    filled = {
        "name": "run",
        "began": "2026-11-25T22:00:00Z",
        "seconds": 1.0,
        "command": [],
        "revision": "d0aa98a",
        "machine": MACHINE,
        "versions": {},
        "flags": {},
        "scale": "standard",
        "gaps": [],
        **others,
    }
    return Results(measures=list(measures), **filled)


def only(before: Measure, after: Measure, ratio: float = 1.2) -> Change:
    (change,) = compare(results(before), results(after), ratio).changes
    return change


POSITIVE = st.floats(1e-6, 1e12)
ROUNDS = st.lists(POSITIVE, min_size=1, max_size=7)
BETTER = st.sampled_from(["more", "less"])
SYSTEM = st.sampled_from(["cachefs", "cachefs_pyfuse3", "rclone", "native", ""])
RATIO = st.floats(1.01, 5)


@st.composite
def measures(draw: st.DrawFn) -> list[Measure]:
    found = {}
    for case in draw(st.lists(st.sampled_from("abc"), unique=True, max_size=3)):
        better = draw(BETTER)
        for system in draw(st.lists(SYSTEM, unique=True)):
            found[case, system] = measure(system, draw(ROUNDS), case=case, better=better)
    return list(found.values())


@given(measures(), RATIO)
def test_a_run_is_the_same_as_itself(some: list[Measure], ratio: float) -> None:
    compared = compare(results(*some), results(*some), ratio)
    assert {each.kind for each in compared.changes} <= {"same"}
    assert all(each.times == 1 and each.times_to_native in (None, 1) for each in compared.changes)
    assert not (compared.failed or compared.new or compared.gone or compared.warnings)
    assert len(compared.changes) == len(some)


@given(ROUNDS, ROUNDS, BETTER, RATIO)
def test_backwards_better_is_worse(one: list[float], other: list[float], better: Better, ratio: float) -> None:
    forth = only(measure("cachefs", one, better=better), measure("cachefs", other, better=better), ratio)
    back = only(measure("cachefs", other, better=better), measure("cachefs", one, better=better), ratio)
    assert math.isclose(forth.times * back.times, 1)
    if not math.isclose(max(forth.times, back.times), ratio):
        opposite = {"better": "worse", "worse": "better", "noise": "noise", "same": "same"}
        assert opposite[forth.kind] == back.kind


@given(ROUNDS, ROUNDS, BETTER, RATIO)
def test_only_what_is_apart_and_past_the_ratio_is_a_change(
    one: list[float], other: list[float], better: Better, ratio: float
) -> None:
    before, after = measure("cachefs", one, better=better), measure("cachefs", other, better=better)
    compared = compare(results(before), results(after), ratio)
    (change,) = compared.changes
    gained = after.median / before.median if better == "more" else before.median / after.median
    assert math.isclose(change.times, gained)
    assert compared.failed == (change.kind == "worse")
    if change.kind in ("better", "worse"):
        assert ratios.apart(one, other) and max(gained, 1 / gained) > ratio * 0.999
        assert (gained > 1) == (change.kind == "better")
    if change.kind == "noise":
        assert not ratios.apart(one, other)


@given(ROUNDS, BETTER, st.floats(0.01, 100))
def test_a_slower_machine_is_no_change(rounds: list[float], better: Better, factor: float) -> None:
    native = [each * 2 for each in rounds]
    before = results(measure("native", native, better=better), measure("cachefs", rounds, better=better))
    slower = [[each * factor for each in values] for values in (native, rounds)]
    after = results(measure("native", slower[0], better=better), measure("cachefs", slower[1], better=better))
    compared = compare(before, after, 1.2)
    (ours,) = (each for each in compared.changes if each.system == "cachefs")
    assert ours.times_to_native is not None and math.isclose(ours.times_to_native, 1)
    assert ours.kind == "same" and not compared.failed


@given(ROUNDS, ROUNDS)
def test_apart_is_symmetric_and_never_true_of_what_has_a_common_middle(one: list[float], other: list[float]) -> None:
    assert ratios.apart(one, other) == ratios.apart(other, one)
    assert not ratios.apart(one, one)
    lowest, highest = ratios.usual(one)
    assert min(one) <= lowest <= highest <= max(one)


@given(ROUNDS, ROUNDS, BETTER)
def test_ratios_of_rounds_are_paired_where_they_can_be(one: list[float], other: list[float], better: Better) -> None:
    found = ratios.ratios(measure("cachefs", one, better=better), measure("native", other, better=better))
    assert len(found) == (len(one) if len(one) == len(other) else 1)
    assert all(each > 0 for each in found)


def test_one_bad_round_of_five_is_noise_and_one_of_three_makes_it_so() -> None:
    steady = [100.0, 101.0, 102.0, 103.0, 104.0]
    assert only(measure("cachefs", steady), measure("cachefs", [50.0, 51.0, 52.0, 53.0, 104.0])).kind == "worse"
    assert only(measure("cachefs", steady[:3]), measure("cachefs", [50.0, 51.0, 102.0])).kind == "noise"


def test_it_is_the_ratio_to_native_that_decides() -> None:
    before = results(measure("native", [100.0]), measure("cachefs", [90.0]))
    slower = results(measure("native", [50.0]), measure("cachefs", [45.0]))
    assert not compare(before, slower, 1.2).failed
    worse = compare(before, results(measure("native", [200.0]), measure("cachefs", [90.0])), 1.2)
    assert worse.failed
    assert [(each.kind, each.times, each.times_to_native) for each in worse.changes] == [
        ("better", 2.0, None),
        ("worse", 1.0, 0.5),
    ]


@pytest.mark.parametrize(
    ("before", "after", "better", "times", "kind"),
    [
        (0.0, 0.0, "less", 1.0, "same"),
        (0.0, 5.0, "less", 0.0, "worse"),
        (5.0, 0.0, "less", math.inf, "better"),
        (0.0, 5.0, "more", math.inf, "better"),
        (5.0, 0.0, "more", 0.0, "worse"),
        (-1.0, 1.0, "less", 0.0, "worse"),
        (-1.0, -2.0, "less", math.inf, "better"),
    ],
)
def test_nothing_and_less_than_nothing(before: float, after: float, better: Better, times: float, kind: str) -> None:
    change = only(measure("cachefs", [before], better=better), measure("cachefs", [after], better=better))
    assert (change.times, change.kind) == (times, kind)


def test_native_that_reads_nothing_is_nothing_to_measure_by() -> None:
    before = results(measure("native", [0.0]), measure("cachefs", [10.0]))
    after = results(measure("native", [0.0]), measure("cachefs", [5.0]))
    (ours,) = (each for each in compare(before, after, 1.2).changes if each.system == "cachefs")
    assert (ours.times_to_native, ours.kind) == (None, "worse")


@pytest.mark.parametrize(
    ("system", "failed"),
    [
        ("cachefs", True),
        ("cachefs_pyfuse3", True),
        ("", True),
        ("native", False),
        ("rclone", False),
        ("synthetic", False),
    ],
)
def test_only_ours_makes_it_fail(system: str, failed: bool) -> None:
    compared = compare(results(measure(system, [10.0])), results(measure(system, [5.0])), 1.2)
    assert compared.changes[0].kind == "worse" and compared.changes[0].counts == compared.failed == failed


@pytest.mark.parametrize("case", ["", "a"])
@pytest.mark.parametrize(
    ("system", "kind", "failed"),
    [
        ("cachefs", "crashed", True),
        ("cachefs", "hung", True),
        ("cachefs", "failed", True),
        ("cachefs", "missing", False),
        ("cachefs", "skipped", False),
        ("rclone", "hung", False),
    ],
)
def test_what_is_broken_counts_and_what_was_not_asked_for_does_not(
    system: str, kind: Any, failed: bool, case: str
) -> None:
    gap = Gap(workload="fio", system=system, kind=kind, why="because", case=case)
    compared = compare(results(measure(system, [1.0])), results(gaps=[gap]), 1.2)
    assert [(each.system, each.why, each.counts) for each in compared.gone] == [(system, f"{kind}: because", failed)]
    assert compared.failed == failed
    without = compare(results(measure(system, [1.0])), results(), 1.2)
    assert not without.failed and [each.why for each in without.gone] == [""]


@pytest.mark.parametrize(
    ("system", "kind", "case", "failed"),
    [
        ("cachefs", "hung", "", True),
        ("cachefs", "crashed", "a", True),
        ("cachefs", "failed", "another", False),
        ("", "failed", "", True),
        ("cachefs", "skipped", "a", False),
        ("rclone", "hung", "", False),
    ],
)
def test_what_breaks_in_a_later_round_counts_though_there_are_figures(
    system: str, kind: Any, case: str, failed: bool
) -> None:
    gap = Gap(workload="fio", system=system, kind=kind, why="because", case=case)
    measured = (measure("cachefs", [1.0]), measure("rclone", [1.0]))
    compared = compare(results(*measured), results(*measured, gaps=[gap]), 1.2)
    assert compared.failed == failed
    assert [(each.system, each.why) for each in compared.gone] == ([(system, f"{kind}: because")] if failed else [])
    text = io.StringIO()
    show(compared, Console(file=text, width=160))
    assert ("because" in text.getvalue()) == failed
    assert not compare(results(*measured, gaps=[gap]), results(*measured, gaps=[gap]), 1.2).failed


def test_what_the_server_gives_by_itself_is_not_ours() -> None:
    before, after = (measure("", [value], workload="server") for value in (10.0, 5.0))
    assert not compare(results(before), results(after), 1.2).failed
    assert only(before, after).kind == "worse"


def test_what_is_new_or_has_another_unit_is_told() -> None:
    compared = compare(results(measure("cachefs", [1.0])), results(measure("cachefs", [1.0], unit="MB/s")), 1.2)
    assert len(compared.gone) == len(compared.new) == 1 and not compared.failed
    assert not compare(results(), results(measure("cachefs", [])), 1.2).new


def test_a_promise_that_is_no_longer_kept_is_told_however_small_the_change_is() -> None:
    promised = {"unit": "", "required": 0.9}
    before, after = results(measure("", [0.91], **promised)), results(measure("", [0.895], **promised))
    compared = compare(before, after, 1.2)
    assert [each.why for each in compared.no_longer_kept] == ["0.895, must be at least 0.9"]
    assert not compared.failed
    assert not compare(after, before, 1.2).no_longer_kept and not compare(after, after, 1.2).no_longer_kept


def test_what_only_explains_is_not_compared() -> None:
    assert not compare(results(measure("", [1.0], better="")), results(measure("", [9.0], better="")), 1.2).changes


def test_other_scales_are_refused_and_other_machines_told() -> None:
    with pytest.raises(CannotCompare, match="run is of scale standard and run of scale full"):
        compare(results(), results(scale="full"), 1.2)
    other = msgspec.structs.replace(MACHINE, cpu="another", memory_bytes=(8 << 30) + 4096)
    assert compare(results(), results(machine=other), 1.2).warnings == [
        "measured on different machines: processor was one, is another"
    ]
    with pytest.raises(ValueError, match="above 1"):
        compare(results(), results(), 1.0)


def test_it_is_shown_whatever_the_names_are() -> None:
    told = io.StringIO()
    before = results(
        measure("cachefs", [9e6], case="[bold]a[/]"), measure("rclone", [1.0]), measure("native", [4.0]), name="[red]"
    )
    after = results(measure("cachefs", [1e6], case="[bold]a[/]"), measure("s3fs", [1.0]), measure("native", [2.0]))
    show(compare(before, after, 1.5), Console(file=told, width=160))
    text = told.getvalue()
    for said in (
        "fio: [bold]a[/]",
        "[red]",
        "9.00 MB/s",
        "1.00 MB/s",
        "0.11",
        "worse",
        "gone",
        "new",
        "rclone",
        "s3fs",
    ):
        assert said in text, said
    assert "local files are 0.50 times as fast" in text
    assert "worse by more than 1.5: 1; broken: 0" in text


def test_the_command(tmp_path: Path) -> None:
    paths = [tmp_path / "a.json", tmp_path / "b.json", tmp_path / "full.json"]
    before, after = results(measure("cachefs", [10.0])), results(measure("cachefs", [7.0]), measure("s3fs", [0.0]))
    for each, path in zip((before, after, results(scale="full")), paths, strict=True):
        save(each, path)
    one, other, full = map(str, paths)

    def run(*arguments: str) -> Any:
        return CliRunner().invoke(compare_command, arguments)

    assert run(one, one).exit_code == run(other, one).exit_code == 0
    assert run(one, other).exit_code == 1
    assert run(one, other, "--ratio", "1.5").exit_code == 0
    said = json.loads(run(one, other, "--json").output)
    assert said["failed"] is True and said["changes"][0]["kind"] == "worse" and said["new"][0]["system"] == "s3fs"
    refused = run(one, full)
    assert refused.exit_code == 1 and "they did different work" in refused.output
    absent = run(one, str(tmp_path / "none.json"))
    assert absent.exit_code == 1 and "none.json cannot be read: No such file" in absent.output
    for wrong in ("1", "0.5", "x"):
        assert run(one, other, "--ratio", wrong).exit_code == 2
