"""The namespace and the block map, in SQL: inodes and names, mounts, and which worker holds which block."""

from cachefs.meta.database import open_database
from cachefs.meta.inodes import Found, Inode, Merged
from cachefs.meta.mounts import Mount
from cachefs.meta.store import MetaStore, open_meta_store

__all__ = ["Found", "Inode", "Merged", "MetaStore", "Mount", "open_database", "open_meta_store"]
