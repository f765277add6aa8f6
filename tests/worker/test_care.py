"""What looks after the store while nobody waits. trio's time jumps over every pause here, and over nothing that a
thread does."""

from __future__ import annotations

import errno
import math
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from cachefs.model import BlockId, MiB
from cachefs.net import TcpAddress
from cachefs.store import HealthConfig, TierConfig, TierState, open_store
from cachefs.testing.blocks import CLUSTER, GEOMETRY, PAGE, block, content, seal, sealed_path, some
from cachefs.testing.disks import broken, small_disk, why_no_disks
from cachefs.testing.shortage import few_descriptors
from cachefs.worker import care
from cachefs.worker.config import WorkerConfig
from cachefs.worker.counters import Counters
from cachefs.worker.suspects import Suspects

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend(monkeypatch: pytest.MonkeyPatch) -> tuple[str, dict[str, object]]:
    clock, run_sync, running = MockClock(autojump_threshold=0), trio.to_thread.run_sync, 0

    async def standing_still(*args: Any, **kwargs: Any) -> Any:
        nonlocal running
        running += 1
        clock.autojump_threshold = math.inf
        try:
            return await run_sync(*args, **kwargs)
        finally:
            running -= 1
            if not running:
                clock.autojump_threshold = 0

    monkeypatch.setattr(trio.to_thread, "run_sync", standing_still)
    return "trio", {"clock": clock}


@pytest.mark.expect_warnings("a damaged block is worth one")
@pytest.mark.parametrize(("busy_s", "found_after_s"), [(0, 0), (4, 3), (10_000, 6)])
async def test_the_scrub_finds_damage_once_nothing_is_fetched_or_after_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, busy_s: int, found_after_s: int
) -> None:
    monkeypatch.setattr(care, "_PUT_OFF_S", 6)
    tier = TierConfig("ssd", str(tmp_path / "tier"), 64 * PAGE)
    nowhere = TcpAddress("127.0.0.1", 0)
    config = WorkerConfig(name="w", master=nowhere, listen=nowhere, socket=str(tmp_path / "socket"), tiers=(tier,))
    counters = Counters()
    with open_store((tier,), GEOMETRY, CLUSTER) as store:
        for number in range(3):
            seal(store, block(number), content(number, 2 * PAGE))
        with sealed_path(tier.path, block(1)).open("r+b") as file:
            file.write(b"!!")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(care.Care(store, Suspects(store), counters, config).run)

            async def fetch() -> None:
                while trio.current_time() < began + busy_s:
                    counters.under_store_bytes += 1
                    await trio.sleep(0.5)

            began = trio.current_time()
            nursery.start_soon(fetch)
            while store.is_sealed(block(1)):
                await trio.sleep(1)
            assert found_after_s <= trio.current_time() - began <= 2 * found_after_s + 10
            nursery.cancel_scope.cancel()
        assert sorted(found for found, _ in store.blocks()) == [block(0), block(2)]
        assert counters.corrupt == 1


async def test_what_becomes_suspect_does_not_wait_for_the_scrub_to_come_round(tmp_path: Path) -> None:
    tier = TierConfig("ssd", str(tmp_path / "tier"), 64 * PAGE)
    nowhere = TcpAddress("127.0.0.1", 0)
    config = WorkerConfig(
        name="w",
        master=nowhere,
        listen=nowhere,
        socket=str(tmp_path / "socket"),
        tiers=(tier,),
        scrub_bytes_per_s=1,
    )
    with open_store((tier,), GEOMETRY, CLUSTER) as store:
        for number in range(3):
            seal(store, block(number), content(number, 2 * PAGE))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(care.Care(store, Suspects(store), Counters(), config).run)
            await trio.sleep(10)
            store.tiers[0].distrust()
            with trio.fail_after(60):
                while store.suspects():
                    await trio.sleep(1)
            nursery.cancel_scope.cancel()
        assert len(store.blocks()) == 3


