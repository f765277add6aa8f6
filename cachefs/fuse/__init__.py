"""The mount: what a file system answers (`Operations`), and the drivers that ask it for the kernel.

Owns /dev/fuse: mounting, with root or without, the session on it, passthrough's backing files, and the table from
errors to errno.
"""

from pathlib import Path

from cachefs.fuse.backing import BackingRegistry, PassthroughUnavailable
from cachefs.fuse.connections import MountError, abort, abort_of, is_dead, is_over
from cachefs.fuse.errno import errno_of
from cachefs.fuse.fusermount import user_allow_other
from cachefs.fuse.kernel import KernelSession, SessionOptions
from cachefs.fuse.modes import PASSTHROUGH_NEEDS_ROOT, ChosenMode, Driver, OpenMode
from cachefs.fuse.mountinfo import FS_TYPE, MountInfo, all_mounts, find_mount, is_mounted
from cachefs.fuse.mounting import (
    Mount,
    MountOptions,
    Probe,
    allow_below,
    allow_left_below,
    max_read_limit,
    mount,
    open_device,
    open_mount,
    probe,
    unmount,
)
from cachefs.fuse.mounts_client import NodeMounts, open_node_mounts
from cachefs.fuse.operations import CacheOperations, OperationsConfig
from cachefs.fuse.places import check_apart
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
from cachefs.fuse.service import MountConfig, run_mount, why_no_pyfuse3

NODE_KEEPER = str(Path(__file__).with_name("node_keeper.py"))
"""Run as a script, see there."""

__all__ = [
    "FS_TYPE",
    "NODE_KEEPER",
    "PASSTHROUGH_NEEDS_ROOT",
    "ROOT_NODE",
    "AttrReply",
    "BackingRegistry",
    "CacheOperations",
    "ChosenMode",
    "DirEntry",
    "Driver",
    "EntryReply",
    "KernelSession",
    "Mount",
    "MountConfig",
    "MountError",
    "MountInfo",
    "MountOptions",
    "NodeMounts",
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
    "abort_of",
    "all_mounts",
    "allow_below",
    "allow_left_below",
    "check_apart",
    "errno_of",
    "find_mount",
    "is_dead",
    "is_mounted",
    "is_over",
    "max_read_limit",
    "mount",
    "open_device",
    "open_mount",
    "open_node_mounts",
    "probe",
    "run_mount",
    "try_passthrough",
    "unmount",
    "user_allow_other",
    "why_no_pyfuse3",
]
