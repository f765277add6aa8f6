"""The mount: what a file system answers (`Operations`), and the driver that asks it for the kernel.

Owns /dev/fuse: mounting, the session on it, passthrough's backing files, and the table from errors to errno.
"""

from cachefs.fuse.backing import BackingRegistry, PassthroughUnavailable
from cachefs.fuse.errno import errno_of
from cachefs.fuse.kernel import KernelSession, SessionOptions
from cachefs.fuse.modes import ChosenMode, OpenMode
from cachefs.fuse.mountinfo import FS_TYPE, MountInfo, all_mounts, find_mount, is_mounted
from cachefs.fuse.mounting import (
    Mount,
    MountError,
    MountOptions,
    Probe,
    abort,
    is_dead,
    max_read_limit,
    mount,
    open_device,
    probe,
    unmount,
)
from cachefs.fuse.operations import CacheOperations, OperationsConfig
from cachefs.fuse.protocol import (
    ROOT_NODE,
    AttrReply,
    DirEntry,
    EntryReply,
    OpenDirReply,
    OpenReply,
    Operations,
    StatfsReply,
)
from cachefs.fuse.selftest import try_passthrough
from cachefs.fuse.service import MountConfig, run_mount

__all__ = [
    "FS_TYPE",
    "ROOT_NODE",
    "AttrReply",
    "BackingRegistry",
    "CacheOperations",
    "ChosenMode",
    "DirEntry",
    "EntryReply",
    "KernelSession",
    "Mount",
    "MountConfig",
    "MountError",
    "MountInfo",
    "MountOptions",
    "OpenDirReply",
    "OpenMode",
    "OpenReply",
    "Operations",
    "OperationsConfig",
    "PassthroughUnavailable",
    "Probe",
    "SessionOptions",
    "StatfsReply",
    "abort",
    "all_mounts",
    "errno_of",
    "find_mount",
    "is_dead",
    "is_mounted",
    "max_read_limit",
    "mount",
    "open_device",
    "probe",
    "run_mount",
    "try_passthrough",
    "unmount",
]
