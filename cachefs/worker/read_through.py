"""Content that is not kept here: read from elsewhere each time, with a few pages in memory for sequential readers."""

from __future__ import annotations

from collections import OrderedDict

import trio

from cachefs.model import BlockId, Geometry, Ino
from cachefs.net import Flights
from cachefs.policy import Readahead
from cachefs.worker.slots import Slots
from cachefs.worker.sources import Source
from cachefs.worker.supply import Supply

_READERS = 1024


class ReadThrough:
    """Memory: `max_pages` pages, and one for each read in flight."""

    def __init__(self, supply: Supply, slots: Slots, geometry: Geometry, max_pages: int, nursery: trio.Nursery) -> None:
        self._supply = supply
        self._slots = slots
        self._geometry = geometry
        self._page_size = geometry.page_size
        self._max_pages = max_pages
        # By source, not by inode number: that means something else once the master has another namespace.
        self._pages: OrderedDict[tuple[Source, int], bytes | bytearray | memoryview] = OrderedDict()
        self._flights: Flights[tuple[Source, int], bytes | bytearray | memoryview] = Flights(nursery)
        self._readers: OrderedDict[tuple[Ino, int], Readahead] = OrderedDict()

    async def read(self, source: Source, offset: int, length: int, reader: int) -> bytes | bytearray | memoryview:
        """[offset, offset+length) of the content. Raises as `Supply.read`."""
        first, end = offset // self._page_size, -(-(offset + length) // self._page_size)
        if not self._is_sequential(source, first, end, reader):
            return await self._read(source, offset, length)
        parts = []
        for number in range(first, end):
            page = await self._page(source, number)
            start = number * self._page_size
            parts.append(memoryview(page)[max(0, offset - start) : offset + length - start])
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _is_sequential(self, source: Source, first: int, end: int, reader: int) -> bool:
        """Whether whole pages are worth fetching: what the next reads ask for is in them."""
        key = (source.attr.ino, reader)
        readahead = self._readers.get(key)
        if readahead is None:
            readahead = self._readers[key] = Readahead(-(-source.attr.size_bytes // self._page_size))
            if len(self._readers) > _READERS:
                self._readers.popitem(last=False)
        readahead.access(first, end)
        return readahead.window > 0

    async def _page(self, source: Source, number: int) -> bytes | bytearray | memoryview:
        key = (source, number)
        page = self._pages.get(key)
        if page is None:
            page = await self._flights.join(key, lambda: self._fetch(source, number))
        return page

    async def _fetch(self, source: Source, number: int) -> bytes | bytearray | memoryview:
        start = number * self._page_size
        page = await self._read(source, start, min(self._page_size, source.attr.size_bytes - start))
        # Here, not by those who wait: whoever comes before they go on finds it as well.
        self._pages[source, number] = page
        if len(self._pages) > self._max_pages:
            self._pages.popitem(last=False)
        return page

    async def _read(self, source: Source, offset: int, length: int) -> bytes | bytearray | memoryview:
        """Within one block: neither a page nor what a reader asks for goes over its end."""
        index, within = divmod(offset, self._geometry.block_size)
        block = BlockId(source.attr.key, index)
        return await self._supply.read(source, block, offset - within, within, length, self._slots)
