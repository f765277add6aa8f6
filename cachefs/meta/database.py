"""The SQLite file: its schema, its settings, and the lock that gives it to one master."""

from __future__ import annotations

import fcntl
import os
import secrets
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass

from cachefs.model import CachefsError, ConfigError

SCHEMA_VERSION = 5

_OF_THE_DISK = frozenset((sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN))
"""The low byte of what SQLite answers then."""

# Portable on purpose (PostgreSQL later): no rowid tricks, no upserts that only one of the two knows.
SCHEMA = """
CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE counters (name TEXT PRIMARY KEY, value BIGINT NOT NULL);
CREATE TABLE mounts (
    mount_id INTEGER PRIMARY KEY,
    path TEXT NOT NULL UNIQUE,
    origin TEXT NOT NULL,
    root_ino BIGINT NOT NULL,
    by_hand SMALLINT NOT NULL,
    url TEXT NOT NULL,
    options TEXT NOT NULL
);
CREATE TABLE removed_mounts (path TEXT NOT NULL, origin TEXT NOT NULL, PRIMARY KEY (path, origin));
CREATE TABLE pins (path TEXT PRIMARY KEY, pinned_ns BIGINT NOT NULL);
CREATE TABLE quotas (
    path TEXT PRIMARY KEY,
    quota_id BIGINT NOT NULL,
    limit_bytes BIGINT NOT NULL,
    set_ns BIGINT NOT NULL
);
CREATE TABLE volumes (
    volume_id TEXT PRIMARY KEY,
    name TEXT NOT NULL,
    path TEXT NOT NULL,
    url TEXT NOT NULL,
    options TEXT NOT NULL,
    quota_bytes BIGINT NOT NULL,
    sets_quota SMALLINT NOT NULL,
    context TEXT NOT NULL,
    created_ns BIGINT NOT NULL
);
CREATE INDEX volumes_of_path ON volumes (path);
CREATE TABLE inodes (
    ino INTEGER PRIMARY KEY,
    parent BIGINT NOT NULL,
    name TEXT NOT NULL,
    kind SMALLINT NOT NULL,
    size_bytes BIGINT NOT NULL,
    mtime_ns BIGINT NOT NULL,
    mode INTEGER NOT NULL,
    uid BIGINT NOT NULL,
    gid BIGINT NOT NULL,
    tag TEXT NOT NULL,
    content_key BLOB NOT NULL,
    mount_id INTEGER NOT NULL,
    live SMALLINT NOT NULL,
    seen BIGINT NOT NULL,
    checked_ns BIGINT NOT NULL,
    listed_ns BIGINT NOT NULL
);
CREATE UNIQUE INDEX live_names ON inodes (parent, name) WHERE live = 1;
CREATE INDEX live_children ON inodes (parent, ino) WHERE live = 1;
CREATE TABLE replicas (
    content_key BLOB NOT NULL,
    block_index BIGINT NOT NULL,
    worker TEXT NOT NULL,
    length_bytes BIGINT NOT NULL,
    epoch BIGINT NOT NULL,
    PRIMARY KEY (content_key, block_index, worker)
);
CREATE INDEX replicas_of_worker ON replicas (worker, content_key, block_index, epoch);
CREATE TABLE workers (
    name TEXT PRIMARY KEY,
    epoch BIGINT NOT NULL,
    state TEXT NOT NULL,
    address TEXT NOT NULL,
    labels TEXT NOT NULL,
    capacity_bytes BIGINT NOT NULL
);
CREATE TABLE jobs (
    job_id INTEGER PRIMARY KEY,
    spec TEXT NOT NULL,
    state TEXT NOT NULL,
    position TEXT NOT NULL,
    counts TEXT NOT NULL,
    failures TEXT NOT NULL,
    created_ns BIGINT NOT NULL,
    ended_ns BIGINT NOT NULL
);
"""

UPGRADES = {
    1: """
ALTER TABLE mounts ADD COLUMN by_hand SMALLINT NOT NULL DEFAULT 0;
ALTER TABLE mounts ADD COLUMN url TEXT NOT NULL DEFAULT '';
ALTER TABLE mounts ADD COLUMN options TEXT NOT NULL DEFAULT '{}';
CREATE TABLE removed_mounts (path TEXT NOT NULL, origin TEXT NOT NULL, PRIMARY KEY (path, origin));
CREATE TABLE pins (path TEXT PRIMARY KEY, pinned_ns BIGINT NOT NULL);
""",
    2: """
DROP INDEX replicas_of_worker;
ALTER TABLE replicas ADD COLUMN epoch BIGINT NOT NULL DEFAULT 0;
CREATE INDEX replicas_of_worker ON replicas (worker, content_key, block_index, epoch);
CREATE TABLE workers (
    name TEXT PRIMARY KEY,
    epoch BIGINT NOT NULL,
    state TEXT NOT NULL,
    address TEXT NOT NULL,
    labels TEXT NOT NULL,
    capacity_bytes BIGINT NOT NULL
);
CREATE TABLE jobs (
    job_id INTEGER PRIMARY KEY,
    spec TEXT NOT NULL,
    state TEXT NOT NULL,
    position TEXT NOT NULL,
    counts TEXT NOT NULL,
    failures TEXT NOT NULL,
    created_ns BIGINT NOT NULL,
    ended_ns BIGINT NOT NULL
);
INSERT INTO counters VALUES ('epoch', 0), ('job', 0);
""",
    3: """
CREATE TABLE quotas (
    path TEXT PRIMARY KEY,
    quota_id BIGINT NOT NULL,
    limit_bytes BIGINT NOT NULL,
    set_ns BIGINT NOT NULL
);
INSERT INTO counters VALUES ('quota', 0);
""",
    4: """
CREATE TABLE volumes (
    volume_id TEXT PRIMARY KEY,
    name TEXT NOT NULL,
    path TEXT NOT NULL,
    url TEXT NOT NULL,
    options TEXT NOT NULL,
    quota_bytes BIGINT NOT NULL,
    sets_quota SMALLINT NOT NULL,
    context TEXT NOT NULL,
    created_ns BIGINT NOT NULL
);
CREATE INDEX volumes_of_path ON volumes (path);
""",
}
"""From an older schema to the next: a namespace outlives the versions that made it."""


