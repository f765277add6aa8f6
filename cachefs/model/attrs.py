"""What is known about a file: as the namespace shows it (`Attr`) and as the under-store told it (`ObjectInfo`)."""

from __future__ import annotations

import enum

import msgspec

from cachefs.model.ids import ContentKey, Ino


class Kind(enum.IntEnum):
    FILE = 1
    DIRECTORY = 2


class Attr(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One inode of the namespace. `key` is empty for directories and for content that must not be cached."""

    ino: Ino
    kind: Kind
    size_bytes: int
    mtime_ns: int
    mode: int
    """Permission bits only; the kind says the rest."""
    uid: int
    gid: int
    key: ContentKey

    @property
    def is_dir(self) -> bool:
        return self.kind is Kind.DIRECTORY


class Entry(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A name in a directory and the inode it points at now."""

    name: str
    attr: Attr


class ObjectInfo(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One object or directory as an under-store reports it.

    `path` is relative to the root of the store, without leading or trailing slash; "" is the root itself.
    `tag` identifies the version: the etag, else the best the store has ("" where it has nothing at all; such content
    is not cached across listings). A range read passes the tag back and fails with `ContentChangedError` when the
    object no longer has it.
    """

    path: str
    kind: Kind
    size_bytes: int
    mtime_ns: int
    tag: str
