"""The ledger of a tier's bytes: what is used, what is promised, and whether more fits."""

from __future__ import annotations

import os

from cachefs.store import sums

_ALLOCATION_UNIT = 4096
"""What file systems commonly round a file's data up to; the estimate is replaced by st_blocks once data is there."""


def allocated_bytes(stat: os.stat_result) -> int:
    """What a file takes: its allocated blocks, and never less than its contents.

    The second half is for file systems that allocate late or compress: there st_blocks of a new file says nothing.
    """
    return max(stat.st_blocks * 512, stat.st_size)


def estimate(length: int, page_count: int) -> int:
    """What a block of that length will take, its checksums included."""
    return _round_up(length) + _round_up(sums.file_size(page_count))


def _round_up(size: int) -> int:
    return -(-size // _ALLOCATION_UNIT) * _ALLOCATION_UNIT


class Space:
    """Counters of one tier; the tier's lock guards them.

    used      bytes of sealed and suspect files, and of unlinked ones that somebody still holds open
    reserved  bytes promised to partials, for their full length, whether written or not
    """

    def __init__(self, directory_fd: int, capacity_bytes: int, free_floor_bytes: int) -> None:
        self._directory_fd = directory_fd
        self._free_floor = free_floor_bytes
        self.capacity = capacity_bytes
        self.used = 0
        self.reserved = 0
        self.unwritten = 0
        """The part of `reserved` that the file system does not know of yet."""

    @property
    def available(self) -> int:
        """Bytes that may still be reserved as far as the capacity goes; negative when the tier is over it."""
        return self.capacity - self.used - self.reserved

    def fits(self, need: int, just_freed: int = 0, free_before: int | None = None) -> bool:
        """Whether `need` more bytes can be promised without evicting.

        Some file systems return unlinked space late. So that nobody evicts twice for it, a caller that evicts passes
        what `filesystem_free` said before (`free_before`) and what it has `just_freed` since.
        """
        if need > self.available:
            return False
        if self._free_floor == 0:
            return True
        free = self.filesystem_free()
        if free is None:
            return True
        if free_before is not None:
            free = max(free, free_before + just_freed)
        return free - self.unwritten - need >= self._free_floor

    def filesystem_free(self) -> int | None:
        """Bytes the file system has for us; None for one without a limit of its own (tmpfs with size=0)."""
        stat = os.statvfs(self._directory_fd)
        return stat.f_bavail * stat.f_frsize if stat.f_blocks else None
