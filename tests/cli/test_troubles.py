"""What `cachefs report` says of what does not work."""

from __future__ import annotations

from typing import Any

from cachefs.cli.troubles import troubles_of, worker_troubles
from cachefs.model import Geometry
from cachefs.wire import messages as m


def worker(name: str, **changes: Any) -> m.WorkerInfo:
    known: dict[str, Any] = {"connected": True, "heard_s": 0.2, **changes}
    return m.WorkerInfo(name, "h:1", "/s", "boot", known.pop("connected"), 1, 2, **known)


def status(**changes: Any) -> m.WorkerStatus:
    counters = m.FetchCounters(0, 0, 0, 0, 0, 0, 0, 0)
    tier = m.TierInfo("ssd", "/tier", 1, 0, 0, 0, 0, 0, state=changes.pop("disk", "healthy"))
    return m.WorkerStatus("w", "n", 1.0, [tier], counters, m.OpenCounts(0, 0), **changes)


def cluster(*workers: m.WorkerInfo, mounts: tuple[m.MountInfo, ...] = ()) -> m.MasterStatus:
    return m.MasterStatus(m.ClusterInfo("c", "n", Geometry(1 << 20, 1 << 16), 60.0), 1.0, list(mounts), list(workers))


def test_nothing() -> None:
    infos = [worker("a"), worker("b")]
    store = m.StoreState("s3://b", 0.0, 5, "what was once")
    mounts = (m.MountInfo("/", "s3://b", 0, 0, 0, 3, failures=3, last_error="what was once"),)
    assert troubles_of(cluster(*infos, mounts=mounts), [(each, status(stores=[store])) for each in infos]) == []


def test_each_state_is_a_line() -> None:
    away = worker("away", connected=False, heard_s=75.0)
    silent = worker("silent", connected=False, silent=True, heard_s=12.4)
    never = worker("never", connected=False, heard_s=-1.0)
    going, lost, bad = worker("going", state="draining"), worker("lost"), worker("bad")
    fails = m.StoreState("s3://b", 30.0, 7, "no answer")
    details = status(stores=[fails], master_away_s=3.2, disk="limited")
    mounts = (m.MountInfo("/sets", "s3://b", 0, 0, 0, 3, failing_s=61.0, failures=3, last_error="denied"),)
    said = [(away, None), (silent, None), (never, None), (going, status()), (lost, None), (bad, details)]
    lines = [str(each) for each in troubles_of(cluster(*(info for info, _ in said), mounts=mounts), said)]
    assert lines == [
        "under-store /sets: fails for 61s: denied",
        "worker away: away for 75s",
        "worker silent: connected, and silent for 12s",
        "worker never: away",
        "worker going: draining",
        "worker lost: does not answer",
        "worker bad: without a master for 3s",
        "under-store s3://b (worker bad): fails for 30s: no answer",
        "tier ssd:/tier (worker bad): limited",
    ]


def test_without_an_answer() -> None:
    (only,) = worker_troubles("/run/w.sock", None)
    assert only.facts() == {
        "of": "worker",
        "name": "/run/w.sock",
        "state": "does not answer",
        "for_s": 0.0,
        "error": "",
    }
