"""The kernel's end of a mount: whether it is dead, and ending it at once.

A connection is named by the minor number of the device that it is mounted as. The number is another's as soon as
nothing is mounted by it, which may be any moment, as whoever else may unmount. So a connection is never ended by its
number alone: its mount is held while that is done.

Ending needs root; without, only the owner can, where the control file system is mounted.
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from cachefs.fuse.bounded import within
from cachefs.fuse.mountinfo import FS_TYPE, MountInfo, all_mounts
from cachefs.model import CachefsError

_CONNECTIONS = Path("/sys/fs/fuse/connections")
# The new mount API; the numbers are the same on every architecture, and glibc wraps them only since 2.36.
_SYS_FSOPEN, _SYS_FSCONFIG, _SYS_FSMOUNT = 430, 431, 432
_FSCONFIG_CMD_CREATE = 6
_DEAD_ANSWER_LIMIT_S = 1.0
"""A dead mount answers at once; a living one may never."""
_CLOEXEC = 1  # FSOPEN_CLOEXEC and FSMOUNT_CLOEXEC

_libc = ctypes.CDLL(None, use_errno=True)


class MountError(CachefsError):
    """The kernel refused to mount or unmount; the message says what to do."""

    def __init__(self, message: str, errno_: int) -> None:
        super().__init__(message)
        self.errno = errno_


class Mounted(Protocol):
    """`MountInfo`, or a `Mount`."""

    @property
    def mountpoint(self) -> str: ...

    @property
    def device(self) -> str: ...

    @property
    def connection(self) -> int: ...


def is_dead(info: MountInfo) -> bool:
    """Whether the server of this FUSE mount is gone for good. One that answers late or never is not: see `abort`.

    Takes up to a second, asked about a mount that the calling thread serves.
    """

    def ask() -> bool:
        try:
            os.statvfs(info.mountpoint)  # unlike stat(2), never answered from the kernel's memory
        except OSError as exc:
            return exc.errno in (errno.ENOTCONN, errno.ECONNABORTED)
        return False

    return within(_DEAD_ANSWER_LIMIT_S, ("dead", info.device, info.mountpoint), ask, False)


def is_over(device: int) -> bool:
    """Whether the connection of this /dev/fuse file has ended: it was unmounted, or aborted."""
    poll = select.poll()
    poll.register(device, 0)
    return bool(poll.poll(0))


def abort(mounted: Mounted) -> bool:
    """End a connection at once: whoever waits for an answer gets ECONNABORTED, later calls ENOTCONN, and the server's
    read ENODEV. The way out when a server is dead or stuck. False if it is not mounted there any more, or under
    something else.

    Raises MountError: root is needed, or the control file system and being the one who mounted.
    """
    with _held(mounted) as is_it:
        return is_it and _abort(mounted.connection)


def abort_of(device: int, connection: int) -> bool:
    """The same by whoever has its /dev/fuse file, and its number; also where its mount cannot be seen, in another
    namespace. False if it is over.

    Raises MountError.
    """
    for info in all_mounts():
        if info.fs_type == FS_TYPE and info.connection == connection:
            with _held(info) as is_it:
                if is_it:
                    return not is_over(device) and _abort(connection)
    return not is_over(device) and _abort(connection)


@contextmanager
def _held(mounted: Mounted) -> Iterator[bool]:
    """Whether it is mounted there, and then it is until the end of the block, though it may have left the tree: its
    number stays its own. Never waits for its server.
    """
    try:
        fd = os.open(mounted.mountpoint, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        yield False
        return
    try:
        lines = Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines()
        number = next(int(line.partition(":")[2]) for line in lines if line.startswith("mnt_id:"))
        yield any((each.number, each.device) == (number, mounted.device) for each in all_mounts())
    finally:
        os.close(fd)


def _abort(connection: int) -> bool:
    """False if there is no such connection. Raises MountError."""
    try:
        (_CONNECTIONS / str(connection) / "abort").write_text("1")
        return True
    except FileNotFoundError:
        pass  # nobody has mounted the control file system there, or it is the connection that does not exist
    except PermissionError as error:
        raise MountError(f"cannot abort connection {connection}: it is another user's", errno.EPERM) from error
    root = _open_fusectl()
    try:
        fd = os.open(f"{connection}/abort", os.O_WRONLY | os.O_CLOEXEC, dir_fd=root)
    except FileNotFoundError:
        return False
    finally:
        os.close(root)
    try:
        os.write(fd, b"1")
    finally:
        os.close(fd)
    return True


def _open_fusectl() -> int:
    """The root of the FUSE control file system, mounted nowhere, so that nothing has to be taken away afterwards."""
    context = _libc.syscall(_SYS_FSOPEN, b"fusectl", _CLOEXEC)
    if context < 0:
        raise _no_fusectl()
    try:
        if _libc.syscall(_SYS_FSCONFIG, context, _FSCONFIG_CMD_CREATE, None, None, 0) != 0:
            raise _no_fusectl()
        root: int = _libc.syscall(_SYS_FSMOUNT, context, _CLOEXEC, 0)
        if root < 0:
            raise _no_fusectl()
        return root
    finally:
        os.close(context)


def _no_fusectl() -> MountError:
    code = ctypes.get_errno()
    hint = f"; root is needed, or the file system mounted on {_CONNECTIONS}" if code == errno.EPERM else ""
    return MountError(f"no FUSE control file system: {os.strerror(code)}{hint}", code)
