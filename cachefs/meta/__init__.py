"""The namespace and the block map, in SQL: inodes and names, mounts, and which worker holds which block."""

from cachefs.meta.database import is_of_the_disk, open_database
from cachefs.meta.inodes import Found, Inode, Merged
from cachefs.meta.jobs import StoredJob
from cachefs.meta.mounts import Added, Mount, check_mounts, is_below, normalise_mount_path, parent_path
from cachefs.meta.pins import Content
from cachefs.meta.quotas import Quota
from cachefs.meta.replicas import Standing
from cachefs.meta.store import MetaStore, open_meta_store
from cachefs.meta.volumes import Volume
from cachefs.meta.workers import KnownWorker

__all__ = [
    "Added",
    "Content",
    "Found",
    "Inode",
    "KnownWorker",
    "Merged",
    "MetaStore",
    "Mount",
    "Quota",
    "Standing",
    "StoredJob",
    "Volume",
    "check_mounts",
    "is_below",
    "is_of_the_disk",
    "normalise_mount_path",
    "open_database",
    "open_meta_store",
    "parent_path",
]
