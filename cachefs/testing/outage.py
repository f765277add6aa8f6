"""An under-store that fails when a test says so."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager

import trio

from cachefs.model import ObjectInfo, UnavailableError
from cachefs.ufs import UnderStore
from cachefs.ufs.files import Claim, Keep


class Outage:
    """A real under-store that can be made to fail, and counts what it is asked."""

    def __init__(self, store: UnderStore) -> None:
        self._store = store
        self.origin = store.origin
        self.down = False
        self.fail_after_chunks: int | None = None
        self.gate: trio.Event | None = None
        self.stats = 0
        self.listings = 0

    @property
    def hidden_keys(self) -> int:
        return self._store.hidden_keys

    async def stat(self, path: str) -> ObjectInfo:
        self.stats += 1
        if self.down:
            raise UnavailableError("injected")
        return await self._store.stat(path)

    @asynccontextmanager
    async def list_dir(self, path: str) -> AsyncIterator[AsyncIterator[list[ObjectInfo]]]:
        self.listings += 1
        if self.down:
            raise UnavailableError("injected")
        async with self._store.list_dir(path) as chunks:

            async def some() -> AsyncGenerator[list[ObjectInfo], None]:
                number = 0
                async for chunk in chunks:
                    if number == self.fail_after_chunks:
                        raise UnavailableError("injected")
                    if number and self.gate is not None:
                        await self.gate.wait()
                    number += 1
                    yield chunk

            # Whoever is cancelled in the middle leaves it unfinished.
            async with aclosing(some()) as through:
                yield through

    async def read_range(self, info: ObjectInfo, offset: int, length: int) -> bytes | bytearray | memoryview:
        return await self._store.read_range(info, offset, length)

    async def read_files(
        self, infos: Sequence[ObjectInfo], keep: Keep, at_once: int, claim: Claim
    ) -> list[Exception | None]:
        return await self._store.read_files(infos, keep, at_once, claim)
