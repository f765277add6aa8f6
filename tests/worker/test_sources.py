"""What a worker asks its master about inodes, and what it believes of the answers."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio

from cachefs.model import (
    Attr,
    ContentKey,
    Ino,
    IsADirectory,
    Kind,
    NamespaceChangedError,
    NotFoundError,
    StaleError,
)
from cachefs.net import Answer
from cachefs.wire.messages import NextLocations, ObjectLocation, Resolve, ResolveNext, StoreInfo
from cachefs.worker.sources import Sources

pytestmark = pytest.mark.anyio


class ComesBack:
    """A link to a master that was away, and has another namespace when it answers."""

    def __init__(self, error: Exception, namespace_id: str) -> None:
        self.sources: Sources
        self._error = error
        self._namespace_id = namespace_id

    async def call(self, request: Any, patience_s: float | None = None) -> Any:
        await self.sources.registered(self._namespace_id, [])
        raise self._error


@pytest.fixture
async def nursery() -> AsyncIterator[trio.Nursery]:
    async with trio.open_nursery() as nursery:
        yield nursery
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("error", [NotFoundError("no inode 8"), IsADirectory("inode 8"), StaleError("inode 8")])
async def test_what_another_namespace_says_of_a_number_is_not_said_of_ours(
    nursery: trio.Nursery, error: Exception
) -> None:
    for namespace_id, expected in (("ours", type(error)), ("another", NamespaceChangedError)):
        link = ComesBack(error, namespace_id)
        link.sources = sources = Sources(link, nursery)  # type: ignore[arg-type]
        await sources.registered("ours", [])
        with pytest.raises(expected):
            await sources.resolve(Ino(8))
        await sources.registered("ours", [])
        with pytest.raises(expected):
            await sources.resolve_next(Ino(8), Ino(8), 10)


class Remembers:
    """A link to a master that knows files with these numbers, all in one directory."""

    def __init__(self, inos: range) -> None:
        self.asked: list[Any] = []
        self._inos = inos

    async def call(self, request: Any, patience_s: float | None = None) -> Any:
        self.asked.append(request)
        if isinstance(request, Resolve):
            return Answer(_location(request.ino))
        found = [ino for ino in self._inos if ino > request.after][: request.count]
        return Answer(NextLocations([_location(Ino(ino)) for ino in found], Ino(found[-1])))


def _location(ino: Ino) -> ObjectLocation:
    attr = Attr(ino, Kind.FILE, 10 * ino, 0, 0o644, 0, 0, ContentKey(ino.to_bytes(16, "big")))
    return ObjectLocation(attr, False, 1, f"file-{ino}", f"tag-{ino}")


async def test_shuffled_files_of_a_directory_are_not_asked_for_one_by_one(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    link = Remembers(range(100, 400))
    sources = Sources(link, nursery)  # type: ignore[arg-type]
    await sources.registered("ours", [StoreInfo(1, tmp_path.as_uri(), {})])
    shuffled = list(range(100, 400))
    random.Random(1).shuffle(shuffled)
    for ino in shuffled:
        source = await sources.resolve(Ino(ino))
        assert (source.attr.ino, source.info.path, source.info.tag) == (ino, f"file-{ino}", f"tag-{ino}")
    assert len(link.asked) < 100
    before = len(link.asked)
    for ino in shuffled:
        await sources.resolve(Ino(ino))
    assert len(link.asked) == before
    # Told under another number of the master's: nothing of before is believed.
    await sources.registered("another", [StoreInfo(1, tmp_path.as_uri(), {})])
    await sources.resolve(Ino(shuffled[0]))
    assert len(link.asked) == before + 1


async def test_what_is_not_in_its_directory_any_more_is_asked_for_by_itself(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    link = Remembers(range(100, 110))
    sources = Sources(link, nursery)  # type: ignore[arg-type]
    await sources.registered("ours", [StoreInfo(1, tmp_path.as_uri(), {})])
    assert (await sources.resolve(Ino(50))).info.path == "file-50"
    assert [type(each) for each in link.asked] == [ResolveNext, Resolve]
