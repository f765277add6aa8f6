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
    """Counters of one tier; the store's lock guards them."""

    def __init__(self, directory_fd: int, capacity_bytes: int, free_floor_bytes: int) -> None:
        self._directory_fd = directory_fd
        self._free_floor = free_floor_bytes
        self.capacity = capacity_bytes
        self.used = 0
        """Bytes of sealed and suspect files, and of partials that nobody has open."""
        self.reserved = 0
        """Bytes promised to open partials, for their full length, whether written or not."""

    @property
    def available(self) -> int:
        """Bytes that may still be reserved as far as the capacity goes; negative when the tier is over it."""
        return self.capacity - self.used - self.reserved

    def room(self, unwritten: int) -> int:
        """Bytes that can be promised without evicting; `unwritten` is the part of `reserved` not on the disk yet."""
        room = self.available
        if self._free_floor:
            stat = os.statvfs(self._directory_fd)
            # A tmpfs of size=0 has no limit of its own, and says so by having no blocks.
            if stat.f_blocks:
                room = min(room, stat.f_bavail * stat.f_frsize - unwritten - self._free_floor)
        return room
