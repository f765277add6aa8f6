"""Content that is not kept: read from the under-store each time, with a few pages in memory for sequential readers."""

from __future__ import annotations

from collections import OrderedDict

import trio

from cachefs.model import Geometry, Ino
from cachefs.net import Flights
from cachefs.policy import Readahead
from cachefs.worker.jobs import Filler
from cachefs.worker.sources import Source

_READERS = 1024


class ReadThrough:
    """Memory: `max_pages` pages, and one for each read in flight."""

    def __init__(self, filler: Filler, geometry: Geometry, max_pages: int, nursery: trio.Nursery) -> None:
        self._filler = filler
        self._page_size = geometry.page_size
        self._max_pages = max_pages
        # By source, not by inode number: that means something else once the master has another namespace.
        self._pages: OrderedDict[tuple[Source, int], bytes | bytearray | memoryview] = OrderedDict()
        self._flights: Flights[tuple[Source, int], bytes | bytearray | memoryview] = Flights(nursery)
        self._readers: OrderedDict[tuple[Ino, int], Readahead] = OrderedDict()

    async def read(self, source: Source, offset: int, length: int, reader: int) -> bytes | bytearray | memoryview:
        """[offset, offset+length) of the content. Raises as `Filler.read`."""
        first, end = offset // self._page_size, -(-(offset + length) // self._page_size)
        if not self._is_sequential(source, first, end, reader):
            return await self._filler.read_for_reader(source, offset, length)
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
            self._pages[key] = page
            if len(self._pages) > self._max_pages:
                self._pages.popitem(last=False)
        return page

    async def _fetch(self, source: Source, number: int) -> bytes | bytearray | memoryview:
        start = number * self._page_size
        return await self._filler.read_for_reader(source, start, min(self._page_size, source.attr.size_bytes - start))
