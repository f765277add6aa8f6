"""Names that somebody was told do not exist."""

from __future__ import annotations

import pytest

from cachefs.master import denied as denied_module
from cachefs.master.denied import Denied
from cachefs.model import Ino


def test_the_latest_ones_are_remembered_and_that_others_were_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(denied_module, "_MOST", 2)
    denied = Denied()
    for number, name in enumerate(("a", "b", "a"), 1):
        denied.add(Ino(1), name, number)
    assert denied.asked_ns(Ino(1), "a") == 3 and denied.asked_ns(Ino(2), "a") == 0 and not denied.has_forgotten
    denied.add(Ino(1), "c", 4)
    assert (Ino(1), "b") not in denied and (Ino(1), "a") in denied and denied.has_forgotten
    assert denied.discard(Ino(1), "c") and not denied.discard(Ino(1), "c") and not denied.discard(Ino(1), "b")
