"""What several tests of the chart need."""

from __future__ import annotations

from functools import cache

import pytest


@pytest.fixture
def schemas_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    utils = pytest.importorskip("kubernetes_validate").utils
    monkeypatch.setattr(utils, "schema_contents", cache(utils.schema_contents))
