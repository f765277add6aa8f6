"""What is of an earlier boot, while it is verified: who waits for it, and what a worker that is to go may seal yet."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from cachefs.store import Store, TierConfig, open_store
from cachefs.store import tier as tier_module
from cachefs.testing.blocks import CLUSTER, GEOMETRY, PAGE, block, content, seal
from cachefs.worker.suspects import Suspects

pytestmark = pytest.mark.anyio


@contextmanager
def of_an_earlier_boot(tmp_path: Path) -> Iterator[Store]:
    """Two blocks."""
    tier = TierConfig("ssd", str(tmp_path / "tier"), 64 * PAGE)
    with open_store((tier,), GEOMETRY, CLUSTER) as store:
        for number in range(2):
            seal(store, block(number), content(number, 2 * PAGE))
    facts = tmp_path / "tier" / "tier.json"
    facts.write_text(facts.read_text().replace('"boot_id": "', '"boot_id": "another '))
    with open_store((tier,), GEOMETRY, CLUSTER) as store:
        yield store


def slow_down(monkeypatch: pytest.MonkeyPatch, begun: trio.Event, go_on: threading.Event) -> list[object]:
    """Each file that is verified, from now on; the first sets `begun`, and all wait for `go_on`."""
    verify_pages, calls = tier_module.verify_pages, list[object]()

    def slowly(*arguments: object) -> None:
        calls.append(arguments)
        trio.from_thread.run_sync(begun.set)
        assert go_on.wait(60)
        verify_pages(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(tier_module, "verify_pages", slowly)
    return calls


async def test_a_block_that_is_being_verified_may_be_sealed_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with of_an_earlier_boot(tmp_path) as store:
        suspects, begun, go_on = Suspects(store), trio.Event(), threading.Event()
        assert suspects.left == 2
        slow_down(monkeypatch, begun, go_on)
        sealed: list[int] = []
        store.on_restored = lambda which, size: trio.from_thread.run_sync(lambda: sealed.append(suspects.left))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(suspects.restore, block(0), trio.CapacityLimiter(1))
            with trio.fail_after(60):
                await begun.wait()
            assert suspects.left == 2
            go_on.set()
        # Until it is told of.
        assert sealed == [2] and suspects.left == 1 and store.is_sealed(block(0))


async def test_whoever_wants_one_that_is_being_verified_waits_for_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the store's no more while it is read: fetched instead, what is here would be dropped though it is good."""
    with of_an_earlier_boot(tmp_path) as store:
        suspects, begun, go_on = Suspects(store), trio.Event(), threading.Event()
        calls = slow_down(monkeypatch, begun, go_on)
        found = list[bool]()

        async def want(limiter: trio.CapacityLimiter) -> None:
            assert suspects.has(block(0))
            found.append(await suspects.restore(block(0), limiter))

        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(want, trio.CapacityLimiter(1))
                await begun.wait()
                assert not store.is_suspect(block(0))
                for _ in range(3):
                    nursery.start_soon(want, trio.CapacityLimiter(1))
                with trio.move_on_after(0.05) as scope:
                    await want(trio.CapacityLimiter(1))
                assert scope.cancelled_caught and found == []
                go_on.set()
        assert found == [True] * 4 and len(calls) == 1 and not suspects.has(block(0)) and store.is_sealed(block(0))


async def test_whoever_waits_for_a_thread_keeps_nobody_waiting(tmp_path: Path) -> None:
    with of_an_earlier_boot(tmp_path) as store:
        suspects, busy = Suspects(store), trio.CapacityLimiter(1)
        busy.acquire_on_behalf_of_nowait("somebody else")
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(suspects.restore, block(0), busy)
                await trio.testing.wait_all_tasks_blocked()
                assert await suspects.restore(block(0), trio.CapacityLimiter(1))
                busy.release_on_behalf_of("somebody else")
        assert store.is_sealed(block(0)) and suspects.left == 1
