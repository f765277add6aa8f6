"""Jobs of data control: what has to outlive the master of them. What the texts mean is the master's."""

from __future__ import annotations

import sqlite3
from typing import NamedTuple

from cachefs.meta import inodes


class StoredJob(NamedTuple):
    job_id: int
    spec: str
    state: str
    position: str
    """How far everything is done."""
    counts: str
    """Up to there."""
    failures: str
    created_ns: int
    """Unix time."""
    ended_ns: int
    """0: not yet."""


def add(db: sqlite3.Connection, spec: str, state: str, now_ns: int) -> StoredJob:
    job_id = inodes.last_number(db, "job") + 1
    inodes.take_numbers(db, "job", job_id)
    job = StoredJob(job_id, spec, state, "", "", "", now_ns, 0)
    db.execute("INSERT INTO jobs VALUES (?, ?, ?, ?, ?, ?, ?, ?)", job)
    return job


def save(db: sqlite3.Connection, job: StoredJob) -> None:
    db.execute(
        "UPDATE jobs SET state = ?, position = ?, counts = ?, failures = ?, ended_ns = ? WHERE job_id = ?",
        (job.state, job.position, job.counts, job.failures, job.ended_ns, job.job_id),
    )


def forget_ended(db: sqlite3.Connection, kept: int) -> None:
    """But for the last so many of those that ended."""
    db.execute(
        "DELETE FROM jobs WHERE ended_ns > 0 AND job_id NOT IN"
        " (SELECT job_id FROM jobs WHERE ended_ns > 0 ORDER BY job_id DESC LIMIT ?)",
        (kept,),
    )


def all_jobs(db: sqlite3.Connection) -> list[StoredJob]:
    """The oldest first."""
    rows = db.execute(
        "SELECT job_id, spec, state, position, counts, failures, created_ns, ended_ns FROM jobs ORDER BY job_id"
    )
    return [StoredJob(*row) for row in rows]
