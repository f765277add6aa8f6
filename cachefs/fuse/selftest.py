"""Whether passthrough works here: tried for real, on a mount that lasts for milliseconds and that nobody looks at."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from typing import Any, cast

import trio

from cachefs.fuse.backing import BackingRegistry, PassthroughUnavailable
from cachefs.fuse.kernel import KernelSession, SessionOptions
from cachefs.fuse.mounting import MountOptions, abort, mount, open_device, unmount
from cachefs.fuse.protocol import Operations
from cachefs.fusewire import InitOptions
from cachefs.model import NotFoundError

_LIMIT_S = 10.0


class _Nothing:
    """A file system with nothing in it."""

    def __getattr__(self, name: str) -> Any:
        def answer(*arguments: object) -> None:
            raise NotFoundError("there is nothing here")

        return answer


async def try_passthrough(directories: Sequence[str], ignored: int = 0) -> dict[str, str | None]:
    """Directory -> why the kernel cannot read files there by itself; None if it can.

    `ignored` are `InitFlag`s to do without. Raises MountError and ConfigError when nothing can be mounted at all.
    """
    fd = open_device()
    try:
        with tempfile.TemporaryDirectory(prefix="cachefs-") as mountpoint, trio.fail_after(_LIMIT_S):
            mounted = mount(fd, mountpoint, "cachefs-selftest", MountOptions(allow_other=False, read_ahead_kb=None))
            try:
                return await _try(fd, directories, ignored)
            finally:
                unmount(mountpoint, lazy=True)
                abort(mounted.connection)
    finally:
        os.close(fd)


async def _try(fd: int, directories: Sequence[str], ignored: int) -> dict[str, str | None]:
    options = SessionOptions(InitOptions(ignored=ignored))
    session = KernelSession(fd, cast(Operations, _Nothing()), options)
    async with trio.open_nursery() as nursery:
        agreed = await nursery.start(session.serve)
        if agreed.passthrough:
            found = {directory: _why_not(BackingRegistry(fd), directory) for directory in directories}
        else:
            reason = "the kernel does not offer passthrough: it is older than 6.9, or built without it"
            found = dict.fromkeys(directories, reason)
        nursery.cancel_scope.cancel()
    return found


def _why_not(backings: BackingRegistry, directory: str) -> str | None:
    try:
        with tempfile.TemporaryFile(dir=directory) as file:
            backings.release(backings.register(file.fileno()))
    except PassthroughUnavailable as error:
        return error.reason
    except OSError as error:
        return f"no file can be made there ({error.strerror})"
    return None
