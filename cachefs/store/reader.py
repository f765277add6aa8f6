"""The read side: what a mount opens by itself, without asking the worker."""

from __future__ import annotations

import fcntl
import logging
import os
import stat
from collections.abc import Sequence

from cachefs.model import BlockId, TierError
from cachefs.store.blame import is_of_the_process
from cachefs.store.layout import READ_FLAGS, SUMS_SUFFIX, TIER_FILE, data_name, load_tier_file, running_boot_id

logger = logging.getLogger(__name__)


def a_file_of_tier(path: str) -> str:
    """A regular file that is in every tier, on the file system where its blocks are."""
    return os.path.join(path, TIER_FILE)


class SealedReader:
    """Opens sealed blocks of the tiers at these paths, which a worker on this machine owns."""

    def __init__(self, tier_paths: Sequence[str]) -> None:
        self._boot_id = running_boot_id()
        self.tiers = tuple(tier_paths)
        self._allowed = self.tiers
        self._avoided: frozenset[str] = frozenset()
        self._unproven = list(tier_paths)
        """Not seen to carry the running boot's id yet."""
        self._sealed: list[str] = []

    def open(self, block: BlockId, length: int) -> int | None:
        """A read-only descriptor that holds the shared lock, for the caller to close; None = a miss.

        Five system calls, none of which waits for the disk once the directory is cached: called inline.
        """
        try:
            return self.find(block, length)
        except OSError:
            return None

    def find(self, block: BlockId, length: int) -> int | None:
        """As `open`, for whom a miss is damage. Raises OSError for want of descriptors or memory: that is no miss."""
        if self._unproven:
            self._prove()
        name = data_name(block)
        for directory in self._sealed:
            fd = self._open(directory + name, length)
            if fd is not None:
                return fd
        return None

    def look_into(self, tier_paths: Sequence[str]) -> None:
        """The tiers are these from now on: of another worker, or of one that came with other ones."""
        if self.tiers != (tiers := tuple(tier_paths)):
            self.tiers = self._allowed = tiers
            self._begin_anew()

    def restrict(self, tier_paths: Sequence[str]) -> None:
        """From now on look only into these."""
        self._allowed = tuple(tier_paths)
        self._begin_anew()

    def avoid(self, tier_paths: Sequence[str]) -> None:
        """Not into these for now, the worker says: their disks fail. Replaces what was said before."""
        if self._avoided != (avoided := frozenset(tier_paths)):
            self._avoided = avoided
            self._begin_anew()

    def _begin_anew(self) -> None:
        self._unproven = [path for path in self._allowed if path not in self._avoided]
        self._sealed = []

    def _open(self, path: str, length: int) -> int | None:
        try:
            fd = os.open(path, READ_FLAGS)
        except OSError as error:
            if is_of_the_process(error):
                raise
            return None
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            found = os.fstat(fd)
            # Checked after locking: an eviction that came before has taken the name away, and none can come now.
            # Without checksums beside it, whatever this file holds was never sealed.
            if (
                stat.S_ISREG(found.st_mode)
                and found.st_nlink == 1
                and found.st_size == length
                and os.access(path + SUMS_SUFFIX, os.F_OK)
            ):
                return fd
        except OSError as error:
            if is_of_the_process(error):
                os.close(fd)
                raise
        os.close(fd)
        return None

    def _prove(self) -> None:
        for path in list(self._unproven):
            where = os.path.join(path, TIER_FILE)
            try:
                tier_file = load_tier_file(where, where)
            except TierError as error:
                cause = error.__cause__
                if isinstance(cause, OSError) and is_of_the_process(cause):
                    raise cause from error
                continue
            if tier_file is not None and tier_file.boot_id == self._boot_id:
                self._unproven.remove(path)
                self._sealed.append(os.path.join(path, "sealed", ""))
