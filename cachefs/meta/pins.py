"""Paths of the namespace whose contents are never evicted, and what lies below them."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from typing import NamedTuple

from cachefs.model import ContentKey, Ino, Kind


class Content(NamedTuple):
    """A name in a directory, as far as pinning goes."""

    ino: Ino
    is_dir: bool
    size_bytes: int
    key: ContentKey
    """Empty for what is not cached."""
    cached_blocks: int
    """That some worker said it holds; 0 if that was not asked for."""


def all_pins(connection: sqlite3.Connection) -> dict[str, int]:
    """Path -> Unix time in nanoseconds."""
    return dict(connection.execute("SELECT path, pinned_ns FROM pins ORDER BY path").fetchall())


def add(connection: sqlite3.Connection, paths: Iterable[str], now_ns: int) -> None:
    connection.executemany("INSERT INTO pins VALUES (?, ?)", [(path, now_ns) for path in paths])


def remove(connection: sqlite3.Connection, paths: Iterable[str]) -> None:
    connection.executemany("DELETE FROM pins WHERE path = ?", [(path,) for path in paths])


def contents(
    connection: sqlite3.Connection, parent: Ino, after: Ino, limit: int, *, with_cached: bool
) -> list[Content]:
    """The next names of a directory after inode `after`, by inode number."""
    cached = "(SELECT COUNT(DISTINCT block_index) FROM replicas WHERE content_key = inodes.content_key)"
    rows = connection.execute(
        f"SELECT ino, kind, size_bytes, content_key, {cached if with_cached else 0} FROM inodes"
        " WHERE parent = ? AND ino > ? AND live = 1 ORDER BY ino LIMIT ?",
        (parent, after, limit),
    )
    return [
        Content(Ino(ino), kind == Kind.DIRECTORY, size, ContentKey(key), cached_blocks)
        for ino, kind, size, key, cached_blocks in rows
    ]
