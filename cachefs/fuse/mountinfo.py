"""What is mounted where, from /proc/self/mountinfo. Never touches the mounts themselves: one may be dead, or ours."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

from cachefs.model import RemoteProtocolError

MOUNTINFO = Path("/proc/self/mountinfo")
FS_TYPE = "fuse.cachefs"

_ESCAPE = re.compile(rb"\\([0-7]{3})")


class MountInfo(NamedTuple):
    mountpoint: str
    device: str
    """`major:minor`; for FUSE the minor names the connection."""
    fs_type: str
    source: str
    options: frozenset[str]
    """Of this mount and of its superblock."""
    root: str
    """What of the file system is seen there: `/`, or below it the file or directory that a bind mount shows alone. One
    that was removed since has `//deleted` behind it.
    """
    number: int
    """The kernel's for this place of the file system."""

    @property
    def connection(self) -> int:
        """The number of a FUSE connection; see `connections.abort`."""
        return int(self.device.partition(":")[2])


def parse_mountinfo(content: bytes) -> list[MountInfo]:
    """The lines of proc(5)'s mountinfo, in mount order; a later line on the same mountpoint hides the earlier ones.

    Spaces, tabs, newlines, backslashes (and `#`) come as octal escapes, carriage returns as they are. Raises
    RemoteProtocolError.
    """
    mounts = []
    for line in content.removesuffix(b"\n").split(b"\n") if content else []:
        # 36 35 98:0 /root /mountpoint options [optional...] - type source super-options
        left, separator, right = line.partition(b" - ")
        fields = left.split(b" ")
        after = right.split(b" ")
        if not separator or len(fields) < 6 or len(after) < 3:
            raise RemoteProtocolError(f"unknown line in mountinfo: {line!r}")
        mounts.append(
            MountInfo(
                mountpoint=_unescape(fields[4]),
                device=fields[2].decode("ascii"),
                fs_type=_unescape(after[0]),
                source=_unescape(after[1]),
                options=frozenset(_unescape(b",".join((fields[5], after[2]))).split(",")),
                root=_unescape(fields[3]),
                number=int(fields[0]),
            )
        )
    return mounts


def all_mounts() -> list[MountInfo]:
    """In mount order."""
    return parse_mountinfo(MOUNTINFO.read_bytes())


def find_mount(mountpoint: str | os.PathLike[str]) -> MountInfo | None:
    """What is mounted on exactly this directory (the topmost, if several), or None.

    Resolves symbolic links, but never looks at the directory itself before it knows that nothing is mounted there: a
    `stat` of a mount whose server is this very thread would wait for itself.
    """
    by_path = {info.mountpoint: info for info in all_mounts()}
    path = os.path.abspath(os.fspath(mountpoint))
    parent, name = os.path.split(path)
    found = by_path.get(path) or by_path.get(os.path.join(os.path.realpath(parent), name))
    if found is None and os.path.islink(path):
        found = by_path.get(os.path.realpath(path))
    return found


def is_mounted(mountpoint: str | os.PathLike[str]) -> bool:
    """Whether a cachefs is mounted on exactly this directory, alive or dead."""
    found = find_mount(mountpoint)
    return found is not None and found.fs_type == FS_TYPE


def _unescape(field: bytes) -> str:
    return os.fsdecode(_ESCAPE.sub(lambda match: bytes([int(match[1], 8)]), field))
