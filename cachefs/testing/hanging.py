"""A directory that hangs whoever looks at it, as of a file server that is away: a FUSE mount that nobody answers."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_MNT_DETACH = 2


@contextmanager
def hanging_directory(path: Path) -> Iterator[Path]:
    """`path` is made. At the end of the block whoever hangs gets ENOTCONN. Needs root. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    path.mkdir()
    fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    try:
        options = f"fd={fd},rootmode=40000,user_id=0,group_id=0".encode()
        if libc.mount(b"hanging", os.fsencode(path), b"fuse", 0, options) != 0:
            raise OSError(ctypes.get_errno(), "mount", str(path))
        try:
            yield path
        finally:
            libc.umount2(os.fsencode(path), _MNT_DETACH)
    finally:
        os.close(fd)
