"""What is not kept here: many who read it one after the other cause one read of each page."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from cachefs.model import Attr, BlockId, Geometry, Ino, Kind, ObjectInfo
from cachefs.testing.blocks import PAGE, block, content
from cachefs.ufs import open_under_store
from cachefs.worker.read_through import ReadThrough
from cachefs.worker.slots import Slots
from cachefs.worker.sources import Source

pytestmark = pytest.mark.anyio
PAGES = 40


class _Supply:
    """The file itself, and who reads next told before whoever asked has his page."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.reads = 0
        self.done = [trio.Event() for _ in range(PAGES)]

    async def read(self, source: Source, which: BlockId, start: int, offset: int, length: int, slots: Slots) -> bytes:
        self.reads += 1
        await trio.lowlevel.checkpoint()
        self.done[(start + offset) // PAGE].set()
        return self.data[start + offset :][:length]


async def test_whoever_comes_when_a_page_has_just_arrived_does_not_read_it_again(tmp_path: Path) -> None:
    data = content(1, PAGES * PAGE)
    supply = _Supply(data)
    attr = Attr(Ino(2), Kind.FILE, len(data), 0, 0o644, 0, 0, block(1).key)
    async with open_under_store(tmp_path.as_uri(), {}) as ufs, trio.open_nursery() as nursery:
        source = Source(attr, ObjectInfo("file", Kind.FILE, len(data), 0, ""), ufs)
        geometry = Geometry(page_size=PAGE, block_size=len(data))
        reading = ReadThrough(supply, Slots(1, PAGE), geometry, PAGES, nursery)  # type: ignore[arg-type]

        async def first() -> None:
            for number in range(PAGES):
                assert await reading.read(source, number * PAGE, PAGE, 1) == data[number * PAGE :][:PAGE]

        async def second() -> None:
            # Before the first one goes on, or after: trio leaves it to chance each time.
            for number, done in enumerate(supply.done):
                await done.wait()
                assert await reading.read(source, number * PAGE, PAGE, 2) == data[number * PAGE :][:PAGE]

        nursery.start_soon(first)
        nursery.start_soon(second)
    assert supply.reads == PAGES
