"""Which worker holds which block. Hints: wrong ones cost a detour, never a wrong byte."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable

from cachefs.model import BlockId, ContentKey


def add(connection: sqlite3.Connection, worker: str, held: Iterable[tuple[BlockId, int]]) -> None:
    """`held` are (block, length in bytes)."""
    rows = [(block.key, block.block_index, worker, length) for block, length in held]
    connection.executemany(
        "DELETE FROM replicas WHERE content_key = ? AND block_index = ? AND worker = ?", [row[:3] for row in rows]
    )
    connection.executemany("INSERT INTO replicas VALUES (?, ?, ?, ?)", rows)


def remove(connection: sqlite3.Connection, worker: str, blocks: Iterable[BlockId]) -> None:
    connection.executemany(
        "DELETE FROM replicas WHERE content_key = ? AND block_index = ? AND worker = ?",
        [(block.key, block.block_index, worker) for block in blocks],
    )


def remove_all(connection: sqlite3.Connection, worker: str) -> None:
    connection.execute("DELETE FROM replicas WHERE worker = ?", (worker,))


def holders(connection: sqlite3.Connection, block: BlockId) -> list[str]:
    """Names of the workers that said they hold it."""
    rows = connection.execute(
        "SELECT worker FROM replicas WHERE content_key = ? AND block_index = ? ORDER BY worker", tuple(block)
    )
    return [name for (name,) in rows]


def cached_blocks(connection: sqlite3.Connection, key: ContentKey) -> int:
    """How many blocks of a content somebody said to hold."""
    sql = "SELECT COUNT(DISTINCT block_index) FROM replicas WHERE content_key = ?"
    (count,) = connection.execute(sql, (key,)).fetchone()
    return int(count)


def totals(connection: sqlite3.Connection) -> dict[str, tuple[int, int]]:
    """Per worker: (blocks, bytes)."""
    rows = connection.execute("SELECT worker, COUNT(*), SUM(length_bytes) FROM replicas GROUP BY worker")
    return {worker: (blocks, size) for worker, blocks, size in rows}


def blocks_of(connection: sqlite3.Connection, worker: str) -> set[BlockId]:
    rows = connection.execute("SELECT content_key, block_index FROM replicas WHERE worker = ?", (worker,))
    return {BlockId(ContentKey(key), index) for key, index in rows}
