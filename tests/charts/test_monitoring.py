"""Alerts and the dashboard ask for metrics that there are, by labels that they have."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.charts.rendered import NAMESPACE, of_kind

METRICS = Path(__file__).parents[2] / "docs" / "metrics.md"
FROM_SCRAPING = {"namespace", "service", "node", "le"}
"""Labels that the Prometheus operator, our relabelling and histograms add."""


def known() -> dict[str, set[str]]:
    """Metric -> its labels, as the documents say."""
    text = METRICS.read_text()
    found: dict[str, set[str]] = {"up": set(), "cachefs_build_info": {"version", "process"}}
    found |= {name: set() for name in re.findall(r"`(process_\w+)`", text)}
    for name, kind, labels in re.findall(r"^\| `(cachefs_\w+)` \| (\w+) \| ([^|]*) \|", text, re.MULTILINE):
        each = found.setdefault(name, set())
        each |= set(re.findall(r"`(\w+)`", labels))
        if kind == "histogram":
            for suffix in ("bucket", "sum", "count"):
                found[f"{name}_{suffix}"] = each
    # The mount service adds these to what the servers say of themselves.
    for name in re.findall(r"^\| `(cachefs_\w+)` ", part_of(text, "mount"), re.MULTILINE):
        found[name] |= {"mount", "mountpoint"}
    return found


def part_of(text: str, process: str) -> str:
    return text.partition(f"\n## {process}\n")[2].partition("\n## ")[0]


def scraped() -> set[str]:
    """Metrics of the processes that ServiceMonitors are for."""
    text = METRICS.read_text()
    watched = [
        each["metadata"]["labels"]["app.kubernetes.io/component"] for each in of_kind("monitoring", "ServiceMonitor")
    ]
    assert "`mount`" in part_of(text, "node-mounts")
    driver = ("CSI driver",)
    parts = {"mounts": ("node-mounts", "mount"), "csi-controller": driver, "csi-node": driver}
    return {
        name
        for component in watched
        for process in parts.get(component, (component,))
        for name in re.findall(r"^\| `(cachefs_\w+)` ", part_of(text, process), re.MULTILINE)
    }


def alerts() -> Iterator[tuple[str, str]]:
    (rule,) = of_kind("monitoring", "PrometheusRule")
    for group in rule["spec"]["groups"]:
        for each in group["rules"]:
            assert each["labels"]["severity"] in ("critical", "warning", "info")
            assert each["annotations"]["summary"] and each["annotations"]["description"]
            yield each["alert"], each["expr"]


def panels() -> Iterator[tuple[str, str]]:
    (config,) = of_kind("monitoring", "ConfigMap")
    dashboard = json.loads(config["data"]["cachefs.json"])
    places = [tuple(panel["gridPos"].values()) for panel in dashboard["panels"]]
    assert len(set(places)) == len(places) and dashboard["uid"] and dashboard["schemaVersion"]
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(places)
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            yield panel["title"], target["expr"]


def unknown(expression: str) -> list[str]:
    """What there is not."""
    metrics = known()
    found = []
    plain = re.sub(r'"[^"]*"', '""', expression)
    names = re.findall(r"\b(?:cachefs|process)_\w+|\bup\b", plain)
    assert names, expression
    found += [name for name in names if name not in metrics]
    for name, labels in re.findall(r"\b((?:cachefs|process)_\w+|up)\{([^}]*)\}", plain):
        asked = set(re.findall(r"(\w+)\s*=~?", labels))
        found += sorted(f"{name}: {label}" for label in asked - FROM_SCRAPING - metrics.get(name, asked))
    grouped = {label for group in re.findall(r"\bby \(([^)]*)\)", plain) for label in re.findall(r"\w+", group)}
    of_names = set[str]().union(*(metrics.get(name, set()) for name in names))
    found += sorted(grouped - FROM_SCRAPING - of_names)
    return found


def test_alerts_are_about_what_there_is() -> None:
    expressions = dict(alerts())
    assert len(expressions) >= 10
    for name, expression in expressions.items():
        assert unknown(expression) == [], name
        assert f'namespace="{NAMESPACE}"' in expression, name
        assert expression.count("(") == expression.count(")") and expression.count("{") == expression.count("}")


def test_the_dashboard_shows_what_there_is() -> None:
    shown = list(panels())
    assert len(shown) >= 10
    for title, expression in shown:
        assert unknown(expression) == [], title
        assert 'namespace="$namespace"' in expression, title
        assert expression.count("(") == expression.count(")") and expression.count("{") == expression.count("}")


def test_what_is_asked_for_is_scraped_on_a_cluster() -> None:
    """Not only known: shown by a process of the chart."""
    asked = {
        re.sub("_(bucket|sum|count)$", "", name)
        for _, expression in (*alerts(), *panels())
        for name in re.findall(r"\bcachefs_\w+", re.sub(r'"[^"]*"', "", expression))
    }
    assert asked and asked <= scraped()


@pytest.mark.parametrize(
    ("expression", "missing"),
    [
        ("rate(cachefs_hit_total[5m])", ["cachefs_hit_total"]),
        ('cachefs_fetches_waiting{que="demand"}', ["cachefs_fetches_waiting: que"]),
        ("sum by (sort) (cachefs_hits_total)", ["sort"]),
    ],
)
def test_what_there_is_not_is_found(expression: str, missing: list[str]) -> None:
    assert unknown(expression) == missing


def test_annotations_name_labels_that_their_alert_has() -> None:
    (rule,) = of_kind("monitoring", "PrometheusRule")
    metrics = known()
    for each in rule["spec"]["groups"][0]["rules"]:
        first = re.findall(r"\b(?:cachefs_\w+|up)\b", each["expr"])[0]
        for label in re.findall(r"\$labels\.(\w+)", json.dumps(each["annotations"])):
            assert label in FROM_SCRAPING | metrics[first], each["alert"]
