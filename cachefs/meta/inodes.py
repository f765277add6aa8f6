"""Rows of the inode table and what becomes of them when the under-store is looked at again.

An inode names one immutable content. When an object is found with another tag or size, a new row takes over the name
and the old one stays, not live: handles and nodes that still mean the old content can be resolved.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from typing import Any, NamedTuple

import msgspec

from cachefs.model import Attr, ContentKey, Entry, Ino, Kind, ObjectInfo, content_key

FILE_MODE = 0o644
DIRECTORY_MODE = 0o755

_SELECT = (
    "SELECT ino, parent, name, kind, size_bytes, mtime_ns, mode, uid, gid, tag, content_key, mount_id, live,"
    " checked_ns, listed_ns, seen FROM inodes"
)


_OF_ITS_PARENT = "mount_id = (SELECT mount_id FROM inodes WHERE ino = ?)"
"""Of the same under-store as the directory it is in: others may be attached there, and come and go by themselves."""


class Inode(NamedTuple):
    """One row."""

    attr: Attr
    parent: Ino
    name: str
    tag: str
    mount_id: int
    """0 for directories above the mounts."""
    live: bool
    """The name in the parent points here now."""
    checked_ns: int
    """Unix time at which the under-store was last seen to have it."""
    listed_ns: int
    """Unix time at which the last complete listing of this directory began; 0 = never."""
    seen: int
    """Number of the last listing that had it."""


class Found(NamedTuple):
    """An object or directory the under-store has, as a name of one directory."""

    name: str
    info: ObjectInfo


class Merged(NamedTuple):
    """What became of names that were found."""

    entries: list[Entry]
    """As they are now."""
    new: list[str]
    """Names that were not known."""
    moved: list[str]
    """Names that were known otherwise: of other content, or with other attributes."""


def get(connection: sqlite3.Connection, ino: Ino) -> Inode | None:
    row = connection.execute(f"{_SELECT} WHERE ino = ?", (ino,)).fetchone()
    return _inode(row) if row else None


def child(connection: sqlite3.Connection, parent: Ino, name: str) -> Inode | None:
    row = connection.execute(f"{_SELECT} WHERE parent = ? AND name = ? AND live = 1", (parent, name)).fetchone()
    return _inode(row) if row else None


def children(connection: sqlite3.Connection, parent: Ino, after: Ino, limit: int) -> list[Entry]:
    """The next `limit` live entries with inode numbers above `after`, ascending."""
    return [Entry(row[2], _attr(row)) for row in _next_rows(connection, parent, after, limit)]


def child_inodes(connection: sqlite3.Connection, parent: Ino, after: Ino, limit: int) -> list[Inode]:
    """As `children`, the whole rows."""
    return [_inode(row) for row in _next_rows(connection, parent, after, limit)]


def _next_rows(connection: sqlite3.Connection, parent: Ino, after: Ino, limit: int) -> sqlite3.Cursor:
    return connection.execute(
        f"{_SELECT} WHERE parent = ? AND ino > ? AND live = 1 ORDER BY ino LIMIT ?", (parent, after, limit)
    )


def path_below_mount(connection: sqlite3.Connection, inode: Inode) -> str:
    """The path of an inode's object, relative to the root of its under-store."""
    names: list[str] = []
    while True:
        parent = get(connection, inode.parent) if inode.parent else None
        if parent is None or parent.mount_id != inode.mount_id:
            return "/".join(reversed(names))
        names.append(inode.name)
        inode = parent


def path(connection: sqlite3.Connection, inode: Inode) -> str:
    """The path of an inode in the namespace, "/" for the root; that it had, if it is superseded."""
    names: list[str] = []
    while inode.parent:
        names.append(inode.name)
        parent = get(connection, inode.parent)
        if parent is None:
            break
        inode = parent
    return "/" + "/".join(reversed(names))


def last_number(connection: sqlite3.Connection, counter: str) -> int:
    """The last number taken from a counter; 0 before the first."""
    (last,) = connection.execute("SELECT value FROM counters WHERE name = ?", (counter,)).fetchone()
    return int(last)


def take_numbers(connection: sqlite3.Connection, counter: str, last: int) -> None:
    """Record, inside the caller's transaction, that all numbers up to `last` are taken.

    The counter is committed together with what uses the numbers, so none is known to anyone before it is durably taken.
    """
    connection.execute("UPDATE counters SET value = ? WHERE name = ?", (last, counter))


def insert_directory(connection: sqlite3.Connection, parent: int, name: str, mount_id: int, now_ns: int) -> Ino:
    """A directory that no under-store reported: the root, mount points and what lies above them."""
    ino = Ino(last_number(connection, "ino") + 1)
    attr = Attr(ino, Kind.DIRECTORY, 0, now_ns, DIRECTORY_MODE, 0, 0, ContentKey(b""))
    _insert(connection, attr, parent, name, "", mount_id, 0, now_ns)
    take_numbers(connection, "ino", ino)
    return ino


