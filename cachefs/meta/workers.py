"""The workers that ever joined: what has to outlive the master of them."""

from __future__ import annotations

import sqlite3
from typing import NamedTuple

import msgspec

from cachefs.meta import inodes


class KnownWorker(NamedTuple):
    name: str
    epoch: int
    """Of its last registration."""
    state: str
    """active, draining, drained."""
    address: str
    labels: dict[str, str]
    capacity_bytes: int


def register(
    db: sqlite3.Connection, name: str, address: str, labels: dict[str, str], capacity_bytes: int
) -> KnownWorker:
    """A worker began anew: it gets an epoch larger than all before, of any worker; its state stays."""
    epoch = inodes.last_number(db, "epoch") + 1
    inodes.take_numbers(db, "epoch", epoch)
    row = db.execute("SELECT state FROM workers WHERE name = ?", (name,)).fetchone()
    state = row[0] if row is not None else "active"
    db.execute("DELETE FROM workers WHERE name = ?", (name,))
    text = msgspec.json.encode(labels).decode()
    db.execute("INSERT INTO workers VALUES (?, ?, ?, ?, ?, ?)", (name, epoch, state, address, text, capacity_bytes))
    return KnownWorker(name, epoch, state, address, labels, capacity_bytes)


def set_state(db: sqlite3.Connection, name: str, state: str) -> None:
    db.execute("UPDATE workers SET state = ? WHERE name = ?", (state, name))


def forget(db: sqlite3.Connection, name: str) -> None:
    db.execute("DELETE FROM workers WHERE name = ?", (name,))


def all_workers(db: sqlite3.Connection) -> list[KnownWorker]:
    rows = db.execute("SELECT name, epoch, state, address, labels, capacity_bytes FROM workers ORDER BY name")
    return [
        KnownWorker(name, epoch, state, address, msgspec.json.decode(labels, type=dict[str, str]), capacity)
        for name, epoch, state, address, labels, capacity in rows
    ]
