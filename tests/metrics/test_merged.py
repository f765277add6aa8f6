"""Texts of several processes as one: what Prometheus' own parser reads of it."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cachefs.metrics import Times, counter, gauge, histogram
from cachefs.metrics.exposition import Exposition
from cachefs.metrics.merged import merged

TIMES: Times[str] = Times()
TIMES.observe("open", 0.001)
METRICS = (
    gauge("cachefs_open_files", "Handles.", lambda parts: parts),
    counter("cachefs_opens_total", "Opened, by \\ mode.", lambda parts: {("cached",): parts}, "mode"),
    histogram("cachefs_fuse_operation_seconds", "How long.", lambda parts: TIMES, "operation"),
)


def text(role: str, parts: float, *more: str) -> bytes:
    made = Exposition(role)
    made.add(METRICS, parts)
    if more:
        made.add((gauge(more[0], "Its own.", lambda parts: 7),), None)
    return made.text()


def samples(shown: bytes) -> dict[str, dict[frozenset[tuple[str, str]], float]]:
    """By name and labels. Fails where a metric is described twice, or stands in two places."""
    names = [line.split()[2] for line in shown.decode().splitlines() if line.startswith("# TYPE")]
    assert len(set(names)) == len(names)
    found: dict[str, dict[frozenset[tuple[str, str]], float]] = {}
    for family in text_string_to_metric_families(shown.decode()):
        for each in family.samples:
            of_name = found.setdefault(each.name, {})
            key = frozenset(each.labels.items())
            assert key not in of_name, each
            of_name[key] = each.value
    return found


def test_what_is_alone_stays_as_it_is() -> None:
    alone = text("a", 1)
    assert merged(alone, []) == alone


@pytest.mark.parametrize("value", ["vol-1", "carriage\rreturn", 'odd "quoted" \\ name\nof two lines', ""])
def test_others_are_told_apart_by_their_labels(value: str) -> None:
    shown = samples(
        merged(
            text("node-mounts", 1, "cachefs_node_mounts"),
            [({"mount": value}, text("mount", 2)), ({"mount": "other"}, text("mount", 3))],
        )
    )
    assert shown["cachefs_node_mounts"] == {frozenset(): 7}
    of_value, of_other = ("mount", value), ("mount", "other")
    assert shown["cachefs_open_files"] == {frozenset(): 1, frozenset({of_value}): 2, frozenset({of_other}): 3}
    cached = ("mode", "cached")
    assert shown["cachefs_opens_total"][frozenset({of_value, cached})] == 2
    assert shown["cachefs_fuse_operation_seconds_count"][frozenset({of_other, ("operation", "open")})] == 1
    buckets = shown["cachefs_fuse_operation_seconds_bucket"]
    assert buckets[frozenset({of_other, ("operation", "open"), ("le", "+Inf")})] == 1
    roles = {dict(labels)["process"] for labels in shown["cachefs_build_info"]}
    assert roles == {"node-mounts", "mount"}


def test_what_is_no_text_of_metrics_adds_nothing() -> None:
    assert merged(text("a", 1), [({"mount": "x"}, b"<html>not found</html>\n")]) == text("a", 1)
