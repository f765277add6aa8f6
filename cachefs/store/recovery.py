"""What a worker that starts finds on a tier."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

from cachefs.model import BlockId
from cachefs.store.layout import FAN_OUT, SUMS_SUFFIX, open_directory, unlink_if_exists

logger = logging.getLogger(__name__)


def scan(directory_fd: int) -> Iterator[tuple[BlockId, os.stat_result]]:
    """The blocks below sealed/, partial/ or suspect/ that have both their files, with the stat of the data file.

    Removes everything else: data without checksums is a miss, checksums without data are nothing, and other names are
    not ours. Raises OSError for a directory with something in it: somebody may want that.
    """
    for fan in FAN_OUT:
        plain = _entries(directory_fd, fan)
        for name in plain:
            data = name.removesuffix(SUMS_SUFFIX)
            other = data if data != name else name + SUMS_SUFFIX
            block = BlockId.from_filename(data)
            if block is None or not (plain[name] and plain.get(other)) or not data.startswith(fan):
                logger.info("removed leftover file=%s/%a", fan, name)
                unlink_if_exists(f"{fan}/{name}", directory_fd)
            elif data == name:
                yield block, os.stat(f"{fan}/{name}", dir_fd=directory_fd, follow_symlinks=False)


def move_all(source_fd: int, target_fd: int) -> None:
    """Move everything from sealed/ to suspect/; checksums last, so that what is cut off half way is found again."""
    for fan in FAN_OUT:
        for name in sorted(_names(source_fd, fan), key=lambda name: name.endswith(SUMS_SUFFIX)):
            os.rename(f"{fan}/{name}", f"{fan}/{name}", src_dir_fd=source_fd, dst_dir_fd=target_fd)


def rejoin(sealed_fd: int, source_fd: int) -> None:
    """Take back to partial/ or suspect/ the checksums of blocks whose move to sealed/ was cut off half way."""
    for fan in FAN_OUT:
        sealed, source = set(_names(sealed_fd, fan)), set(_names(source_fd, fan))
        for name in source - sealed:
            checksums = name + SUMS_SUFFIX
            if checksums in sealed and checksums not in source:
                os.rename(f"{fan}/{checksums}", f"{fan}/{checksums}", src_dir_fd=sealed_fd, dst_dir_fd=source_fd)


def empty(directory_fd: int) -> None:
    for fan in FAN_OUT:
        for name in _names(directory_fd, fan):
            unlink_if_exists(f"{fan}/{name}", directory_fd)


def _names(directory_fd: int, fan: str) -> list[str]:
    return list(_entries(directory_fd, fan))


def _entries(directory_fd: int, fan: str) -> dict[str, bool]:
    """The names, and whether each is a plain file: the usual file systems tell that without a look at the file."""
    fd = open_directory(fan, directory_fd)
    try:
        with os.scandir(fd) as entries:
            return {entry.name: entry.is_file(follow_symlinks=False) for entry in entries}
    finally:
        os.close(fd)
