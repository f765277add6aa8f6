"""Whether passthrough works here: tried for real, on a mount that lasts for milliseconds and that nobody looks at."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, cast

import trio

from cachefs.fuse.backing import BackingRegistry, PassthroughUnavailable
from cachefs.fuse.connections import MountError, abort
from cachefs.fuse.kernel import KernelSession, SessionOptions
from cachefs.fuse.modes import NO_PASSTHROUGH, PASSTHROUGH_NEEDS_ROOT
from cachefs.fuse.mounting import MountOptions, open_mount, probe, unmount
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
    with tempfile.TemporaryDirectory(prefix="cachefs-") as mountpoint, trio.fail_after(_LIMIT_S):
        options = MountOptions(allow_other=False, read_ahead_kb=None)
        fd, mounted = open_mount(mountpoint, "cachefs-selftest", options)
        try:
            return await _try(fd, directories, ignored)
        finally:
            # In this order: what is mounted no more cannot be ended.
            with suppress(MountError):  # not root: it ends with the device
                abort(mounted)
            unmount(mountpoint, lazy=True)
            os.close(fd)


async def _try(fd: int, directories: Sequence[str], ignored: int) -> dict[str, str | None]:
    found: dict[str, str | None]
    options = SessionOptions(InitOptions(ignored=ignored))
    session = KernelSession(fd, cast(Operations, _Nothing()), options)
    async with trio.open_nursery() as nursery:
        agreed = await nursery.start(session.serve)
        if not probe().sys_admin:
            found = dict.fromkeys(directories, PASSTHROUGH_NEEDS_ROOT)
        elif agreed.passthrough:
            found = {directory: _why_not(BackingRegistry(fd), directory) for directory in directories}
        else:
            found = dict.fromkeys(directories, NO_PASSTHROUGH)
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
