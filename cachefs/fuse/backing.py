"""Files that the kernel reads by itself: registering them on a FUSE connection."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import struct

from cachefs.fuse.kept import Kept
from cachefs.fusewire import IOC_BACKING_CLOSE, IOC_BACKING_OPEN
from cachefs.model import CachefsError

logger = logging.getLogger(__name__)

_MAP = struct.Struct("<iIQ")  # struct fuse_backing_map: fd flags padding
_ID = struct.Struct("<I")

_REASONS = {
    errno.EPERM: "the process lacks CAP_SYS_ADMIN, or passthrough was not negotiated",
    errno.ENOTTY: "the kernel is older than 6.9, or built without CONFIG_FUSE_PASSTHROUGH",
    errno.EOPNOTSUPP: "the file's file system cannot read for another (or it is not a regular file)",
    errno.EINVAL: "the kernel refuses the request",
    errno.ELOOP: "the file lies on a stacked file system (overlayfs); a max_stack_depth of 2 may allow it",
}


class PassthroughUnavailable(CachefsError):
    """The kernel will not read this file by itself; serve it in cached mode. Not an error of the file."""

    def __init__(self, reason: str, errno_: int) -> None:
        super().__init__(f"passthrough not possible: {reason}")
        self.reason = reason
        self.errno = errno_


class BackingRegistry:
    """The backing files of one connection.

    An id stands for an open file, not for a path: unlinking the file or closing the descriptor it was registered by
    changes nothing. Ids end with `release` once nobody has the file open any more, or with the connection; they
    outlive this process if another one holds the connection. Nothing here blocks.
    """

    def __init__(self, fuse_fd: int, kept: Kept | None = None) -> None:
        """`fuse_fd`, the connection's device file, stays the caller's. `kept`: is told of each id at once."""
        self._fuse_fd = fuse_fd
        self._kept = kept
        # They must be mutable: for immutable ones `ioctl` returns the buffer instead of the id.
        self._map = bytearray(_MAP.size)
        self._id = bytearray(_ID.size)

    def register(self, fd: int) -> int:
        """A new id (> 0) for the regular file open on `fd`, which the caller may close afterwards.

        Registering twice gives two ids, which the kernel does not allow to mix on one node.
        Raises PassthroughUnavailable where the file can still be served otherwise, OSError else.
        """
        _MAP.pack_into(self._map, 0, fd, 0, 0)
        try:
            backing_id: int = fcntl.ioctl(self._fuse_fd, IOC_BACKING_OPEN, self._map, True)
        except OSError as exc:
            reason = _REASONS.get(exc.errno or 0)
            if reason is None:
                raise
            raise PassthroughUnavailable(f"{reason} ({os.strerror(exc.errno or 0)})", exc.errno or 0) from exc
        if self._kept is not None:
            self._kept.note_backing_id(backing_id)
        return backing_id

    def release(self, backing_id: int) -> None:
        """Idempotent. Files open through the id stay readable; new opens cannot use it. Raises OSError."""
        _ID.pack_into(self._id, 0, backing_id)
        try:
            fcntl.ioctl(self._fuse_fd, IOC_BACKING_CLOSE, self._id, True)
        except OSError as exc:
            if exc.errno not in (errno.ENOENT, errno.ENODEV, errno.ENOTCONN):  # gone already, or the connection is
                raise