@pytest.mark.skipif(bool(why_no_disks()), reason=str(why_no_disks()))
@pytest.mark.expect_warnings("a disk that fails is told")
async def test_a_disk_that_breaks_is_tried_until_it_is_well_and_what_it_holds_comes_back(tmp_path: Path) -> None:
    nowhere = TcpAddress("127.0.0.1", 0)
    gone, back = list[BlockId](), list[BlockId]()
    with small_disk(tmp_path, 64 * MiB) as disk:
        tier = TierConfig("ssd", str(disk / "tier"), 32 * MiB)
        config = WorkerConfig(name="w", master=nowhere, listen=nowhere, socket=str(tmp_path / "socket"), tiers=(tier,))
        health = HealthConfig(probe_every_s=0.01, longest_pause_s=0.02)
        with open_store((tier,), GEOMETRY, CLUSTER, health=health) as store:
            store.on_evicted = gone.append
            store.on_restored = lambda block, size: back.append(block)
            blocks = [block(number) for number in range(6)]
            for number, each in enumerate(blocks):
                seal(store, each, content(number, 2 * PAGE))
            store.sync_sealed()
            async with trio.open_nursery() as nursery:
                with broken(disk):
                    store.check(block(0))
                    nursery.start_soon(care.Care(store, Suspects(store), Counters(), config).run)
                    while store.state(store.tiers[0]) is not TierState.DOWN:
                        await trio.sleep(1)
                    assert sorted(gone) == blocks and store.blocks() == []
                # The scrub verifies what it holds; some it may have dropped before, as it could not read them.
                while store.down or store.suspects():
                    await trio.sleep(1)
                assert sorted(back) == sorted(found for found, _ in store.blocks()) and len(back) >= 2
                nursery.cancel_scope.cancel()


@pytest.mark.expect_warnings("a disk that fails is told")
async def test_a_disk_is_judged_when_everybody_else_waits_for_threads(tmp_path: Path) -> None:
    tier = TierConfig("ssd", str(tmp_path / "tier"), 64 * PAGE)
    nowhere = TcpAddress("127.0.0.1", 0)
    config = WorkerConfig(name="w", master=nowhere, listen=nowhere, socket=str(tmp_path / "socket"), tiers=(tier,))
    limiter = trio.to_thread.current_default_thread_limiter()
    for _ in range(int(limiter.total_tokens)):
        limiter.acquire_on_behalf_of_nowait(object())
    health = HealthConfig(probe_every_s=0.01, longest_pause_s=0.02)
    with open_store((tier,), GEOMETRY, CLUSTER, health=health) as store:
        partial = some(store.open_partial(block(0), PAGE))
        store.failed(partial, OSError(errno.EIO, "it hangs no more"))
        store.close(partial)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(care.Care(store, Suspects(store), Counters(), config).run)
            with trio.fail_after(1000):
                while store.state(store.tiers[0]) is not TierState.HEALTHY:
                    await trio.sleep(1)
            nursery.cancel_scope.cancel()


@pytest.mark.expect_warnings("a disk that fails is told")
async def test_a_disk_that_cannot_be_tried_for_want_of_descriptors_is_not_worse_for_it(tmp_path: Path) -> None:
    tier = TierConfig("ssd", str(tmp_path / "tier"), 64 * PAGE)
    nowhere = TcpAddress("127.0.0.1", 0)
    config = WorkerConfig(name="w", master=nowhere, listen=nowhere, socket=str(tmp_path / "socket"), tiers=(tier,))
    health = HealthConfig(probe_every_s=0.01, longest_pause_s=0.02, bad_probes=1)
    with open_store((tier,), GEOMETRY, CLUSTER, health=health) as store:
        partial = some(store.open_partial(block(0), PAGE))
        store.failed(partial, OSError(errno.EIO, "it hangs no more"))
        store.close(partial)
        async with trio.open_nursery() as nursery:
            with few_descriptors():
                nursery.start_soon(care.Care(store, Suspects(store), Counters(), config).run)
                await trio.sleep(20)
                assert store.state(store.tiers[0]) is TierState.LIMITED
            with trio.fail_after(1000):
                while store.state(store.tiers[0]) is not TierState.HEALTHY:
                    await trio.sleep(1)
            nursery.cancel_scope.cancel()
