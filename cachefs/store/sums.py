"""Page checksums and the `.sums` file that keeps them beside a block's data.

The layout is an on-disk format; everything is little endian:

| offset | bytes | what |
|---|---|---|
| 0 | 8 | magic `cfsums\\r\\n` |
| 8 | 4 | format version, 1 |
| 12 | 4 | zero |
| 16 | 16 | content key |
| 32 | 8 | block index |
| 40 | 8 | block length in bytes |
| 48 | 8 | page size in bytes |
| 56 | 8 | xxh3_64 of bytes 0-55 |
| 64 + 16 p | 8 | xxh3_64 of page p |
| 72 + 16 p | 8 | presence mark of page p, never 0: xxh3_64 of (bytes 0-63, p as u64, the checksum as u64); 0 = absent |

The file ends after the last page's entry. A mark takes the place of a bit in a presence bitmap: it makes every entry
check itself, so that no damage turns a hole into a page, and one 16-byte write makes a page present. The file of a
sealed block is the one of its partial, with every mark set.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Sequence
from typing import NamedTuple

import xxhash

from cachefs.model import BlockCorruptError, BlockId, Geometry
from cachefs.store.blame import is_of_the_process

_MAGIC = b"cfsums\r\n"
_VERSION = 1
_HEADER = struct.Struct("<8sII16sQQQ")
_U64 = struct.Struct("<Q")
_ENTRY = struct.Struct("<QQ")
HEADER_BYTES = _HEADER.size + _U64.size
ENTRY_BYTES = _ENTRY.size
_READ_CHUNK = 64 * 1024

Buffer = bytes | bytearray | memoryview


def page_checksum(data: Buffer) -> int:
    """The checksum that travels with a page: its 64-bit xxh3."""
    return xxhash.xxh3_64_intdigest(data)


class Sums(NamedTuple):
    """The contents of a `.sums` file."""

    length: int
    """Of the block, in bytes."""
    page_size: int
    checksums: Sequence[int | None]
    """One per page; None = the page is absent."""

    @property
    def complete(self) -> bool:
        return None not in self.checksums

    @property
    def geometry(self) -> Geometry:
        """How this block was cut; only its page arithmetic is meant."""
        return Geometry(page_size=self.page_size)


def file_size(page_count: int) -> int:
    """Bytes of the `.sums` file of a block of that many pages."""
    return HEADER_BYTES + page_count * ENTRY_BYTES


def entry_offset(page: int) -> int:
    return HEADER_BYTES + page * ENTRY_BYTES


def encode_header(block: BlockId, length: int, page_size: int) -> bytes:
    fields = _HEADER.pack(_MAGIC, _VERSION, 0, block.key, block.block_index, length, page_size)
    return fields + _U64.pack(page_checksum(fields))


def encode_entry(header: bytes, page: int, checksum: int | None) -> bytes:
    """The 16 bytes of one page; None = absent."""
    if checksum is None:
        return bytes(ENTRY_BYTES)
    return _ENTRY.pack(checksum, _mark(header, page, checksum))


def encode(header: bytes, checksums: Sequence[int | None]) -> bytes:
    """A whole file."""
    return header + b"".join([encode_entry(header, page, checksum) for page, checksum in enumerate(checksums)])


def decode(data: bytes, block: BlockId) -> Sums:
    """Parse a whole file, which must be about `block`.

    A damaged entry reads as an absent page. Raises BlockCorruptError for anything else that is wrong: truncated,
    foreign, of another version, or too long.
    """
    length, page_size = _decode_header(data, block)
    if len(data) != _expected_bytes(data, block):
        raise BlockCorruptError(f"{block.filename}: checksums have another length than their header says")
    header = data[:HEADER_BYTES]
    checksums: list[int | None] = []
    for page, (checksum, mark) in enumerate(_ENTRY.iter_unpack(data[HEADER_BYTES:])):
        checksums.append(checksum if mark == _mark(header, page, checksum) else None)
    return Sums(length, page_size, checksums)


def _expected_bytes(data: bytes, block: BlockId) -> int:
    length, page_size = _decode_header(data, block)
    return file_size(Geometry(page_size=page_size).page_count(length))


def _decode_header(data: bytes, block: BlockId) -> tuple[int, int]:
    """(length of the block, page size), bytes."""
    if len(data) < HEADER_BYTES:
        raise BlockCorruptError(f"{block.filename}: checksums are cut off")
    header = data[:HEADER_BYTES]
    magic, version, _, key, block_index, length, page_size = _HEADER.unpack_from(header)
    if magic != _MAGIC or version != _VERSION or _U64.unpack_from(header, _HEADER.size)[0] != _header_checksum(header):
        raise BlockCorruptError(f"{block.filename}: checksums are damaged or of another version")
    if key != block.key or block_index != block.block_index or page_size == 0:
        raise BlockCorruptError(f"{block.filename}: checksums are those of another block")
    return length, page_size


def read(block: BlockId, name: str, dir_fd: int) -> Sums:
    """Read and parse a file. Raises BlockCorruptError, also when it is missing or cannot be read; OSError for want of
    descriptors or memory.
    """
    try:
        # O_NONBLOCK: a FIFO in its place would hold us up.
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=dir_fd)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise BlockCorruptError(f"{block.filename}: checksums are not in a plain file")
            data = bytearray(os.read(fd, HEADER_BYTES))
            # What is there by mistake may be large: no more than there should be, and a byte to notice it.
            left = _expected_bytes(bytes(data), block) + 1 - len(data)
            while left > 0 and (chunk := os.read(fd, min(left, _READ_CHUNK))):
                data += chunk
                left -= len(chunk)
        finally:
            os.close(fd)
    except OSError as error:
        if is_of_the_process(error):
            raise
        raise BlockCorruptError(f"{block.filename}: checksums cannot be read: {error.strerror}") from error
    return decode(bytes(data), block)


def _header_checksum(header: bytes) -> int:
    return page_checksum(header[: _HEADER.size])


def _mark(header: bytes, page: int, checksum: int) -> int:
    return page_checksum(header + _ENTRY.pack(page, checksum)) or 1
