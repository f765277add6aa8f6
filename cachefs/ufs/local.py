"""A directory of this machine, or of a file server mounted here, as an under-store (file://).

There is no etag: a version is told by inode number, size and ctime, looked at before and after each read. A clock may
tick so slowly that a second change leaves the ctime of the first, so a file is read only when its ctime is 2 s old.
Symbolic links are followed; what is neither a file nor a directory, and names that are not UTF-8, are left out and
counted.
"""

from __future__ import annotations

import os
import stat
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import TypeVar
from urllib.parse import unquote, urlsplit

import trio

from cachefs.model import (
    ConfigError,
    ContentChangedError,
    DeniedError,
    Kind,
    NotFoundError,
    ObjectInfo,
    UnavailableError,
    without_credentials,
)
from cachefs.ufs import options as opts
from cachefs.ufs import settle
from cachefs.ufs.files import Claim, Keep, read_one_by_one

T = TypeVar("T")

_opening: trio.lowlevel.RunVar[trio.CapacityLimiter] = trio.lowlevel.RunVar("opening_threads")

_CHUNK = 1000
_THREADS = 32
_OPENING_THREADS = 256
"""In which paths are looked up: what hangs in the kernel keeps one, so it is not one of those that all others share."""
OPTIONS = {"settle": settle.MEANING}


class LocalStore:
    """Implements `base.UnderStore`. Made by `open_local`."""

    def __init__(self, root: str, settling: settle.Settling) -> None:
        self._root = root
        self._settling = settling
        self.origin = f"file://{root}"
        self.hidden_keys = 0
        # Its own: a file server that hangs must not take the threads of everything else with it.
        self._threads = trio.CapacityLimiter(_THREADS)

    async def stat(self, path: str) -> ObjectInfo:
        """Cancelled, it does not wait for a file server that hangs."""
        return await self._in_thread(path, lambda: self._stat(path), abandon=True)

    def _stat(self, path: str) -> ObjectInfo:
        info = _info(path, os.stat(self._full(path)))
        if info is None:
            raise NotFoundError(f"{path}: neither a file nor a directory")
        if not path and info.kind is not Kind.DIRECTORY:
            raise NotFoundError(f"{self._root} is a file; expected a directory")
        return info

    @asynccontextmanager
    async def list_dir(self, path: str) -> AsyncGenerator[AsyncIterator[list[ObjectInfo]], None]:
        scan = await self._in_thread(path, lambda: os.scandir(self._full(path)))

        async def chunks() -> AsyncGenerator[list[ObjectInfo], None]:
            while True:
                found, at_end = await self._in_thread(path, lambda: self._scan(path, scan))
                if found:
                    yield found
                if at_end:
                    return

        iterator = chunks()
        try:
            yield iterator
        finally:
            await iterator.aclose()
            scan.close()

    def _scan(self, path: str, scan: Iterator[os.DirEntry[str]]) -> tuple[list[ObjectInfo], bool]:
        found: list[ObjectInfo] = []
        for entry in scan:
            try:
                entry.name.encode()
                info = _info(f"{path}/{entry.name}" if path else entry.name, entry.stat())
            except UnicodeEncodeError:
                info = None
            except FileNotFoundError:
                if not entry.is_symlink():
                    continue  # removed while we looked
                info = None
            except OSError:
                info = None  # a symbolic link to itself
            if info is None:
                self.hidden_keys += 1
                continue
            found.append(info)
            if len(found) == _CHUNK:
                return found, False
        return found, True

    async def read_range(self, info: ObjectInfo, offset: int, length: int) -> bytes | bytearray:
        """Waits until the version has settled, at most 2 s."""
        pause_s = self._settling.pause_s(info.path, info.tag, _ctime_ns(info.tag))
        if pause_s > 0:
            await self._in_thread(info.path, lambda: _check(info, os.stat(self._full(info.path))))
            await trio.sleep(pause_s)
        return await self._in_thread(info.path, lambda: self._read(info, offset, length))

    async def read_files(
        self, infos: Sequence[ObjectInfo], keep: Keep, at_once: int, claim: Claim
    ) -> list[Exception | None]:
        return await read_one_by_one(self, infos, keep, at_once, claim)

    def _read(self, info: ObjectInfo, offset: int, length: int) -> bytearray:
        fd = os.open(self._full(info.path), os.O_RDONLY | os.O_CLOEXEC)
        try:
            _check(info, os.fstat(fd))
            buffer = bytearray(length)
            view = memoryview(buffer)
            filled = 0
            while filled < length:
                count = os.preadv(fd, [view[filled:]], offset + filled)
                if count == 0:
                    raise ContentChangedError(f"{info.path}: shorter than it was")
                filled += count
            # What was read may be half old, half new, if it was written meanwhile.
            _check(info, os.fstat(fd))
            return buffer
        finally:
            os.close(fd)

    def _full(self, path: str) -> str:
        return os.path.join(self._root, path) if path else self._root

    async def _in_thread(self, path: str, function: Callable[[], T], *, abandon: bool = False) -> T:
        """`abandon`: cancelled, it is left alone with what it does, and its thread is free when it has done that."""
        try:
            return await trio.to_thread.run_sync(function, limiter=self._threads, abandon_on_cancel=abandon)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise NotFoundError(f"{self._full(path)}: {error.strerror}") from error
        except PermissionError as error:
            raise DeniedError(f"{self._full(path)}: {error.strerror}") from error
        except OSError as error:
            raise UnavailableError(f"{self._full(path)}: {error.strerror}") from error


