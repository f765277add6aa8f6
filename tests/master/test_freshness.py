"""How long names are believed."""

from __future__ import annotations

import time

import pytest

from cachefs.master.freshness import NS_PER_S, Freshness


@pytest.mark.parametrize(
    ("sync_interval_s", "believed"),
    [
        (0.0, {"never": False, "now": False, "before": False, "ahead": False}),
        (60.0, {"never": False, "now": True, "before": False, "ahead": False}),
        (-1.0, {"never": False, "now": True, "before": True, "ahead": True}),
    ],
)
def test_what_is_believed(sync_interval_s: float, believed: dict[str, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    now_ns = 1_000_000 * NS_PER_S
    monkeypatch.setattr(time, "time_ns", lambda: now_ns)
    freshness = Freshness(sync_interval_s)
    checked_ns = {"never": 0, "now": freshness.now_ns(), "before": now_ns - 60 * NS_PER_S, "ahead": now_ns + NS_PER_S}
    assert {name: freshness.is_fresh(at) for name, at in checked_ns.items()} == believed
