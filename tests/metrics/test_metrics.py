"""What is counted, and how it is shown: read back by Prometheus' own parser."""

from __future__ import annotations

import pytest
import trio
from prometheus_client.parser import text_string_to_metric_families
from trio.testing import MockClock

from cachefs.cli.metrics_reference import PROCESSES
from cachefs.metrics import BOUNDS_S, Metric, Monitor, Times, counter, errors_of, gauge, histogram

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, object]]:
    return "trio", {"clock": MockClock(autojump_threshold=0)}


async def samples(monitor: Monitor) -> Samples:
    """(name, labels) -> value of all that is shown."""
    answer = await monitor.answer("/metrics")
    assert answer is not None and answer[:2] == (200, "text/plain; version=0.0.4; charset=utf-8")
    found: Samples = {}
    for family in text_string_to_metric_families(answer[2].decode()):
        assert family.documentation, family.name
        for each in family.samples:
            key = (each.name, tuple(sorted(each.labels.items())))
            assert key not in found
            found[key] = each.value
    return found


async def test_times_are_shown_as_buckets_that_add_up() -> None:
    times: Times[str] = Times()
    for seconds in (0.0, BOUNDS_S[0], 0.0003, 0.2, 100.0):
        times.observe("get", seconds)
    times.observe("put", 0.2, ok=False)
    monitor = Monitor("test")
    monitor.watch([histogram("cachefs_x_seconds", "X.", lambda parts: parts, "operation")], times)
    monitor.watch([counter("cachefs_x_errors_total", "Errors of X.", errors_of, "operation")], times)
    found = await samples(monitor)

    def bucket(upper: str) -> float:
        return found["cachefs_x_seconds_bucket", (("le", upper), ("operation", "get"))]

    assert [bucket(upper) for upper in ("2e-05", "0.00025", "0.0005", "0.1", "0.25", "30.0", "+Inf")] == [
        *(2, 2, 3, 3, 4, 4, 5)
    ]
    assert found["cachefs_x_seconds_count", (("operation", "get"),)] == 5
    assert found["cachefs_x_seconds_sum", (("operation", "get"),)] == pytest.approx(100.2003 + BOUNDS_S[0])
    assert found["cachefs_x_errors_total", (("operation", "get"),)] == 0
    assert found["cachefs_x_errors_total", (("operation", "put"),)] == 1


async def test_the_process_and_its_version_are_shown() -> None:
    found = await samples(Monitor("worker"))
    assert found["process_resident_memory_bytes", ()] > 1 << 20
    (labels,) = [dict(labels) for name, labels in found if name == "cachefs_build_info"]
    assert labels["process"] == "worker" and labels["version"]


async def test_what_there_is_nothing_to_tell_of_is_left_out() -> None:
    monitor = Monitor("test")
    monitor.watch([gauge("cachefs_nothing", "Nothing.", lambda parts: None)], None)
    assert not [name for name, _ in await samples(monitor) if name == "cachefs_nothing"]


async def test_a_text_is_made_ten_times_a_second_at_most() -> None:
    made = 0

    def read(parts: object) -> float:
        nonlocal made
        made += 1
        return made

    monitor = Monitor("test")
    monitor.watch([gauge("cachefs_made", "Made.", read)], None)
    for _ in range(100):
        await samples(monitor)
    assert made == 1
    await trio.sleep(0.2)
    assert (await samples(monitor))["cachefs_made", ()] == 2


async def test_ready_that_is_not_found_out_in_time_is_not_ready() -> None:
    async def hangs() -> str | None:
        await trio.sleep_forever()

    monitor = Monitor("test")
    monitor.ready_if(hangs)
    status, _, body = await monitor.answer("/readyz") or (0, "", b"")
    assert status == 503 and b"within 2 s" in body


async def test_ready_is_what_the_service_says() -> None:
    monitor = Monitor("test")
    assert await monitor.answer("/readyz") == (503, "text/plain; charset=utf-8", b"it is starting\n")
    reason: str | None = "no"

    async def why_not_ready() -> str | None:
        return reason

    monitor.ready_if(why_not_ready)
    assert (await monitor.answer("/readyz") or ())[::2] == (503, b"no\n")
    reason = None
    assert (await monitor.answer("/readyz") or ())[::2] == (200, b"ready\n")
    assert await monitor.answer("/") is None


@pytest.mark.parametrize("name", ["cachefs_x_bytes", "x_total", "cachefs_X_total"])
def test_a_name_that_breaks_the_rules_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        counter(name, "X.", lambda parts: 0)


@pytest.mark.parametrize("process", PROCESSES)
def test_names_are_declared_once_and_say_their_unit(process: str) -> None:
    metrics: list[Metric[object]] = list(PROCESSES[process])
    assert len({metric.name for metric in metrics}) == len(metrics)
    for metric in metrics:
        assert metric.help.endswith(".")
        is_duration = metric.kind == "histogram" or metric.name.endswith(("_away_seconds", "_failing_seconds"))
        assert is_duration == metric.name.endswith("_seconds"), metric.name
        assert len(metric.labels) <= 1 or metric.kind != "histogram"
