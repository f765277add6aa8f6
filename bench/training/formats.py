"""Samples packed into shards: tar, the way WebDataset has it, and TFRecord.

Shards are read from their beginning to their end, in large pieces. Truncated or damaged ones raise ValueError.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from typing import BinaryIO

from bench.training.crc32c import masked

BLOCK = 512
_LENGTH = struct.Struct("<Q")
_CRC = struct.Struct("<I")


def tar_size(sizes: Iterable[int]) -> int:
    """Bytes of a tar file with members of these sizes, whose names have less than 100 characters."""
    return sum(BLOCK + size + -size % BLOCK for size in sizes) + 2 * BLOCK


def write_tar(samples: Iterable[tuple[str, bytes]]) -> bytes:
    """A tar file (ustar) of these members: name, content."""
    pieces: list[bytes] = []
    for name, content in samples:
        pieces += [_tar_header(name, len(content)), content, bytes(-len(content) % BLOCK)]
    return b"".join([*pieces, bytes(2 * BLOCK)])


def _tar_header(name: str, size: int) -> bytes:
    encoded = name.encode()
    if len(encoded) >= 100:
        raise ValueError(f"the name of a member of a tar file has {len(encoded)} bytes, {name!r}: at most 99")
    before = struct.pack("100s8s8s8s12s12s", encoded, b"0000644", b"0000000", b"0000000", b"%011o" % size, b"%011o" % 0)
    after = struct.pack("c100s6s2s247x", b"0", b"", b"ustar", b"00")
    checksum = sum(before) + sum(after) + 8 * ord(" ")
    return before + b"%06o\0 " % checksum + after


def read_tar(file: BinaryIO) -> Iterator[bytes]:
    """Contents of the regular files in it, in order. Checksums of headers are compared."""
    while True:
        header = _read(file, BLOCK)
        if not any(header):
            return
        checksum = sum(header) - sum(header[148:156]) + 8 * ord(" ")
        if checksum != int(header[148:156].rstrip(b"\0 ") or b"0", 8):
            raise ValueError("a header of a tar file does not match its checksum")
        size = int(header[124:136].rstrip(b"\0 ") or b"0", 8)
        content = _read(file, size + -size % BLOCK)
        if header[156:157] in (b"0", b"\0"):
            yield content[:size] if size % BLOCK else content


def tfrecord_size(sizes: Iterable[int]) -> int:
    """Bytes of a TFRecord file with records of these sizes."""
    return sum(size + _LENGTH.size + 2 * _CRC.size for size in sizes)


def write_tfrecord(records: Iterable[bytes]) -> bytes:
    pieces: list[bytes] = []
    for record in records:
        length = _LENGTH.pack(len(record))
        pieces += [length, _CRC.pack(masked(length)), record, _CRC.pack(masked(record))]
    return b"".join(pieces)


def read_tfrecord(file: BinaryIO, check: bool = False) -> Iterator[bytes]:
    """The records, in order. The checksums of lengths are compared, those of the records if `check`: that takes this
    Python many times as long as reading them.
    """
    while length := file.read(_LENGTH.size):
        (expected,) = _CRC.unpack(_read(file, _CRC.size))
        if len(length) < _LENGTH.size or masked(length) != expected:
            raise ValueError("a length in a TFRecord file does not match its checksum")
        record = _read(file, _LENGTH.unpack(length)[0])
        (expected,) = _CRC.unpack(_read(file, _CRC.size))
        if check and masked(record) != expected:
            raise ValueError("a record of a TFRecord file does not match its checksum")
        yield record


def _read(file: BinaryIO, size: int) -> bytes:
    data = file.read(size)
    if len(data) < size:
        raise ValueError(f"a shard ends in the middle: {len(data)} bytes where {size} were to come")
    return data
