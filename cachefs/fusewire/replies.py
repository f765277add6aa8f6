"""Answers to the kernel: a 16-byte header (length, -errno, unique), then a body that depends on the opcode.

Each function returns one answer as it goes into one write(2), header included, built by a single `pack`. TTLs are
seconds, as floats; the kernel keeps them to the jiffy.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterable
from typing import NamedTuple

from cachefs.fusewire.abi import EXPIRE_ONLY, NOTIFY_INC_EPOCH, NOTIFY_INVAL_ENTRY, NOTIFY_RESEND, OUT_HEADER_SIZE
from cachefs.model import Attr, Kind

# struct fuse_attr: ino size blocks | atime mtime ctime, their nanoseconds | mode nlink uid gid rdev blksize flags
_ATTR = "QQQqqqIIIIIIIIII"
# struct fuse_entry_out: nodeid generation entry_valid attr_valid, the nanoseconds of both, attr
_ENTRY = "QQQQII" + _ATTR
# struct fuse_dirent: ino off namelen type, then the name, padded to 8 bytes
_DIRENT = "QQII"

_HEADER = struct.Struct("<IiQ")
_ENTRY_OUT = struct.Struct("<IiQ" + _ENTRY)
_NEGATIVE_OUT = struct.Struct("<IiQ" + "QQQQII88x")
_ATTR_OUT = struct.Struct("<IiQ" + "QII" + _ATTR)
_OPEN_OUT = struct.Struct("<IiQ" + "QIi")
_XATTR_OUT = struct.Struct("<IiQ" + "II")
_STATFS_OUT = struct.Struct("<IiQ" + "QQQQQIII28x")
_INVAL_ENTRY_OUT = struct.Struct("<IiQ" + "QII")
_DIRENT_RECORD = struct.Struct("<" + _DIRENT)
_DIRENTPLUS_RECORD = struct.Struct("<" + _ENTRY + _DIRENT)
_BARE_DIRENTPLUS_RECORD = struct.Struct("<128x" + _DIRENT)

BLOCK_SIZE = 4096
"""st_blksize; the kernel derives its own block arithmetic from it, so it stays at a page."""
_MAX_TTL_S = float(1 << 31)
TYPE_BITS = {Kind.FILE: 0o100000, Kind.DIRECTORY: 0o040000}
_NANO = 1_000_000_000
_PADDING = (b"", b"\0" * 7, b"\0" * 6, b"\0" * 5, b"\0" * 4, b"\0" * 3, b"\0" * 2, b"\0")


class DirEntry(NamedTuple):
    """One entry of a listing."""

    name: bytes
    node: int
    """Also the inode number shown; never 0."""
    kind: Kind
    next_offset: int
    """What the next READDIR gets, to continue after this entry; opaque to the kernel, positive and below 2**63."""
    attr: Attr | None = None
    """With it, READDIRPLUS saves the kernel a LOOKUP; without, the kernel learns only the name."""
    attr_ttl_s: float = 0.0
    entry_ttl_s: float = 0.0


@functools.lru_cache(maxsize=256)
def split_ttl(ttl_s: float) -> tuple[int, int]:
    """(seconds, nanoseconds); negative is 0, infinite is 68 years. Cached: a mount uses a handful of values."""
    ttl_s = min(max(ttl_s, 0.0), _MAX_TTL_S)
    seconds = int(ttl_s)
    return seconds, int((ttl_s - seconds) * _NANO)


def error_reply(unique: int, errno_: int) -> bytes:
    """`errno_` is positive, as in `errno`."""
    return _HEADER.pack(OUT_HEADER_SIZE, -errno_, unique)


def empty_reply(unique: int) -> bytes:
    return _HEADER.pack(OUT_HEADER_SIZE, 0, unique)


def data_header(unique: int, length: int) -> bytes:
    """What goes before `length` bytes of an answer to READ, for writev(2)."""
    return _HEADER.pack(OUT_HEADER_SIZE + length, 0, unique)


def resend_notification() -> bytes:
    """Asks the kernel to send every request again that was read and not answered (needs HAS_RESEND)."""
    return _HEADER.pack(OUT_HEADER_SIZE, NOTIFY_RESEND, 0)


def inval_entry_notification(parent: int, name: bytes, *, expire_only: bool) -> bytes:
    """What the kernel knows of a name, also that there is none, is no longer true.

    `expire_only`: it is asked for again, and stays what it is if that is confirmed; otherwise the kernel drops it, and
    for a directory everything below, also from under those who stand in it.
    """
    flags = EXPIRE_ONLY if expire_only else 0
    length = OUT_HEADER_SIZE + 16 + len(name) + 1
    return _INVAL_ENTRY_OUT.pack(length, NOTIFY_INVAL_ENTRY, 0, parent, len(name), flags) + name + b"\0"


def inc_epoch_notification() -> bytes:
    """No name that the kernel has been told until now is believed without asking (needs 7.44)."""
    return _HEADER.pack(OUT_HEADER_SIZE, NOTIFY_INC_EPOCH, 0)


def entry_reply(unique: int, node: int, attr: Attr, attr_ttl_s: float, entry_ttl_s: float) -> bytes:
    attr_s, attr_ns = split_ttl(attr_ttl_s)
    entry_s, entry_ns = split_ttl(entry_ttl_s)
    size = attr.size_bytes
    mtime_s, mtime_ns = divmod(attr.mtime_ns, _NANO)
    return _ENTRY_OUT.pack(
        144,
        0,
        unique,
        node,
        0,  # generation: inode numbers are never reused
        entry_s,
        attr_s,
        entry_ns,
        attr_ns,
        node,
        size,
        (size + 511) >> 9,
        mtime_s,
        mtime_s,
        mtime_s,
        mtime_ns,
        mtime_ns,
        mtime_ns,
        TYPE_BITS[attr.kind] | attr.mode,
        1,  # links: 1 for directories too, which tells find(1) not to count on it
        attr.uid,
        attr.gid,
        0,
        BLOCK_SIZE,
        0,
    )


def negative_entry_reply(unique: int, entry_ttl_s: float) -> bytes:
    """No such name, and the kernel may remember that."""
    entry_s, entry_ns = split_ttl(entry_ttl_s)
    return _NEGATIVE_OUT.pack(144, 0, unique, 0, 0, entry_s, 0, entry_ns, 0)


def attr_reply(unique: int, node: int, attr: Attr, attr_ttl_s: float) -> bytes:
    attr_s, attr_ns = split_ttl(attr_ttl_s)
    size = attr.size_bytes
    mtime_s, mtime_ns = divmod(attr.mtime_ns, _NANO)
    return _ATTR_OUT.pack(
        120,
        0,
        unique,
        attr_s,
        attr_ns,
        0,
        node,
        size,
        (size + 511) >> 9,
        mtime_s,
        mtime_s,
        mtime_s,
        mtime_ns,
        mtime_ns,
        mtime_ns,
        TYPE_BITS[attr.kind] | attr.mode,
        1,
        attr.uid,
        attr.gid,
        0,
        BLOCK_SIZE,
        0,
    )


def xattr_size_reply(unique: int, size: int) -> bytes:
    """How many bytes GETXATTR or LISTXATTR would answer."""
    return _XATTR_OUT.pack(OUT_HEADER_SIZE + 8, 0, unique, size, 0)


def open_reply(unique: int, fh: int, flags: int, backing_id: int = 0) -> bytes:
    """OPEN and OPENDIR. `flags` are `OpenFlag`s; PASSTHROUGH needs a backing id and excludes KEEP_CACHE."""
    return _OPEN_OUT.pack(32, 0, unique, fh, flags, backing_id)


def statfs_reply(unique: int, block_size: int, blocks: int, blocks_free: int, files: int, name_max: int) -> bytes:
    return _STATFS_OUT.pack(96, 0, unique, blocks, blocks_free, blocks_free, files, 0, block_size, name_max, block_size)


def dirent_limit(size: int, plus: bool) -> int:
    """No more entries than this fit into `size` bytes, however short their names."""
    return size // ((_DIRENTPLUS_RECORD.size if plus else _DIRENT_RECORD.size) + 8)


def pack_dirents(entries: Iterable[DirEntry], size: int, plus: bool) -> bytes:
    """The body of an answer to READDIR or READDIRPLUS: as many whole records as fit into `size` bytes, each padded to
    a multiple of 8. Empty tells the kernel that the directory ends."""
    pieces: list[bytes] = []
    room = size
    fixed = _DIRENTPLUS_RECORD.size if plus else _DIRENT_RECORD.size
    for entry in entries:
        name = entry.name
        length = len(name)
        room -= (fixed + length + 7) & ~7
        if room < 0:
            break
        if plus:
            pieces.append(_plus_record(entry, length))
        else:
            pieces.append(_DIRENT_RECORD.pack(entry.node, entry.next_offset, length, TYPE_BITS[entry.kind] >> 12))
        pieces.append(name)
        pieces.append(_PADDING[length & 7])  # both fixed parts are multiples of 8
    return b"".join(pieces)


def _plus_record(entry: DirEntry, length: int) -> bytes:
    attr = entry.attr
    node = entry.node
    type_bits = TYPE_BITS[entry.kind]
    if attr is None:
        return _BARE_DIRENTPLUS_RECORD.pack(node, entry.next_offset, length, type_bits >> 12)
    attr_s, attr_ns = split_ttl(entry.attr_ttl_s)
    entry_s, entry_ns = split_ttl(entry.entry_ttl_s)
    size = attr.size_bytes
    mtime_s, mtime_ns = divmod(attr.mtime_ns, _NANO)
    return _DIRENTPLUS_RECORD.pack(
        node,
        0,
        entry_s,
        attr_s,
        entry_ns,
        attr_ns,
        node,
        size,
        (size + 511) >> 9,
        mtime_s,
        mtime_s,
        mtime_s,
        mtime_ns,
        mtime_ns,
        mtime_ns,
        type_bits | attr.mode,
        1,
        attr.uid,
        attr.gid,
        0,
        BLOCK_SIZE,
        0,
        node,
        entry.next_offset,
        length,
        type_bits >> 12,
    )
