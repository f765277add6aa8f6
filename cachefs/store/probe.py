"""Tries a disk: a small file is written, reaches the medium, is read back from there, and goes again."""

from __future__ import annotations

import os

from cachefs.model import BlockCorruptError
from cachefs.store.diskfull import capacity_errors
from cachefs.store.layout import unlink_if_exists
from cachefs.store.page_io import open_uncached, read_into, scratch, write_all

_NAME = "staging/probe"
_BYTES = 64 * 1024


def try_disk(tier_fd: int) -> None:
    """Blocks on the disk, for however long that hangs. Raises OSError; BlockCorruptError when other bytes come back
    than were written; CapacityError when it is full.
    """
    written = os.urandom(_BYTES)
    unlink_if_exists(_NAME, tier_fd)
    try:
        with capacity_errors():
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
            fd = os.open(_NAME, flags, 0o600, dir_fd=tier_fd)
            try:
                write_all(fd, written, 0)
                os.fsync(fd)
            finally:
                os.close(fd)
        with open_uncached(_NAME, tier_fd) as fd, read_into(fd, scratch(_BYTES), 0, _BYTES) as found:
            if found != written:
                raise BlockCorruptError("other bytes came back from the disk than were written")
    finally:
        unlink_if_exists(_NAME, tier_fd)
