"""What numbers of inodes mean when the master comes back with another namespace."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
import trio

from cachefs.model import Ino, IsADirectory, NamespaceChangedError, NotFoundError, StaleError
from cachefs.worker.sources import Sources

pytestmark = pytest.mark.anyio


class ComesBack:
    """A link to a master that was away, and has another namespace when it answers."""

    def __init__(self, error: Exception, namespace_id: str) -> None:
        self.sources: Sources
        self._error = error
        self._namespace_id = namespace_id

    async def call(self, request: Any) -> Any:
        await self.sources.add(self._namespace_id, [])
        raise self._error


@pytest.fixture
async def nursery() -> AsyncIterator[trio.Nursery]:
    async with trio.open_nursery() as nursery:
        yield nursery


@pytest.mark.parametrize("error", [NotFoundError("no inode 8"), IsADirectory("inode 8"), StaleError("inode 8")])
async def test_what_another_namespace_says_of_a_number_is_not_said_of_ours(
    nursery: trio.Nursery, error: Exception
) -> None:
    for namespace_id, expected in (("ours", type(error)), ("another", NamespaceChangedError)):
        link = ComesBack(error, namespace_id)
        link.sources = sources = Sources(link, nursery)  # type: ignore[arg-type]
        await sources.add("ours", [])
        with pytest.raises(expected):
            await sources.resolve(Ino(8))
        await sources.add("ours", [])
        with pytest.raises(expected):
            await sources.resolve_next(Ino(8), Ino(8), 10)
