"""The two files of each block in one directory of a tier: its data, and its checksums.

Whoever reads a data file holds a shared lock on the open file. What is removed only if nobody reads it takes the
exclusive one first.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import stat
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress

from cachefs.model import BlockCorruptError, BlockId
from cachefs.store import sums
from cachefs.store.blame import is_of_the_medium, is_of_the_process
from cachefs.store.layout import READ_FLAGS, data_name, is_in_the_way, move, sums_name, unlink_if_exists
from cachefs.store.page_io import open_uncached, verify_pages

logger = logging.getLogger(__name__)

_NOTHING_TO_READ = (errno.ENOENT, errno.ELOOP, errno.ENXIO)
"""Of opening a block: it is gone, or a symlink or socket is in its place; no reader has that."""

Opened = Callable[[str, int], AbstractContextManager[int]]
"""A descriptor of a file of that name below that directory."""


class BlockFiles:
    """The files of blocks below sealed/, partial/ or suspect/: compared, moved and removed by the id of their block.

    Keeps nothing in memory, so that any thread may call it. `on_read_failed` is called when the medium fails to read.
    """

    def __init__(self, directory_fd: int, on_read_failed: Callable[[OSError], None]) -> None:
        self._directory_fd = directory_fd
        self._on_read_failed = on_read_failed

    # ---- reading ---------------------------------------------------------------------------------------------------

    def checksums(self, block: BlockId) -> sums.Sums:
        """Raises BlockCorruptError, also when they are missing; OSError as `sums.read`."""
        return sums.read(block, sums_name(block), self._directory_fd)

    def open_data(self, block: BlockId) -> int:
        """A read-only descriptor, without the lock of a reader, for the caller to close. Raises OSError."""
        return os.open(data_name(block), READ_FLAGS, dir_fd=self._directory_fd)

    def is_good(self, block: BlockId, opened: Opened = open_uncached) -> bool:
        """Read it all and compare. Blocks on the disk. Raises OSError for want of descriptors or memory."""
        try:
            expected = self.checksums(block)
            with opened(data_name(block), self._directory_fd) as fd:
                found = os.fstat(fd)
                if not stat.S_ISREG(found.st_mode) or found.st_size != expected.length:
                    raise BlockCorruptError(f"{block.filename}: has another length than its checksums")
                verify_pages(block, fd, expected)
        except (BlockCorruptError, OSError) as error:
            if is_of_the_process(error):
                raise
            logger.info("block is damaged block=%s error=%s", block.filename, error)
            for each in (error, error.__cause__):
                if isinstance(each, OSError) and is_of_the_medium(each):
                    self._on_read_failed(each)
            return False
        return True

    def check_name(self, block: BlockId, fd: int, length: int) -> None:
        """What was verified is the open file; the name is what readers will open. Raises BlockCorruptError unless it is
        that of `fd`, and of `length` bytes; OSError.
        """
        own = os.fstat(fd)
        try:
            named = os.stat(data_name(block), dir_fd=self._directory_fd, follow_symlinks=False)
        except FileNotFoundError as error:
            raise BlockCorruptError(f"{block.filename}: its file is gone") from error
        if (named.st_dev, named.st_ino) != (own.st_dev, own.st_ino):
            raise BlockCorruptError(f"{block.filename}: another file has taken its name")
        if own.st_size != length:
            raise BlockCorruptError(f"{block.filename}: its file has {own.st_size} bytes")

    # ---- moving ----------------------------------------------------------------------------------------------------

    def publish(self, block: BlockId, sealed: BlockFiles) -> None:
        """Move it to where readers find it. Raises OSError."""
        # The checksums first: a data file without them is a miss, checksums without data are nothing.
        for name in (sums_name(block), data_name(block)):
            move(name, self._directory_fd, sealed._directory_fd)

    def withdraw(self, block: BlockId, suspect: BlockFiles) -> None:
        """Move it from where readers find it. Raises OSError."""
        # Data first: from that moment it is a miss.
        for name in (data_name(block), sums_name(block)):
            # Half of a block may be gone, where the disk failed to remove the other: it is not restored.
            with suppress(FileNotFoundError):
                move(name, self._directory_fd, suspect._directory_fd)

    # ---- removing --------------------------------------------------------------------------------------------------

    def is_unread(self, block: BlockId) -> bool:
        """Whether it is there and `remove_unread` would take it away."""
        try:
            fd = self.open_data(block)
        except OSError:
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        finally:
            os.close(fd)
        return True

    def remove_unread(self, block: BlockId, later: list[int] | None = None) -> bool:
        """Remove a block that nobody reads; False if somebody does. With `later`, its descriptor is added to that, and
        its room is free once it is closed. Raises OSError.
        """
        try:
            fd = self.open_data(block)
        except OSError as error:
            if error.errno not in _NOTHING_TO_READ:
                raise
            self.remove(block)
            return True
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            # While we hold the lock nobody can take the file into use: a reader rechecks the name after locking.
            self.remove(block)
            return True
        finally:
            if later is None:
                os.close(fd)
            else:
                later.append(fd)

    def remove(self, block: BlockId) -> None:
        """Read by somebody or not. What is not ours and cannot be removed stays in its place. Raises OSError."""
        # Data first: from that moment it is a miss.
        for name in (data_name(block), sums_name(block)):
            try:
                unlink_if_exists(name, self._directory_fd)
            except OSError as error:
                if not is_in_the_way(error):
                    raise
                logger.warning("left where it is file=%s error=%s", error.filename, error.strerror)
