"""The runner: results are complete, and whatever systems do, it ends in order."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from bench import server, space
from bench.children import MARK
from bench.machine import medium_of
from bench.results import Gap, Results, load, save
from bench.run import Plan, in_turn, run
from bench.systems.base import Mounted, Source, System
from bench.systems.native import Native
from bench.workloads.base import Data, Scale
from cachefs.fuse import all_mounts, probe
from cachefs.testing.s3server import S3Server
from tests.bench.reading import Absent, Bare, Broken, Leaving, Reading
from tests.chaos.leaks import processes_with

ROOT = Path(__file__).parent.parent.parent
needs_mounts = pytest.mark.skipif(not probe().passthrough_possible, reason="the bare server of these tests needs it")


@pytest.fixture(autouse=True)
def shared_server(monkeypatch: pytest.MonkeyPatch, s3_server: S3Server) -> None:
    """Starting one takes longer than all that these tests look at."""

    @contextmanager
    def running(directory: Path) -> Iterator[S3Server]:
        directory.mkdir(parents=True, exist_ok=True)
        yield s3_server

    monkeypatch.setattr(server, "running_server", running)


@pytest.fixture
def no_ceiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once is enough."""
    monkeypatch.setattr(server.Ceiling, "measure", lambda self: None)
    monkeypatch.setattr(server.Ceiling, "measures", lambda self: iter(()))


def results_of(directory: Path, systems: Mapping[str, System], rounds: int, **options: str) -> Results:
    said: list[str] = []
    workload = Reading(Scale.SMOKE, options)
    plan = Plan(
        name="test",
        workloads=[workload],
        systems=systems,
        scale=Scale.SMOKE,
        directory=directory,
        command=["python", "-m", "bench"],
        rounds=rounds,
        say=said.append,
    )
    results = run(plan)
    assert said
    assert list(directory.iterdir()) == []
    assert not [each for each in all_mounts() if each.mountpoint.startswith(f"{directory}/")]
    return results


def gaps_of(results: Results) -> dict[str, Gap]:
    return {each.system: each for each in results.gaps}


@needs_mounts
def test_results_have_every_system_and_round(tmp_path: Path) -> None:
    results = results_of(tmp_path, {"native": Native(), "bare": Bare("bare"), "absent": Absent("absent")}, 2)
    assert [(each.workload, each.system, each.metric, len(each.values)) for each in results.measures] == [
        ("server", "", "bytes_per_s", 2),
        ("server", "", "files_per_s", 2),
        ("reading", "native", "bytes_per_s", 2),
        ("reading", "native", "round", 2),
        ("reading", "bare", "bytes_per_s", 2),
        ("reading", "bare", "round", 2),
    ]
    for each in results.measures:
        assert each.values == [0, 1] if each.metric == "round" else all(value > 0 for value in each.values)
    assert results.gaps == [Gap(workload="reading", system="absent", kind="missing", why="buy it")]
    assert results.flags["bare"] == ["--bare"] and results.versions["bare"] == "1"
    assert {"native", "seaweedfs"} <= set(results.versions) and "absent" not in results.versions
    assert results.machine.medium == medium_of(tmp_path)
    assert (results.name, results.scale, results.command) == ("test", "smoke", ["python", "-m", "bench"])
    kept = tmp_path / "results" / "test.json"
    save(results, kept)
    assert load(kept) == results


@needs_mounts
@pytest.mark.usefixtures("no_ceiling")
def test_a_system_that_crashes_or_fails_is_left_out_and_the_others_go_on(tmp_path: Path) -> None:
    names = ("killed", "raising", "other", "broken")
    systems = {name: Broken(name) if name == "broken" else Bare(name) for name in names}
    results = results_of(tmp_path, systems, 2, do="killed:kill,raising:raise,other:gap")
    gaps = gaps_of(results)
    assert {name: gap.kind for name, gap in gaps.items()} == {
        "killed": "crashed",
        "raising": "failed",
        "other": "skipped",
        "broken": "failed",
    }
    assert "its process ended" in gaps["killed"].why
    assert "asked to fail" in gaps["raising"].why
    assert "no such mount" in gaps["broken"].why
    assert gaps["other"].case == "other"
    assert len(results.gaps) == 4
    rounds = {each.system: each.values for each in results.measures if each.metric == "round"}
    assert rounds == {"killed": [0], "raising": [0], "other": [0, 1]}


