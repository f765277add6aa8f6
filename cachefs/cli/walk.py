"""All files below some paths of the namespace, one after the other, with totals beforehand."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from cachefs.cli.params import reason_of
from cachefs.client import Client
from cachefs.model import Attr, CachefsError, Ino


class File(NamedTuple):
    path: str
    attr: Attr


@dataclass
class Totals:
    files: int = 0
    bytes: int = 0
    failed: list[tuple[str, str]] = field(default_factory=list)
    """(path, reason) of what could not be listed."""


class Walk:
    """`paths` are files and directories; what of them cannot be found is told in `totals.failed`."""

    def __init__(self, client: Client, paths: Sequence[str]) -> None:
        self._client = client
        self._paths = paths
        self._roots: list[File] = []
        self.totals = Totals()

    async def count(self) -> None:
        """List everything, as far as that is not known yet. Raises TransportError."""
        done_files = done_bytes = 0
        for path in self._paths:
            try:
                attr = await self._client.metadata.resolve(path)
                self._roots.append(File(path.rstrip("/") if attr.is_dir else path, attr))
                if attr.is_dir:
                    async with self._client.load_metadata(path) as stream:
                        async for progress in stream:
                            for where, reason in progress.failed:
                                self.totals.failed.append((where, reason.removeprefix(f"{where}: ")))
                            self.totals.files = done_files + progress.files
                            self.totals.bytes = done_bytes + progress.bytes
                else:
                    self.totals.files += 1
                    self.totals.bytes += attr.size_bytes
            except CachefsError as error:
                self.totals.failed.append((path, reason_of(path, error)))
            done_files, done_bytes = self.totals.files, self.totals.bytes

    async def each(self, visit: Callable[[File], Awaitable[None]]) -> None:
        """`visit` every file. Directories that cannot be listed are told in `totals.failed`."""
        for root in self._roots:
            if not root.attr.is_dir:
                await visit(root)
                continue
            waiting = [(root.path, root.attr.ino)]
            while waiting:
                where, ino = waiting.pop()
                try:
                    async for path, attr in self._entries(where, ino):
                        if attr.is_dir:
                            waiting.append((path, attr.ino))
                        else:
                            await visit(File(path, attr))
                except CachefsError as error:
                    self.totals.failed.append((where or "/", reason_of(where or "/", error)))

    async def _entries(self, where: str, ino: Ino) -> AsyncGenerator[tuple[str, Attr], None]:
        async with self._client.metadata.list_dir(ino) as chunks:
            async for entries in chunks:
                for entry in entries:
                    yield f"{where}/{entry.name}", entry.attr
