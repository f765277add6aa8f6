"""The mount: what a file system answers (`Operations`), and the driver that asks it for the kernel.

Owns /dev/fuse: mounting, the session on it, passthrough's backing files, and the table from errors to errno.
"""

from cachefs.fuse.backing import BackingRegistry, PassthroughUnavailable
from cachefs.fuse.errno import errno_of
from cachefs.fuse.kernel import KernelSession, SessionOptions
from cachefs.fuse.mountinfo import MountInfo, find_mount, is_mounted
from cachefs.fuse.mounting import Mount, MountError, MountOptions, Probe, abort, mount, open_device, probe, unmount
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

__all__ = [
    "ROOT_NODE",
    "AttrReply",
    "BackingRegistry",
    "DirEntry",
    "EntryReply",
    "KernelSession",
    "Mount",
    "MountError",
    "MountInfo",
    "MountOptions",
    "OpenDirReply",
    "OpenReply",
    "Operations",
    "PassthroughUnavailable",
    "Probe",
    "SessionOptions",
    "StatfsReply",
    "abort",
    "errno_of",
    "find_mount",
    "is_mounted",
    "mount",
    "open_device",
    "probe",
    "unmount",
]
