"""An inode of the database, or why there is none."""

from __future__ import annotations

from cachefs.meta import Inode, MetaStore
from cachefs.model import Ino, NotADirectory, NotFoundError, StaleError


def get_inode(store: MetaStore, ino: Ino) -> Inode:
    """Raises NotFoundError for a number never given out."""
    inode = store.get(ino)
    if inode is None:
        raise NotFoundError(f"inode {ino} does not exist")
    return inode


def get_directory(store: MetaStore, ino: Ino) -> Inode:
    """Raises NotFoundError; NotADirectory; StaleError when no name points at it any more."""
    inode = get_inode(store, ino)
    if not inode.attr.is_dir:
        raise NotADirectory(f"inode {ino} is not a directory")
    if not inode.live:
        raise StaleError(f"directory {ino} is gone from the under-store")
    return inode
