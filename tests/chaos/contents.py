"""Contents that say of every 4 KiB which object, version, size and offset they are of. Standard library only: readers
import nothing else.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

BLOCK = 4096
_MAGIC = 0xCAC4EF5
_RECORD = struct.Struct("<16sIIQQ24x")
"""Name, version, magic, size of the object, offset; a block is 64 of it."""


def content(name: str, version: int, size: int) -> bytes:
    """`name`: up to 16 bytes."""
    return b"".join(_block(name, version, size, at) for at in range(0, size, BLOCK))


def _block(name: str, version: int, size: int, at: int) -> bytes:
    whole = _RECORD.pack(name.encode(), version, _MAGIC, size, at) * (BLOCK // _RECORD.size)
    return whole[: max(0, min(BLOCK, size - at))]


@dataclass
class Check:
    """Of what one open file gives: one version, each byte at its place."""

    name: str
    version: int | None = None
    size: int = 0
    """Of that version; 0 as long as none was seen."""

    def __call__(self, data: bytes, offset: int) -> str | None:
        """What is wrong with `data`, found at `offset` (a multiple of 4096); None if nothing is."""
        for start in range(0, len(data), BLOCK):
            at, block = offset + start, data[start : start + BLOCK]
            if len(block) < _RECORD.size:
                if self.version is not None and block != _block(self.name, self.version, self.size, at):
                    return f"{self.name} at {at}: {block!r}, damaged or cut, is not of version {self.version}"
                continue
            name, version, magic, size, said = _RECORD.unpack_from(block)
            if magic != _MAGIC or name.rstrip(b"\0") != self.name.encode():
                return f"{self.name} at {at}: not of this object: {block[:48]!r}"
            if self.version is None:
                self.version, self.size = version, size
            if (version, size) != (self.version, self.size):
                return f"{self.name} at {at}: version {version} after version {self.version} within one open"
            if said != at:
                return f"{self.name} at {at}: bytes of offset {said}, version {version}"
            if block != _block(self.name, version, size, at):
                return f"{self.name} at {at}: damaged or cut: {len(block)} bytes of version {version}, size {size}"
        return None
