"""Rules for every test: trio only, and no WARNING that the test did not ask for."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
from hypothesis import settings

# The same examples in every run, so that a change is judged by itself, and no deadline: machines are slow at times.
# New examples: pytest --hypothesis-profile=explore.
settings.register_profile("steady", derandomize=True, deadline=None)
settings.register_profile("explore", max_examples=1000, deadline=None)
settings.load_profile("steady")

pytest_plugins = ["cachefs.testing.fixtures"]


@pytest.fixture
def anyio_backend() -> str:
    return "trio"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Fail a test that logs WARNING or worse, unless it is marked `expect_warnings("why")`."""
    records: list[logging.LogRecord] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record)

    handler = Collect(logging.WARNING)
    logging.getLogger("cachefs").addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger("cachefs").removeHandler(handler)
    if records and item.get_closest_marker("expect_warnings") is None:
        pytest.fail("unexpected warnings:\n" + "\n".join(f"{r.name}: {r.getMessage()}" for r in records))
