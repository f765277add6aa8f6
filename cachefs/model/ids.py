"""Names of things: inode numbers, content keys, blocks."""

from __future__ import annotations

from typing import NamedTuple, NewType

import msgspec
import xxhash

Ino = NewType("Ino", int)
"""A number the master assigns: persistent, never reused, naming one immutable content."""

ROOT_INO = Ino(1)

NO_INO = Ino(0)
"""Below every inode number: the parent of the root, and where a listing starts."""

ContentKey = NewType("ContentKey", bytes)
"""16 bytes naming one content; see `content_key`."""


class BlockId(NamedTuple):
    """One slice of `block_size` bytes of one content: the unit workers hold, place and evict."""

    key: ContentKey
    block_index: int

    @property
    def filename(self) -> str:
        """`<32 hex>-<index>`, the name of the block's file in a tier."""
        return f"{self.key.hex()}-{self.block_index}"

    @classmethod
    def from_filename(cls, filename: str) -> BlockId | None:
        """The inverse of `filename`; None for any other file's name."""
        hex_key, dash, index = filename.partition("-")
        if not dash or len(hex_key) != 32 or not index.isascii() or not index.isdigit():
            return None
        try:
            block = cls(ContentKey(bytes.fromhex(hex_key)), int(index))
        except ValueError:
            return None
        return block if block.filename == filename else None


def content_key(origin: str, tag: str, size_bytes: int) -> ContentKey:
    """The 128-bit xxh3 of the MessagePack array [origin, tag, size_bytes].

    `origin` is the endpoint and canonical URL of the object, `tag` its etag or the best the store has. The
    serialisation is part of the on-disk format: two caches that agree on the three agree on the key.
    """
    return ContentKey(xxhash.xxh3_128_digest(msgspec.msgpack.encode([origin, tag, size_bytes])))
