"""Directories of the namespace whose contents may take only so much in all caches together."""

from __future__ import annotations

import sqlite3
from typing import NamedTuple

from cachefs.meta import inodes


class Quota(NamedTuple):
    quota_id: int
    """Never given to another one, whatever becomes of this."""
    path: str
    limit_bytes: int
    set_ns: int
    """Unix time at which it was first set."""


def all_quotas(db: sqlite3.Connection) -> list[Quota]:
    rows = db.execute("SELECT quota_id, path, limit_bytes, set_ns FROM quotas ORDER BY path")
    return [Quota(*row) for row in rows]


def put(db: sqlite3.Connection, path: str, limit_bytes: int, now_ns: int) -> Quota:
    row = db.execute("SELECT quota_id, path, limit_bytes, set_ns FROM quotas WHERE path = ?", (path,)).fetchone()
    if row is not None:
        db.execute("UPDATE quotas SET limit_bytes = ? WHERE path = ?", (limit_bytes, path))
        return Quota(*row)._replace(limit_bytes=limit_bytes)
    quota_id = inodes.last_number(db, "quota") + 1
    inodes.take_numbers(db, "quota", quota_id)
    db.execute("INSERT INTO quotas VALUES (?, ?, ?, ?)", (path, quota_id, limit_bytes, now_ns))
    return Quota(quota_id, path, limit_bytes, now_ns)


def remove(db: sqlite3.Connection, path: str) -> None:
    db.execute("DELETE FROM quotas WHERE path = ?", (path,))
