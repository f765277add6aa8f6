"""Workloads that bring their own processes, in their smallest scale: what they tell is complete and consistent."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bench.results import Gap, Measure
from bench.workloads import cluster
from bench.workloads.base import Alone, Scale
from bench.workloads.checkpoint import Checkpoint
from bench.workloads.cluster import Cluster
from bench.workloads.metadata import Metadata
from bench.workloads.promises import Promises
from cachefs.fuse import probe
from cachefs.testing.s3server import S3Server

needs_mount = pytest.mark.skipif(not probe().can_mount, reason="nothing can be mounted here")


def measures(workload: Alone, directory: Path) -> list[Measure]:
    found = []
    for each in workload.run(directory):
        assert isinstance(each, Measure), each
        assert each.workload == workload.name
        assert each.values and all(value >= 0 for value in each.values), each
        found.append(each)
    assert len({(each.case, each.metric) for each in found}) == len(found)
    return found


@needs_mount
def test_metadata_tells_what_the_master_was_asked(tmp_path: Path) -> None:
    found = measures(Metadata(Scale.SMOKE, {"names": "1000"}), tmp_path)
    rates = {each.case: each.values[0] for each in found if each.metric == "files_per_s"}
    asked = {each.case: each.values[0] for each in found if each.metric == "master_requests"}
    assert set(rates) == set(asked) and len(rates) == 8
    assert asked["stat of 40 names, before their directory is listed"] > 0
    assert asked["ls -U of 1,000 names, again"] == 0
    assert asked["epoch of 40 files, cold"] > asked["epoch of 40 files, warm"]
    high = {each.case: each.values[0] for each in found if each.metric == "p99_s"}
    assert all(0 < each.values[0] <= high[each.case] for each in found if each.metric == "p50_s")


@needs_mount
def test_promises_say_what_is_required(tmp_path: Path) -> None:
    found = measures(Promises(Scale.SMOKE, {"lines": "warm"}), tmp_path)
    assert [(each.required, each.better) for each in found] == [(0.95, "more"), *[(0.9, "more")] * 3]
    assert all(len(each.values) == 1 and each.median > 0 for each in found)


def test_rows_of_a_cluster_say_what_is_required(
    tmp_path: Path, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def already_running(directory: Path) -> Iterator[S3Server]:
        yield s3_server

    monkeypatch.setattr(cluster, "running_s3_server", already_running)
    (row,) = measures(Cluster(Scale.SMOKE), tmp_path)
    assert (row.required, row.better, row.metric) == (1.02, "less", "ratio")
    assert 1 <= row.median <= 2, "one of two nodes fetches each file"


def test_a_promise_that_cannot_be_measured_does_not_end_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(directory: Path) -> Iterator[Measure]:
        raise SystemExit("no such luck")
        yield

    monkeypatch.setattr(cluster, "WITHOUT", {"peer_read": fails, "master_rate": fails})
    gaps = list(Cluster(Scale.SMOKE, {"rows": "peer_read+master_rate"}).run(tmp_path))
    assert all(isinstance(each, Gap) and each.kind == "failed" for each in gaps)
    assert [each.why for each in gaps if isinstance(each, Gap)] == [
        "peer_read: no such luck",
        "master_rate: no such luck",
    ]


def test_checkpoints_are_skipped_with_the_reason(tmp_path: Path) -> None:
    (gap,) = Checkpoint(Scale.SMOKE).run(tmp_path)
    assert isinstance(gap, Gap) and gap.kind == "skipped" and "read-only" in gap.why


@pytest.mark.parametrize(
    ("kind", "options", "known"),
    [
        (Promises, {"lines": "warm+hot"}, "'hot' is none of warm, no_open"),
        (Cluster, {"rows": "cold_starts"}, "'cold_starts' is none of cold_start, fractions"),
        (Metadata, {"names": "many"}, "metadata.names=many: it must be a number from 1000 on"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_options_that_are_not_known_say_what_is(kind: type[Alone], options: dict[str, str], known: str) -> None:
    with pytest.raises(ValueError, match=known.split(":")[0]) as raised:
        kind(Scale.SMOKE, options)
    assert known in str(raised.value)
