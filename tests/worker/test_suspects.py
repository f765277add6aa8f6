"""Blocks of an earlier boot while they are verified: they may be sealed yet, and nobody fetches them meanwhile."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import trio
import trio.testing

from cachefs.store import TierConfig, block_files, open_store
from cachefs.testing import cluster as clusters
from cachefs.testing.blocks import CLUSTER, GEOMETRY, PAGE, block, content, seal
from cachefs.worker.suspects import Suspects

pytestmark = pytest.mark.anyio


def boot_again(tier: Path) -> None:
    facts = tier / "tier.json"
    facts.write_text(facts.read_text().replace('"boot_id": "', '"boot_id": "another '))


async def test_a_block_that_is_being_verified_may_be_sealed_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = TierConfig("ssd", str(tmp_path / "tier"), 64 * PAGE)
    with open_store((tier,), GEOMETRY, CLUSTER) as store:
        for number in range(2):
            seal(store, block(number), content(number, 2 * PAGE))
    boot_again(tmp_path / "tier")
    begun, go_on, verify_pages = trio.Event(), threading.Event(), block_files.verify_pages

    def slowly(*arguments: object) -> None:
        trio.from_thread.run_sync(begun.set)
        assert go_on.wait(60)
        verify_pages(*arguments)  # type: ignore[arg-type]

    with open_store((tier,), GEOMETRY, CLUSTER) as store:
        suspects = Suspects(store)
        assert suspects.left == 2
        monkeypatch.setattr(block_files, "verify_pages", slowly)
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
