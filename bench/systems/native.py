"""The data set on the local file system that the others keep their caches on: what they are compared with."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.systems.base import Mounted, Source, System


class Native(System):
    name = "native"
    title = "local files"

    def check(self) -> str:
        return f"Linux {platform.release()}"

    def flags(self) -> list[str]:
        return []

    @contextmanager
    def mounted(self, source: Source, place: Path, cache_bytes: int) -> Iterator[Mounted]:
        forget_pages(source.native)
        yield Mounted(system=self.name, path=source.native, source=source, place=place, facts={}, pids=[])


def forget_pages(directory: Path) -> None:
    """Drop the files below from the kernel's page cache; nothing else, and without being root."""
    os.sync()
    for path, _, names in os.walk(directory):
        for name in names:
            fd = os.open(os.path.join(path, name), os.O_RDONLY)
            try:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)
