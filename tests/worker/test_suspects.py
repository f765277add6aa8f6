"""What a worker that is to go may seal yet of an earlier boot."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import trio

from cachefs.store import TierConfig, block_files, open_store
from cachefs.testing.blocks import CLUSTER, GEOMETRY, PAGE, block, content, seal
from cachefs.worker.suspects import Suspects

pytestmark = pytest.mark.anyio


async def test_a_block_that_is_being_verified_may_be_sealed_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = TierConfig("ssd", str(tmp_path / "tier"), 64 * PAGE)
    with open_store((tier,), GEOMETRY, CLUSTER) as store:
        for number in range(2):
            seal(store, block(number), content(number, 2 * PAGE))
    facts = tmp_path / "tier" / "tier.json"
    facts.write_text(facts.read_text().replace('"boot_id": "', '"boot_id": "another '))
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