@dataclass(frozen=True)
class Database:
    """Two connections to one file: all writes go through `writer`, by one thread at a time; look-ups by `reader`."""

    writer: sqlite3.Connection
    reader: sqlite3.Connection
    namespace_id: str


@contextmanager
def open_database(data_dir: str) -> Iterator[Database]:
    """Create or open `namespace.db` in `data_dir` and keep it, alone, until the end.

    Raises ConfigError when the directory cannot be used or another master owns it; CachefsError for a database of
    another version or a damaged one.
    """
    try:
        os.makedirs(data_dir, 0o700, exist_ok=True)
        lock_fd = os.open(data_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise ConfigError("--data-dir", data_dir, f"a directory that can be written ({error.strerror})") from error
    try:
        try:
            fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError("--data-dir", data_dir, "a directory that no running master uses") from error
        path = os.path.join(data_dir, "namespace.db")
        _make_private(path)
        try:
            with closing(_connect(path)) as writer:
                _check(writer, path)
                _keep_private(path)
                _set_up(writer)
                namespace_id = _prepare(writer)
                with closing(_connect(path)) as reader:
                    _set_up(reader)
                    yield Database(writer, reader, namespace_id)
        except sqlite3.DatabaseError as error:
            raise CachefsError(f"the namespace in {path} cannot be used: {error}") from error
    finally:
        os.close(lock_fd)


def _make_private(path: str) -> None:
    """Options of under-stores are kept in it, and may be secret: only its owner reads it, from its first moment on,
    whatever the directory and the umask allow. What stands in the way is told when it is opened.
    """
    with suppress(OSError):
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))


def _keep_private(path: str) -> None:
    """The same for one of an earlier version; files that are made beside it get its mode."""
    for each in (path, f"{path}-wal", f"{path}-shm"):
        with suppress(FileNotFoundError):
            os.chmod(each, 0o600)


def _connect(path: str) -> sqlite3.Connection:
    # Autocommit: transactions are begun and ended by `store.transaction`, never by the module's guess.
    return sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=30)


def _check(connection: sqlite3.Connection, path: str) -> None:
    """Raises CachefsError for what is not ours to write to, before anything is written."""
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (tables,) = connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()
    if version == 0 and tables:
        raise CachefsError(f"{path} is a database of something else; it was not changed")
    if version not in (0, *UPGRADES, SCHEMA_VERSION):
        raise CachefsError(f"{path} has schema {version}; this version reads schema {SCHEMA_VERSION}")


def _set_up(connection: sqlite3.Connection) -> None:
    connection.execute("PRAGMA journal_mode = WAL")
    # FULL: an inode number that anyone was told must still be taken after a power cut.
    connection.execute("PRAGMA synchronous = FULL")
    # 16 MiB for each connection: more is the page cache's, which gives it back when others need it.
    connection.execute("PRAGMA cache_size = -16384")
    connection.execute("PRAGMA temp_store = MEMORY")


def _prepare(connection: sqlite3.Connection) -> str:
    """Make the schema where there is none, bring an older one up to date; returns the namespace id."""
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version == 0:
        connection.execute("BEGIN IMMEDIATE")
        for statement in SCHEMA.split(";"):
            connection.execute(statement)
        connection.execute("INSERT INTO facts VALUES ('namespace_id', ?)", (secrets.token_hex(16),))
        connection.execute(
            "INSERT INTO counters VALUES"
            " ('ino', 0), ('listing', 0), ('mount', 0), ('epoch', 0), ('job', 0), ('quota', 0)"
        )
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        connection.execute("COMMIT")
    while version in UPGRADES:
        connection.execute("BEGIN IMMEDIATE")
        for statement in UPGRADES[version].split(";"):
            connection.execute(statement)
        version += 1
        connection.execute(f"PRAGMA user_version = {version}")
        connection.execute("COMMIT")
    (namespace_id,) = connection.execute("SELECT value FROM facts WHERE name = 'namespace_id'").fetchone()
    return str(namespace_id)


def is_of_the_disk(error: Exception) -> bool:
    """Whether the database could not be read or written because its disk is full, read-only, or fails."""
    return isinstance(error, sqlite3.Error) and getattr(error, "sqlite_errorcode", 0) & 0xFF in _OF_THE_DISK
