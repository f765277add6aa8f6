"""Which worker holds which block. Hints: wrong ones cost a detour, never a wrong byte.

A row carries the epoch of the registration it was last reported under, so that what a full report did not mention can
be told from what it did.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Iterable
from typing import NamedTuple

from cachefs.model import BlockId, ContentKey


class Standing(NamedTuple):
    """A block of a worker: whether another worker holds it too."""

    worker: str
    block: BlockId
    shared: bool


def add(
    db: sqlite3.Connection, worker: str, epoch: int, held: Iterable[tuple[BlockId, int]], alive: Collection[str]
) -> list[Standing]:
    """`held` are (block, length in bytes). Returns how those stand now that others have, or that others had alone;
    only workers in `alive` count.
    """
    rows = [(block.key, block.block_index, worker, length, epoch) for block, length in held]
    db.executemany(
        "DELETE FROM replicas WHERE content_key = ? AND block_index = ? AND worker = ?", [row[:3] for row in rows]
    )
    db.executemany("INSERT INTO replicas VALUES (?, ?, ?, ?, ?)", rows)
    if all(name == worker for name in alive):
        return []
    found = []
    for key, index, *_ in rows:
        block = BlockId(ContentKey(key), index)
        others = [name for name in holders(db, block) if name != worker and name in alive]
        if others:
            found.append(Standing(worker, block, True))
        if len(others) == 1:
            found.append(Standing(others[0], block, True))
    return found


def remove(db: sqlite3.Connection, worker: str, blocks: Iterable[BlockId], alive: Collection[str]) -> list[Standing]:
    """Returns those that one other worker holds alone now."""
    gone = list(blocks)
    db.executemany(
        "DELETE FROM replicas WHERE content_key = ? AND block_index = ? AND worker = ?",
        [(block.key, block.block_index, worker) for block in gone],
    )
    return _sole(db, gone, worker, alive)


def _sole(db: sqlite3.Connection, blocks: Iterable[BlockId], worker: str, alive: Collection[str]) -> list[Standing]:
    if all(name == worker for name in alive):
        return []
    found = []
    for block in blocks:
        others = [name for name in holders(db, block) if name != worker and name in alive]
        if len(others) == 1:
            found.append(Standing(others[0], block, False))
    return found


def sweep(db: sqlite3.Connection, worker: str, epoch: int, alive: Collection[str]) -> list[Standing]:
    """A full report is complete: what it did not mention is gone. Returns as `remove`."""
    rows = db.execute(
        "SELECT content_key, block_index FROM replicas WHERE worker = ? AND epoch < ?", (worker, epoch)
    ).fetchall()
    db.execute("DELETE FROM replicas WHERE worker = ? AND epoch < ?", (worker, epoch))
    return _sole(db, (BlockId(ContentKey(key), index) for key, index in rows), worker, alive)


def standings(db: sqlite3.Connection, worker: str, alive: Collection[str]) -> list[Standing]:
    """How all blocks of a worker stand that came alive or is about to count no more: for it, those that others hold;
    for others, whether they share it with a worker of `alive`.
    """
    rows = db.execute(
        "SELECT a.content_key, a.block_index, b.worker FROM replicas a JOIN replicas b"
        " ON a.content_key = b.content_key AND a.block_index = b.block_index"
        " WHERE a.worker = ? AND b.worker <> ?",
        (worker, worker),
    )
    others: dict[BlockId, list[str]] = {}
    for key, index, name in rows:
        if name in alive:
            others.setdefault(BlockId(ContentKey(key), index), []).append(name)
    counts = worker in alive
    found = []
    for block, names in others.items():
        if counts:
            found.append(Standing(worker, block, True))
        if len(names) == 1:
            found.append(Standing(names[0], block, counts))
    return found


def grant_drops(
    db: sqlite3.Connection, worker: str, blocks: Iterable[BlockId], alive: Collection[str]
) -> tuple[list[BlockId], list[Standing]]:
    """Those that another worker of `alive` holds too: from now on `worker` is no holder of them. Returns them, and as
    `remove`.
    """
    granted = [block for block in blocks if any(name != worker and name in alive for name in holders(db, block))]
    return granted, remove(db, worker, granted, alive)


def remove_worker(db: sqlite3.Connection, worker: str) -> None:
    db.execute("DELETE FROM replicas WHERE worker = ?", (worker,))


def holders(db: sqlite3.Connection, block: BlockId) -> list[str]:
    """Names of the workers that said they hold it."""
    rows = db.execute(
        "SELECT worker FROM replicas WHERE content_key = ? AND block_index = ? ORDER BY worker", tuple(block)
    )
    return [name for (name,) in rows]


def cached_blocks(db: sqlite3.Connection, key: ContentKey) -> int:
    """How many blocks of a content somebody said to hold."""
    sql = "SELECT COUNT(DISTINCT block_index) FROM replicas WHERE content_key = ?"
    (count,) = db.execute(sql, (key,)).fetchone()
    return int(count)


def totals(db: sqlite3.Connection) -> dict[str, tuple[int, int]]:
    """Per worker: (blocks, bytes)."""
    # Not in whole numbers: whatever workers reported, the sum must not be one that the database cannot hold.
    sql = "SELECT worker, COUNT(*), SUM(CAST(length_bytes AS DOUBLE PRECISION)) FROM replicas GROUP BY worker"
    return {worker: (blocks, int(size)) for worker, blocks, size in db.execute(sql)}


def blocks_of(db: sqlite3.Connection, worker: str, after: BlockId | None, limit: int) -> list[tuple[BlockId, int]]:
    """The next blocks of a worker in the order of their ids, with their lengths in bytes."""
    key, index = after if after is not None else (b"", -1)
    rows = db.execute(
        "SELECT content_key, block_index, length_bytes FROM replicas"
        " WHERE worker = ? AND (content_key > ? OR (content_key = ? AND block_index > ?))"
        " ORDER BY content_key, block_index LIMIT ?",
        (worker, key, key, index, limit),
    )
    return [(BlockId(ContentKey(key), index), length) for key, index, length in rows]