@pytest.mark.usefixtures("no_ceiling")
@pytest.mark.parametrize("in_memory", [True, False])
def test_a_server_that_reads_a_disk_reads_it_for_everyone(
    in_memory: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dropped: list[str] = []
    monkeypatch.setattr(space, "server_fits_memory", lambda bucket, scale: in_memory)
    monkeypatch.setattr("bench.run.drop_page_cache", lambda: dropped.append("all"))
    monkeypatch.setattr(os, "sync", lambda: None)
    results_of(tmp_path, {"native": Native()}, 1)
    assert len(dropped) == (0 if in_memory else 1)


class Stuck(Bare):
    """It gets less time than the others, which makes no difference to one that takes for ever."""

    def __init__(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(name)
        self._monkeypatch = monkeypatch

    @contextmanager
    def mounted(self, source: Source, place: Path, cache_bytes: int) -> Iterator[Mounted]:
        with super().mounted(source, place, cache_bytes) as mounted, self._monkeypatch.context() as patched:
            patched.setattr(Reading, "limit_s", lambda self: 4.0)
            yield mounted


@needs_mounts
@pytest.mark.usefixtures("no_ceiling")
def test_a_mount_that_hangs_is_ended_and_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    systems = {"stuck": Stuck("stuck", monkeypatch), "native": Native()}
    results = results_of(tmp_path, systems, 2, do="stuck:stop")
    (gap,) = results.gaps
    assert (gap.system, gap.kind, gap.case) == ("stuck", "hung", "")
    assert "4 s" in gap.why
    assert [each.values for each in results.measures if (each.system, each.metric) == ("native", "round")] == [[0, 1]]


@pytest.mark.usefixtures("no_ceiling")
def test_data_that_cannot_be_made_is_a_gap_of_every_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # In the process that makes them, `own` still has three bytes.
    monkeypatch.setattr(Reading, "data", lambda self: Data(name="reading", files={"own": 4}))
    results = results_of(tmp_path, {"native": Native()}, 1)
    (gap,) = results.gaps
    assert (gap.system, gap.kind) == ("native", "failed")
    assert "own: 3 bytes were made instead of the 4" in gap.why


@needs_mounts
def test_interrupted_in_a_mount_that_hangs_it_leaves_nothing(tmp_path: Path, s3_server: S3Server) -> None:
    address = [s3_server.endpoint, s3_server.key, s3_server.secret]
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.bench.interrupted", str(tmp_path), *address],
        cwd=ROOT,
        env={**os.environ, MARK: f"test-{tmp_path.name}-{os.getpid()}"},
        stderr=subprocess.PIPE,
    )
    try:
        while not list(tmp_path.glob("cachefs-bench-*/native/reached")):
            assert process.poll() is None, process.communicate()[1].decode()
            time.sleep(0.05)
        assert [each for each in all_mounts() if each.mountpoint.startswith(f"{tmp_path}/")]
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate()
    finally:
        process.kill()
        process.wait()
    assert said.decode().rstrip().endswith("KeyboardInterrupt")
    assert list(tmp_path.iterdir()) == []
    assert not [each for each in all_mounts() if each.mountpoint.startswith(f"{tmp_path}/")]
    assert processes_with(str(tmp_path)) == {}


@needs_mounts
def test_what_a_workload_on_its_own_leaves_is_taken_away(tmp_path: Path) -> None:
    plan = Plan(
        name="test",
        workloads=[Leaving(Scale.SMOKE)],
        systems={},
        scale=Scale.SMOKE,
        directory=tmp_path,
        command=[],
    )
    results = run(plan)
    assert [(each.case, each.values) for each in results.measures] == [("one", [1.0])]
    assert [(each.kind, each.case) for each in results.gaps] == [("skipped", "two"), ("failed", "")]
    assert f"left {tmp_path}" in results.gaps[1].why
    assert list(tmp_path.iterdir()) == []
    assert not [each for each in all_mounts() if each.mountpoint.startswith(f"{tmp_path}/")]
    assert processes_with(str(tmp_path)) == {}


@pytest.mark.usefixtures("no_ceiling")
def test_a_mistake_in_an_adapter_does_not_lose_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mounted(source: Source, place: Path, cache_bytes: int) -> AbstractContextManager[Mounted]:
        raise KeyError("nobody expects this")

    mistaken = Bare("mistaken")
    monkeypatch.setattr(mistaken, "mounted", mounted)
    results = results_of(tmp_path, {"native": Native(), "mistaken": mistaken}, 1)
    assert [each.system for each in results.measures] == ["native", "native"]
    (gap,) = results.gaps
    assert (gap.workload, gap.system, gap.kind) == ("reading", "", "failed")
    assert "nobody expects this" in gap.why


@pytest.mark.usefixtures("no_ceiling")
def test_without_time_only_first_rounds_are_measured(tmp_path: Path) -> None:
    plan = Plan(
        name="test",
        workloads=[Reading(Scale.SMOKE)],
        systems={"native": Native()},
        scale=Scale.SMOKE,
        directory=tmp_path,
        command=[],
        rounds=3,
        minutes=0,
    )
    results = run(plan)
    assert [each.values for each in results.measures if each.metric == "round"] == [[0]]
    assert [(each.workload, each.kind, each.case) for each in results.gaps] == [
        ("reading", "skipped", "round 2 and later")
    ]


def test_with_a_limit_of_time_each_workload_has_its_first_round_first(tmp_path: Path) -> None:
    first, second = Reading(Scale.STANDARD), Reading(Scale.STANDARD)
    second.name = "second"
    alone = Leaving(Scale.STANDARD)

    def turns(minutes: float | None) -> list[tuple[str, int]]:
        plan = Plan(
            name="test",
            workloads=[first, second, alone],
            systems={},
            scale=Scale.STANDARD,
            directory=tmp_path,
            command=[],
            rounds=2,
            minutes=minutes,
        )
        return [(each.name, round_) for each, round_ in plan.turns()]

    assert turns(None) == [("reading", 0), ("reading", 1), ("second", 0), ("second", 1), ("leaving", 0)]
    assert turns(5) == [("reading", 0), ("second", 0), ("leaving", 0), ("reading", 1), ("second", 1)]


def test_data_takes_room_only_while_it_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = Reading(Scale.SMOKE), Reading(Scale.SMOKE)
    monkeypatch.setattr(second, "data", lambda: Data(name="other", files={"one": 3_000_000}))
    one = space.needs([first], ["native"]).disk
    assert space.needs([first, second], ["native"]).disk == one
    assert space.needs([first, second, first], ["native"]).disk > one + 6_000_000


def test_each_round_has_another_order() -> None:
    orders = [in_turn(["a", "b", "c"], round_) for round_ in range(6)]
    assert all(sorted(each) == ["a", "b", "c"] for each in orders)
    assert [each[0] for each in orders] == ["a", "b", "c"] * 2
    assert {each[-1] for each in orders} == {"a", "b", "c"}
    assert len({tuple(each) for each in orders}) == 6
    assert in_turn([], 3) == []


def test_too_little_room_is_said_before_anything_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = Reading(Scale.FULL), Reading(Scale.FULL)
    large.name = "much"
    monkeypatch.setattr(large, "data", lambda: Data(name="much", files={"one": 50 * 10**9}))
    monkeypatch.setattr(space, "free", lambda directory: 3 * 10**9)
    monkeypatch.setattr(space, "memory", lambda what: 64 * 10**9)
    plan = Plan(
        name="test",
        workloads=[small, large],
        systems={"native": Native()},
        scale=Scale.FULL,
        directory=tmp_path,
        command=[],
    )
    with pytest.raises(space.TooLittle) as caught:
        run(plan)
    message = str(caught.value)
    assert "158." in message and "3.0 GB are there" in message
    assert "reading (" in message.partition("By itself would fit")[2] and "much (" not in message
    assert "--scale standard would fit" in message
    assert list(tmp_path.iterdir()) == []


def test_too_little_memory_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(space, "memory", lambda what: 600 << 20)
    with pytest.raises(space.TooLittle, match=r"of memory are needed at scale standard.* --scale smoke would fit"):
        space.check(tmp_path, Scale.STANDARD, [Reading(Scale.STANDARD)], ["native"])


def test_juicefs_needs_room_for_a_bucket_of_its_own() -> None:
    workload = Reading(Scale.SMOKE)
    size = workload.data().size_bytes
    more = space.needs([workload], ["native", "juicefs"]).disk - space.needs([workload], ["native"]).disk
    assert size <= more <= 1.1 * size
