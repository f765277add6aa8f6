"""Volumes: what was made under a name, as it was asked for."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass, field
from typing import Any

import msgspec

_SELECT = "SELECT volume_id, name, path, url, options, quota_bytes, sets_quota, context, created_ns FROM volumes"


@dataclass(frozen=True)
class Volume:
    """One row."""

    volume_id: str
    name: str
    path: str
    """Normalised."""
    url: str = field(repr=False)
    """Of its own under-store; "": it is a directory that is there anyway. May hold credentials."""
    options: dict[str, str] = field(repr=False)
    """May hold credentials."""
    quota_bytes: int
    """0: none."""
    sets_quota: bool
    """Whether the quota of its path is there for it; one that was set by hand before is not."""
    context: dict[str, str]
    created_ns: int = 0
    """Unix time."""


def get(db: sqlite3.Connection, volume_id: str) -> Volume | None:
    row = db.execute(f"{_SELECT} WHERE volume_id = ?", (volume_id,)).fetchone()
    return _volume(row) if row else None


def at(db: sqlite3.Connection, path: str) -> list[Volume]:
    return [_volume(row) for row in db.execute(f"{_SELECT} WHERE path = ? ORDER BY volume_id", (path,))]


def below(db: sqlite3.Connection, path: str) -> Volume | None:
    # "0" comes after "/": all that begin with the path and a slash, by the index.
    query = f"{_SELECT} WHERE path > ? AND path < ? ORDER BY path LIMIT 1"
    row = db.execute(query, (f"{path}/", f"{path}0")).fetchone()
    return _volume(row) if row else None


def after(db: sqlite3.Connection, volume_id: str, limit: int) -> list[Volume]:
    rows = db.execute(f"{_SELECT} WHERE volume_id > ? ORDER BY volume_id LIMIT ?", (volume_id, limit))
    return [_volume(row) for row in rows]


def count(db: sqlite3.Connection) -> int:
    (number,) = db.execute("SELECT COUNT(*) FROM volumes").fetchone()
    return int(number)


def put(db: sqlite3.Connection, volume: Volume) -> None:
    """In the place of the one with that id, if there is one."""
    remove(db, volume.volume_id)
    db.execute(
        "INSERT INTO volumes VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            volume.volume_id,
            volume.name,
            volume.path,
            volume.url,
            msgspec.json.encode(volume.options).decode(),
            volume.quota_bytes,
            int(volume.sets_quota),
            msgspec.json.encode(volume.context).decode(),
            volume.created_ns,
        ),
    )


def remove(db: sqlite3.Connection, volume_id: str) -> None:
    db.execute("DELETE FROM volumes WHERE volume_id = ?", (volume_id,))


def _volume(row: tuple[Any, ...]) -> Volume:
    volume_id, name, path, url, options, quota_bytes, sets_quota, context, created_ns = row
    return Volume(
        volume_id,
        name,
        path,
        url,
        msgspec.json.decode(options, type=dict[str, str]),
        quota_bytes,
        bool(sets_quota),
        msgspec.json.decode(context, type=dict[str, str]),
        created_ns,
    )
