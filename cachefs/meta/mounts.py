"""Where under-stores are attached: rows of the mounts table, and what becomes of names when they come and go.

A mount lies outside of all others, or right below the root of another one, where it hides what that one has under its
name. Not deeper: a directory of an under-store may go, and what is attached in it would go with it. But for `/volumes`:
where no under-store is attached at it, it is a directory above mounts, also below one that is attached at the root.
"""

from __future__ import annotations

import sqlite3
from typing import NamedTuple

import msgspec

from cachefs.meta import inodes
from cachefs.model import NO_INO, ROOT_INO, VOLUMES_PATH, ConfigError, Ino


class Mount(NamedTuple):
    mount_id: int
    path: str
    """Absolute in the namespace, normalised; "/" is the root."""
    origin: str
    """Of the under-store; part of every content key below this mount."""
    root_ino: Ino


class Added(NamedTuple):
    """A mount that was attached by hand, while the master ran, with what it takes to open it again."""

    path: str
    origin: str
    url: str
    options: dict[str, str]
    """May hold credentials."""


def normalise_mount_path(path: str, key: str = "--mount") -> str:
    """ "/a//b/" -> "/a/b". Raises ConfigError for a relative path, "." and ".."."""
    parts = [part for part in path.split("/") if part]
    if not path.startswith("/") or "." in parts or ".." in parts:
        raise ConfigError(key, path, "an absolute path of the namespace, such as / or /datasets/imagenet")
    return "/" + "/".join(parts)


def is_below(path: str, other: str) -> bool:
    """Whether a normalised path lies at or below another one."""
    return (path + "/").startswith(other.rstrip("/") + "/")


def check_mounts(paths: list[str], key: str = "--mount") -> None:
    """Raises ConfigError for a path that is given twice, or that lies deep inside of another mount."""
    for path in paths:
        if paths.count(path) > 1:
            raise ConfigError(key, path, "each path once")
        outer = [other for other in paths if other != path and is_below(path, other)]
        nearest = max(outer, key=len, default=None)
        if nearest is not None and parent_path(path) not in (nearest, VOLUMES_PATH):
            raise ConfigError(
                key, path, f"a path outside of {nearest}, which is a mount, or right below it: {_right_below(nearest)}"
            )


def parent_path(path: str) -> str:
    return path.rpartition("/")[0] or "/"


def _right_below(path: str) -> str:
    return f"{path.rstrip('/')}/NAME"


def added(db: sqlite3.Connection) -> list[Added]:
    rows = db.execute("SELECT path, origin, url, options FROM mounts WHERE by_hand = 1 ORDER BY path")
    return [
        Added(path, origin, url, msgspec.json.decode(options, type=dict[str, str]))
        for path, origin, url, options in rows
    ]


def removed(db: sqlite3.Connection) -> set[tuple[str, str]]:
    """(path, origin) of mounts that the master was told at its start, and that were removed by hand."""
    return {(path, origin) for path, origin in db.execute("SELECT path, origin FROM removed_mounts")}


def attach_all(db: sqlite3.Connection, told: list[tuple[str, str]], now_ns: int) -> list[Mount]:
    """As `MetaStore.attach`; `told` are normalised."""
    if inodes.get(db, ROOT_INO) is None:
        root = inodes.insert_directory(db, 0, "", 0, now_ns)
        assert root == ROOT_INO
    gone = removed(db)
    for each in gone.difference(told):
        # Not told any more: told again later, it is meant.
        db.execute("DELETE FROM removed_mounts WHERE path = ? AND origin = ?", each)
    told = [each for each in told if each not in gone]
    paths = {path for path, _ in told}
    wanted = [*told, *((each.path, each.origin) for each in added(db) if each.path not in paths)]
    check_mounts([path for path, _ in wanted])
    left = [
        _detach(db, mount_id)
        for mount_id, path, origin in db.execute("SELECT mount_id, path, origin FROM mounts").fetchall()
        if (path, origin) not in wanted
    ]
    mounts = [attach(db, path, origin, now_ns) for path, origin in wanted]
    for ino in left:
        _sweep(db, ino)
    for path in paths:
        db.execute("UPDATE mounts SET by_hand = 0, url = '', options = '{}' WHERE path = ?", (path,))
    return mounts