def merge(
    connection: sqlite3.Connection,
    parent: Inode,
    origin: str,
    found: Iterable[Found],
    listing: int,
    now_ns: int,
    *,
    shadow: bool = True,
) -> Merged:
    """Write what was found in a directory, inside the caller's transaction.

    `listing` marks the rows as seen by that listing (see `drop_unseen`). With `shadow`, a name found twice in one
    listing is a directory that shadows an object of the same name: in whichever order they come, the directory stays.
    """
    merged = Merged([], [], [])
    last_ino = last_number(connection, "ino")
    for name, info in found:
        row = connection.execute(
            f"{_SELECT} WHERE parent = ? AND name = ? AND live = 1", (parent.attr.ino, name)
        ).fetchone()
        old = _inode(row) if row else None
        if old is not None:
            if old.mount_id != parent.mount_id:
                # Another under-store is attached here, and hides what this one has.
                merged.entries.append(Entry(name, old.attr))
                continue
            shadowed = shadow and old.attr.is_dir and info.kind is Kind.FILE and old.seen == listing
            if shadowed:
                continue
            if _same_content(old, info):
                attr = old.attr
                if not attr.is_dir and attr.mtime_ns != info.mtime_ns:
                    merged.moved.append(name)
                    attr = msgspec.structs.replace(attr, mtime_ns=info.mtime_ns)
                connection.execute(
                    "UPDATE inodes SET seen = ?, checked_ns = ?, mtime_ns = ? WHERE ino = ?",
                    (listing, now_ns, attr.mtime_ns, attr.ino),
                )
                merged.entries.append(Entry(name, attr))
                continue
            supersede(connection, old.attr.ino)
        (merged.new if old is None else merged.moved).append(name)
        last_ino += 1
        attr = _new_attr(Ino(last_ino), origin, info, now_ns)
        _insert(connection, attr, parent.attr.ino, name, info.tag, parent.mount_id, listing, now_ns)
        merged.entries.append(Entry(name, attr))
    take_numbers(connection, "ino", last_ino)
    return merged


def remove_child(connection: sqlite3.Connection, parent: Ino, name: str) -> None:
    """The under-store no longer has this name; another one that is attached there stays."""
    connection.execute(
        f"UPDATE inodes SET live = 0 WHERE parent = ? AND name = ? AND live = 1 AND {_OF_ITS_PARENT}",
        (parent, name, parent),
    )


def supersede(connection: sqlite3.Connection, ino: Ino) -> None:
    """Its name points at something else now, or at nothing."""
    connection.execute("UPDATE inodes SET live = 0 WHERE ino = ?", (ino,))


def drop_unseen(
    connection: sqlite3.Connection, parent: Ino, listing: int, after: Ino, limit: int
) -> tuple[Ino | None, list[str]]:
    """Of the next `limit` names after inode `after`: what neither this listing nor any look since it began saw is gone.

    Returns the last inode that was looked at, None at the end, and the names that are gone.
    """
    inos = connection.execute(
        "SELECT ino FROM inodes WHERE parent = ? AND ino > ? AND live = 1 ORDER BY ino LIMIT ?", (parent, after, limit)
    ).fetchall()
    if not inos:
        return None, []
    last = Ino(inos[-1][0])
    gone = f"parent = ? AND ino > ? AND ino <= ? AND live = 1 AND seen < ? AND {_OF_ITS_PARENT}"
    scope = (parent, after, last, listing, parent)
    names = [str(name) for (name,) in connection.execute(f"SELECT name FROM inodes WHERE {gone}", scope)]
    if names:
        connection.execute(f"UPDATE inodes SET live = 0 WHERE {gone}", scope)
    return last, names


def end_listing(connection: sqlite3.Connection, directory: Ino, started_ns: int) -> None:
    """All that a listing found is written, and what it did not see is dropped."""
    connection.execute("UPDATE inodes SET listed_ns = ? WHERE ino = ?", (started_ns, directory))


def counts(connection: sqlite3.Connection, mount_id: int) -> tuple[int, int]:
    """(directories, files) known below a mount."""
    row = connection.execute(
        "SELECT COUNT(CASE WHEN kind = ? THEN 1 END), COUNT(CASE WHEN kind = ? THEN 1 END)"
        " FROM inodes WHERE mount_id = ? AND live = 1",
        (Kind.DIRECTORY, Kind.FILE, mount_id),
    ).fetchone()
    return int(row[0]), int(row[1])


def _same_content(old: Inode, info: ObjectInfo) -> bool:
    if old.attr.kind is not info.kind:
        return False
    # Without a tag nothing tells two contents apart.
    return old.attr.is_dir or (old.tag == info.tag != "" and old.attr.size_bytes == info.size_bytes)


def _new_attr(ino: Ino, origin: str, info: ObjectInfo, now_ns: int) -> Attr:
    if info.kind is Kind.DIRECTORY:
        # Object stores have no times for prefixes; the time it was first seen at least stays the same.
        return Attr(ino, info.kind, 0, info.mtime_ns or now_ns, DIRECTORY_MODE, 0, 0, ContentKey(b""))
    key = content_key(f"{origin}/{info.path}", info.tag, info.size_bytes) if info.tag else ContentKey(b"")
    return Attr(ino, info.kind, info.size_bytes, info.mtime_ns, FILE_MODE, 0, 0, key)


def _insert(
    connection: sqlite3.Connection,
    attr: Attr,
    parent: int,
    name: str,
    tag: str,
    mount_id: int,
    listing: int,
    now_ns: int,
) -> None:
    connection.execute(
        "INSERT INTO inodes (ino, parent, name, kind, size_bytes, mtime_ns, mode, uid, gid, tag, content_key, mount_id,"
        " live, seen, checked_ns, listed_ns) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, 1, ?, ?, 0)",
        (
            attr.ino,
            parent,
            name,
            int(attr.kind),
            attr.size_bytes,
            attr.mtime_ns,
            attr.mode,
            attr.uid,
            attr.gid,
            tag,
            attr.key,
            mount_id,
            listing,
            now_ns,
        ),
    )


def _attr(row: tuple[Any, ...]) -> Attr:
    return Attr(Ino(row[0]), Kind(row[3]), row[4], row[5], row[6], row[7], row[8], ContentKey(row[10]))


def _inode(row: tuple[Any, ...]) -> Inode:
    return Inode(_attr(row), Ino(row[1]), row[2], row[9], row[11], bool(row[12]), row[13], row[14], row[15])