def _info(path: str, status: os.stat_result) -> ObjectInfo | None:
    if stat.S_ISDIR(status.st_mode):
        return ObjectInfo(path, Kind.DIRECTORY, 0, status.st_mtime_ns, "")
    if stat.S_ISREG(status.st_mode):
        return ObjectInfo(path, Kind.FILE, status.st_size, status.st_mtime_ns, _tag(status))
    return None


def _tag(status: os.stat_result) -> str:
    return f"{status.st_ino:x}-{status.st_ctime_ns:x}"


def _ctime_ns(tag: str) -> int:
    return int(tag.rpartition("-")[2], 16)


def _check(info: ObjectInfo, status: os.stat_result) -> None:
    if status.st_size != info.size_bytes or _tag(status) != info.tag:
        raise ContentChangedError(f"{info.path}: changed on disk")


def directory_of(url: str) -> str:
    """Of a file:// URL. Raises ConfigError."""
    parts = urlsplit(url)
    root = unquote(parts.path)
    if parts.netloc or not os.path.isabs(root) or parts.query or parts.fragment:
        raise ConfigError("URL", without_credentials(url), "file:// and an absolute path, such as file:///srv/data")
    return root


def likely_origin(url: str) -> str | None:
    """Of the store at a file:// URL, where symbolic links do not lead elsewhere: found without looking at the path, as
    it may hang. None for other URLs, which nothing has to be looked at for. Raises ConfigError.
    """
    return f"file://{os.path.normpath(directory_of(url))}" if url.startswith("file://") else None


@asynccontextmanager
async def open_local(url: str, options: Mapping[str, str]) -> AsyncGenerator[LocalStore, None]:
    """Raises ConfigError for a wrong URL or option."""
    opts.check_names("file", options, OPTIONS)
    settled_s = settle.settled_s(options)
    # In a thread, since a file server that hangs would keep everybody else from being answered.
    root = await trio.to_thread.run_sync(
        os.path.realpath, directory_of(url), limiter=_opening_limiter(), abandon_on_cancel=True
    )
    yield LocalStore(root, settle.Settling(settled_s))


def _opening_limiter() -> trio.CapacityLimiter:
    """The one of this event loop."""
    try:
        return _opening.get()
    except LookupError:
        _opening.set(trio.CapacityLimiter(_OPENING_THREADS))
        return _opening.get()
