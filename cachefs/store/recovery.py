"""What a worker that starts finds on a tier."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

from cachefs.model import BlockId, Geometry
from cachefs.store.dormant import Dormant
from cachefs.store.layout import (
    FAN_OUT,
    FORMAT_VERSION,
    SUMS_SUFFIX,
    Layout,
    TierFile,
    move,
    open_directory,
    running_boot_id,
    unlink_if_exists,
)
from cachefs.store.sealed import SealedBlocks
from cachefs.store.space import allocated_bytes, estimate
from cachefs.store.suspects import Suspects

logger = logging.getLogger(__name__)


def recover(
    layout: Layout, cluster_id: str, geometry: Geometry, dormant: Dormant, suspects: Suspects, sealed: SealedBlocks
) -> None:
    """Tell each of these of the blocks that an earlier worker left. What cannot be used is removed.

    Blocks on the disk. Raises OSError as `scan`; TierError as `Layout.read_tier_file`.
    """
    boot_id = running_boot_id()
    known = layout.read_tier_file()
    if known is None or known.boot_id != boot_id:
        empty(layout.partial_fd)
        move_all(layout.sealed_fd, layout.suspect_fd)
    for source_fd in (layout.partial_fd, layout.suspect_fd):
        rejoin(layout.sealed_fd, source_fd)
    for block, found in scan(layout.partial_fd):
        dormant.add(block, found.st_blocks * 512)
    for block, found in scan(layout.suspect_fd):
        suspects.add(block, allocated_bytes(found) + estimate(0, 1))
    for block, found in scan(layout.sealed_fd):
        sealed.add(block, allocated_bytes(found) + estimate(0, geometry.page_count(found.st_size)))
    if known is None or known.boot_id != boot_id:
        # Last: a mount uses the tier directly as soon as it carries this boot's id.
        layout.write_tier_file(TierFile(FORMAT_VERSION, cluster_id, boot_id))


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
        names = _names(source_fd, fan)
        if not names:
            continue
        try:
            # All of it in one go, usually. It needs no room on the disk, which may be full: so a worker starts there.
            os.rename(fan, fan, src_dir_fd=source_fd, dst_dir_fd=target_fd)
            continue
        except OSError:
            pass  # there is something already
        for name in sorted(names, key=lambda name: name.endswith(SUMS_SUFFIX)):
            move(f"{fan}/{name}", source_fd, target_fd)


def rejoin(sealed_fd: int, source_fd: int) -> None:
    """Take back to partial/ or suspect/ the checksums of blocks whose move to sealed/ was cut off half way."""
    for fan in FAN_OUT:
        sealed, source = set(_names(sealed_fd, fan)), set(_names(source_fd, fan))
        for name in source - sealed:
            checksums = name + SUMS_SUFFIX
            if checksums in sealed and checksums not in source:
                move(f"{fan}/{checksums}", sealed_fd, source_fd)


def empty(directory_fd: int) -> None:
    for fan in FAN_OUT:
        for name in _names(directory_fd, fan):
            unlink_if_exists(f"{fan}/{name}", directory_fd)


def _names(directory_fd: int, fan: str) -> list[str]:
    return list(_entries(directory_fd, fan))


def _entries(directory_fd: int, fan: str) -> dict[str, bool]:
    """The names, and whether each is a plain file: the usual file systems tell that without a look at the file."""
    try:
        fd = open_directory(fan, directory_fd)
    except FileNotFoundError:
        return {}  # nothing has gone there yet
    try:
        with os.scandir(fd) as entries:
            return {entry.name: entry.is_file(follow_symlinks=False) for entry in entries}
    finally:
        os.close(fd)