def attach(db: sqlite3.Connection, path: str, origin: str, now_ns: int) -> Mount:
    row = db.execute("SELECT mount_id, root_ino FROM mounts WHERE path = ?", (path,)).fetchone()
    if row is not None:
        return Mount(row[0], path, origin, Ino(row[1]))
    # Never used again, so that superseded inodes of a detached mount are not taken for those of its successor.
    mount_id = inodes.last_number(db, "mount") + 1
    inodes.take_numbers(db, "mount", mount_id)
    ino = ROOT_INO
    for part in [part for part in path.split("/") if part]:
        known = inodes.child(db, ino, part)
        if known is not None and (known.mount_id == 0 or _is_root(db, known.attr.ino)):
            # Above mounts, or one itself: what is attached in it stays.
            ino = known.attr.ino
        else:
            if known is not None:
                inodes.supersede(db, known.attr.ino)
            ino = inodes.insert_directory(db, ino, part, 0, now_ns)
    db.execute("UPDATE inodes SET mount_id = ?, listed_ns = 0 WHERE ino = ?", (mount_id, ino))
    db.execute("INSERT INTO mounts VALUES (?, ?, ?, ?, 0, '', '{}')", (mount_id, path, origin, ino))
    return Mount(mount_id, path, origin, ino)


def _is_root(db: sqlite3.Connection, ino: Ino) -> bool:
    return db.execute("SELECT 1 FROM mounts WHERE root_ino = ?", (ino,)).fetchone() is not None


def add(db: sqlite3.Connection, path: str, origin: str, url: str, options: dict[str, str], now_ns: int) -> Mount:
    mount = attach(db, path, origin, now_ns)
    text = msgspec.json.encode(options).decode()
    db.execute("UPDATE mounts SET by_hand = 1, url = ?, options = ? WHERE mount_id = ?", (url, text, mount.mount_id))
    db.execute("DELETE FROM removed_mounts WHERE path = ?", (path,))
    return mount


def remove(db: sqlite3.Connection, mount_id: int) -> None:
    """Detach by hand: the master is not to attach it again when it is told the same at its next start."""
    path, origin, by_hand = db.execute(
        "SELECT path, origin, by_hand FROM mounts WHERE mount_id = ?", (mount_id,)
    ).fetchone()
    if not by_hand:
        db.execute("INSERT INTO removed_mounts VALUES (?, ?)", (path, origin))
    detach(db, mount_id)


def detach(db: sqlite3.Connection, mount_id: int) -> None:
    """Its names are gone, and so are directories above it that nothing else is attached in."""
    _sweep(db, _detach(db, mount_id))


def _detach(db: sqlite3.Connection, mount_id: int) -> Ino:
    """Returns the directory it was in, or what is left of it as there is something else attached in it."""
    # Detached inodes keep their rows, as superseded ones do: their numbers must never come back with another meaning.
    (root_ino,) = db.execute("SELECT root_ino FROM mounts WHERE mount_id = ?", (mount_id,)).fetchone()
    db.execute("DELETE FROM mounts WHERE mount_id = ?", (mount_id,))
    db.execute("UPDATE inodes SET live = 0 WHERE mount_id = ? AND ino <> ?", (mount_id, root_ino))
    db.execute("UPDATE inodes SET mount_id = 0, listed_ns = 0 WHERE ino = ?", (root_ino,))
    root = inodes.get(db, Ino(root_ino))
    assert root is not None
    if root_ino == ROOT_INO or inodes.children(db, root.attr.ino, NO_INO, 1):
        return root.attr.ino
    inodes.supersede(db, root.attr.ino)
    return root.parent


def _sweep(db: sqlite3.Connection, ino: Ino) -> None:
    """Take away directories above mounts that have none in them any more."""
    inode = inodes.get(db, ino)
    while inode is not None and inode.live and inode.attr.ino != ROOT_INO and inode.mount_id == 0:
        if inodes.children(db, inode.attr.ino, NO_INO, 1):
            return
        inodes.supersede(db, inode.attr.ino)
        inode = inodes.get(db, inode.parent)
    if inode is not None:
        # The mount that the other one was in may have something else under its name.
        db.execute("UPDATE inodes SET listed_ns = 0 WHERE ino = ?", (inode.attr.ino,))
