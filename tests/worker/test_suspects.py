"""Blocks of an earlier boot while they are verified: who waits for them, and what may be sealed yet."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from cachefs.store import Store, TierConfig, block_files, open_store
from cachefs.testing import cluster as clusters
from cachefs.testing.blocks import CLUSTER, GEOMETRY, PAGE, block, content, seal
from cachefs.worker.suspects import Suspects

pytestmark = pytest.mark.anyio


def boot_again(tier: Path) -> None:
    facts = tier / "tier.json"
    facts.write_text(facts.read_text().replace('"boot_id": "', '"boot_id": "another '))


@contextmanager
def of_an_earlier_boot(tmp_path: Path) -> Iterator[Store]:
    """Two blocks."""
    tier = TierConfig("ssd", str(tmp_path / "tier"), 64 * PAGE)
    with open_store((tier,), GEOMETRY, CLUSTER) as store:
        for number in range(2):
            seal(store, block(number), content(number, 2 * PAGE))
    boot_again(tmp_path / "tier")
    with open_store((tier,), GEOMETRY, CLUSTER) as store:
        yield store


def slow_down(monkeypatch: pytest.MonkeyPatch, begun: trio.Event, go_on: threading.Event) -> list[object]:
    """Each file that is verified, from now on; the first sets `begun`, and all wait for `go_on`."""
    verify_pages, calls = block_files.verify_pages, list[object]()

    def slowly(*arguments: object) -> None:
        calls.append(arguments)
        trio.from_thread.run_sync(begun.set)
        assert go_on.wait(60)
        verify_pages(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(block_files, "verify_pages", slowly)
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


@pytest.mark.parametrize("size", [clusters.PAGE // 2, 3 * clusters.PAGE], ids=["a small file", "several pages"])
async def test_a_block_that_is_being_verified_is_not_fetched_by_its_readers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """The worker does that by itself in the background: whoever wants to read one waits for it."""
    data, tier, written = tmp_path / "data", tmp_path / "tier", content(1, size)
    data.mkdir()
    (data / "file").write_bytes(written)
    begun, go_on, verify_pages = threading.Semaphore(0), threading.Event(), block_files.verify_pages

    def slowly(*arguments: object) -> None:
        begun.release()
        assert go_on.wait(60)
        verify_pages(*arguments)  # type: ignore[arg-type]

    async with (
        clusters.running_cluster(tmp_path, data.as_uri(), ufs_options={"settle": "0"}) as cluster,
        cluster.client() as client,
    ):
        attr = await client.metadata.resolve("/file")
        assert await client.promote(attr.ino)
        await cluster.stop("worker")
        boot_again(tier)
        monkeypatch.setattr(block_files, "verify_pages", slowly)
        got: list[bytes] = []

        async def read() -> None:
            got.append(b"".join([bytes(part) async for part in client.read_file("/file", size)]))

        async def promote() -> None:
            assert await client.promote(attr.ino)

        await cluster.start_worker()
        try:
            assert await trio.to_thread.run_sync(begun.acquire, True, 60)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(read)
                nursery.start_soon(promote)
                # Each of them would have opened a partial, or read the file, by now.
                await trio.testing.wait_all_tasks_blocked(0.2)
                assert not got
                go_on.set()
        finally:
            go_on.set()
        assert got == [written]
        assert (await cluster.worker_status()).counters.under_store_bytes == 0


async def test_whoever_wants_one_that_is_being_verified_waits_for_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the store's no more while it is read: fetched instead, what is here would be dropped though it is good."""
    with of_an_earlier_boot(tmp_path) as store:
        suspects, begun, go_on = Suspects(store), trio.Event(), threading.Event()
        calls = slow_down(monkeypatch, begun, go_on)
        found = list[bool]()

        async def want(limiter: trio.CapacityLimiter) -> None:
            assert block(0) in suspects
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
        assert found == [True] * 4 and len(calls) == 1 and block(0) not in suspects and store.is_sealed(block(0))


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
