"""The mount service when a mount of it cannot be served for long: a directory that is gone, a keeper that is away."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from cachefs.cli.mount_records import MountRecord, MountRecords
from cachefs.cli.mount_service import STARTING_S, MountService


@pytest.mark.expect_warnings("that it is not served is told")
def test_one_that_is_never_served_does_not_keep_the_service_from_being_ready(tmp_path: Path) -> None:
    """An update of a cluster waits for each pod to be ready: it would wait for ever."""
    clock = MockClock()  # it stands still by itself

    async def main() -> None:
        records = MountRecords(str(tmp_path / "state"))
        mountpoint = str(tmp_path / "mnt")
        records.save(MountRecord("vol", mountpoint, "/gone", {}))
        async with trio.open_nursery() as nursery:
            service = MountService(records, str(tmp_path / "no-keeper"), lambda _: [], lambda: False, nursery)
            service.go_on()
            for _ in range(1000):
                if "no-keeper" in service.mounts[0].why:
                    break
                await trio.to_thread.run_sync(time.sleep, 0.01)
            assert service.mounts[0].state == "starting"
            clock.jump(STARTING_S - 1)
            assert await service.why_not_ready() == "1 of 1 mounts are not served yet" and service.degraded() == []
            clock.jump(2)
            assert await service.why_not_ready() is None
            (line,) = service.degraded()
            assert line.startswith(f"{mountpoint}: ") and "no-keeper" in line
            nursery.cancel_scope.cancel()

    trio.run(main, clock=clock)
