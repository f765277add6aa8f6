"""The thread of an event loop that an under-store has: how it ends, also when what it runs does not."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import trio

from cachefs.ufs.bridge import open_bridge

LIMIT_S = 60.0


def threads() -> list[str]:
    return sorted(each.name for each in threading.enumerate() if each.name.startswith("bridge"))


@pytest.fixture
def released() -> Iterator[threading.Event]:
    """At the end nothing hangs any more."""
    event = threading.Event()
    yield event
    event.set()
    for each in threading.enumerate():
        if each.name.startswith("bridge"):
            each.join(LIMIT_S)
    assert not threads()


async def test_its_threads_have_ended_when_it_has() -> None:
    async with open_bridge("bridge") as bridge:
        assert len(threads()) == 5

        async def add() -> int:
            done: list[int] = []
            await bridge.in_thread(lambda: done.append(1))
            return len(done)

        assert await bridge.run(add) == 1
    assert not threads()


@pytest.mark.expect_warnings("that closing fails is told")
async def test_what_fails_to_close_is_told_and_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async with open_bridge("bridge") as bridge:

        async def fail() -> None:
            raise OSError("no more")

        await bridge.close(fail, "s3://b")
        assert "connections are not closed store=s3://b" in caplog.text and "no more" in caplog.text
    assert not threads()


@pytest.mark.expect_warnings("that closing hangs is told")
@pytest.mark.parametrize("cancelled", [False, True])
async def test_what_hangs_at_the_end_is_left_alone_and_others_run_meanwhile(
    released: threading.Event, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, cancelled: bool
) -> None:
    monkeypatch.setattr("cachefs.ufs.bridge.CLOSE_S", 0.3)
    ticks = 0
    began = trio.Event()

    async def hold() -> None:
        async with open_bridge("bridge") as bridge:

            async def hang() -> None:
                released.wait()

            try:
                began.set()
                if cancelled:
                    await trio.sleep_forever()
            finally:
                await bridge.close(hang, "s3://b")

    with trio.fail_after(LIMIT_S):
        async with trio.open_nursery() as nursery:

            async def tick() -> None:
                nonlocal ticks
                while True:
                    ticks += 1
                    await trio.sleep(0.02)

            nursery.start_soon(tick)
            nursery.start_soon(hold)
            await began.wait()
            if cancelled:
                nursery.cancel_scope.cancel()
            with trio.CancelScope(shield=True):
                while "hang, and are left alone name=bridge" not in caplog.text:
                    await trio.sleep(0.02)
            nursery.cancel_scope.cancel()
    assert "connections are not closed, that hangs store=s3://b" in caplog.text
    assert cancelled or ticks > 5
    with trio.fail_after(LIMIT_S):
        # The others end, be it a moment after nobody waits for them any more.
        while threads() != ["bridge"]:
            await trio.sleep(0.02)
