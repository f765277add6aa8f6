"""Rules for every test: trio only, mounts of its own, and no WARNING that the test did not ask for."""

from __future__ import annotations

import compileall
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

import cachefs
from cachefs.cli.instances import runtime_root
from cachefs.fuse import Driver, why_no_pyfuse3
from cachefs.testing.own_mounts import leave_the_mounts_of_others

# The same examples in every run, so that a change is judged by itself, and no deadline: machines are slow at times.
# New examples: pytest --hypothesis-profile=explore.
settings.register_profile("steady", derandomize=True, deadline=None)
settings.register_profile("explore", max_examples=1000, deadline=None)
settings.load_profile("steady")

pytest_plugins = ["cachefs.testing.fixtures"]


def pytest_configure(config: pytest.Config) -> None:
    """Each process that runs tests sees the mounts and the running `cachefs up` of its own tests only: several do at
    once, and tests look at all there are. What a killed run leaves mounted goes with it.
    """
    if os.geteuid() == 0:
        leave_the_mounts_of_others(runtime_root(), "/dev/fuse")
    if not hasattr(config, "workerinput"):
        # Also where PYTHONDONTWRITEBYTECODE is set: hundreds of processes would compile all of it again, each of them
        # half of the time that it takes to start.
        compileall.compile_dir(str(Path(cachefs.__file__).parent), quiet=1)


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


@pytest.fixture(params=list(Driver), ids=lambda driver: driver.value)
def driver(request: pytest.FixtureRequest) -> Driver:
    """For what both drivers do alike: the test runs once with each.

    What has no such argument runs with the kernel driver only. Either because libfuse or pyfuse3 cannot do what it
    tests: passthrough, no-open mode, NOFLUSH, cached directories, interrupts, a successor after a killed server, other
    values of max_background, features of the kernel that are ignored. Or because no driver has a part in it.
    """
    driver: Driver = request.param
    reason = why_no_pyfuse3() if driver is Driver.PYFUSE3 else None
    if reason is not None:
        pytest.skip(f"pyfuse3 cannot be had: {reason}; see the Makefile")
    return driver
