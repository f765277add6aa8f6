"""Group commit: who is answered, when, and what harms nobody else."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from cachefs.master import writer as module
from cachefs.master.writer import Writer
from cachefs.meta import MetaStore, open_meta_store
from cachefs.model import CachefsError

pytestmark = pytest.mark.anyio


@pytest.fixture
async def scene(tmp_path: Path) -> AsyncIterator[tuple[MetaStore, Writer]]:
    with open_meta_store(str(tmp_path)) as store:
        async with trio.open_nursery() as nursery:
            writer = Writer(store)
            nursery.start_soon(writer.serve)
            yield store, writer
            nursery.cancel_scope.cancel()


async def test_more_than_one_transaction_takes_are_all_written_in_order(scene: tuple[MetaStore, Writer]) -> None:
    _, writer = scene
    written: list[int] = []
    count = 3 * module._WRITES_AT_ONCE + 1
    async with trio.open_nursery() as nursery:
        for number in range(count):
            nursery.start_soon(writer.run, lambda number=number: written.append(number))  # type: ignore[misc]
            await trio.lowlevel.checkpoint()
    assert written == list(range(count))


@pytest.mark.expect_warnings("what must not raise did")
async def test_what_raises_after_it_was_written_ends_nothing(scene: tuple[MetaStore, Writer]) -> None:
    store, writer = scene

    def then(result: None) -> None:
        raise KeyError("a worker that was forgotten meanwhile")

    await writer.run(lambda: store.set_fact("one", "1"), then)
    await writer.run(lambda: store.set_fact("two", "2"))
    assert (store.fact("one"), store.fact("two")) == ("1", "2")


@pytest.mark.expect_warnings("a database that cannot be written is told")
async def test_a_disk_that_is_full_is_no_mistake_of_ours(scene: tuple[MetaStore, Writer]) -> None:
    store, writer = scene
    store._writer.execute("PRAGMA max_page_count = 1")  # no more than it has
    with pytest.raises(CachefsError, match="the master's database cannot be written: database or disk is full"):
        await writer.run(lambda: store.set_fact("large", "x" * 1_000_000))
    await writer.run(lambda: store.set_fact("small", "1"))
    assert store.fact("small") == "1"
    with pytest.raises(sqlite3.OperationalError, match="syntax error"):
        await writer.run(lambda: store._writer.execute("mistake"))
