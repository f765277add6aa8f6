"""What a FUSE driver asks of a file system: the `Operations` protocol and the replies it gives.

Operations come in pairs. `x_nowait` answers from memory, or raises `trio.WouldBlock`; the driver then runs the
async `x` in a task of its own, which an interrupted caller (a signal, a kill) cancels. So `x` must be safe to cancel
at every checkpoint, and leave nothing open that nobody will release.

Errors are those of `cachefs.model.errors` (see `cachefs.fuse.errno`), or an OSError, whose errno reaches the
application unchanged. Anything else is a bug: the driver logs it with its traceback and answers EIO.

Node 1 is the root of the mount; every other node id is an inode number of the namespace.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from cachefs.fusewire import DirEntry
from cachefs.model import Attr

__all__ = [
    "ROOT_NODE",
    "AttrReply",
    "DirEntry",
    "EntryReply",
    "OpenDirReply",
    "OpenReply",
    "Operations",
    "StatfsReply",
]

ROOT_NODE = 1


class EntryReply(NamedTuple):
    """A name and what it points at. Node 0 is a negative entry: "no such name", true for `entry_ttl_s`."""

    node: int
    attr: Attr | None
    """None only for a negative entry. The kernel is told `node` as inode number, not `attr.ino`."""
    attr_ttl_s: float
    entry_ttl_s: float


class AttrReply(NamedTuple):
    node: int
    attr: Attr
    attr_ttl_s: float


class OpenReply(NamedTuple):
    fh: int
    """0 to 2**64-1; comes back in read and release."""
    backing_id: int | None = None
    """From `BackingRegistry.register`: the kernel reads that file itself and never asks. The kernel refuses (EIO) to
    mix this with cached opens of the same node, and two ids on one node, for as long as the opens overlap."""
    keep_cache: bool = True
    """In cached mode: pages the kernel has from earlier opens of this node are still good."""


class OpenDirReply(NamedTuple):
    fh: int
    keep_cache: bool = False
    """The listing that the kernel keeps of this directory is still good. Its copy holds names, not attributes: once
    those have expired it asks for them one by one, so this should not outlive the attributes' TTL."""


class StatfsReply(NamedTuple):
    block_size: int
    blocks: int
    blocks_free: int
    files: int
    name_max: int = 255


class Operations(Protocol):
    """A read-only file system. Called from one trio thread."""

    def lookup_nowait(self, parent: int, name: bytes) -> EntryReply:
        """Raises NotFoundError (not remembered by the kernel), or returns a negative entry (remembered)."""

    async def lookup(self, parent: int, name: bytes) -> EntryReply: ...

    def getattr_nowait(self, node: int) -> AttrReply: ...

    async def getattr(self, node: int) -> AttrReply: ...

    def open_nowait(self, node: int, flags: int) -> OpenReply:
        """`flags` as in open(2); the driver has already refused what would write.

        Every reply is followed by exactly one `release`, at the latest when the driver finds that the caller was
        interrupted. StaleError makes the kernel look the name up again and open what it finds then.
        """

    async def open(self, node: int, flags: int, pid: int) -> OpenReply:
        """If this is cancelled, no `release` follows."""

    def read_nowait(self, fh: int, offset: int, size: int) -> bytes | bytearray | memoryview:
        """Exactly `size` bytes, or fewer if and only if the content ends there: the kernel takes a short answer for
        the end of the file, without any error. On a mount without OPEN (`InitOptions.no_open`) fh is the node id.
        The memory may be overwritten by the next call.
        """

    async def read(self, fh: int, offset: int, size: int) -> bytes | bytearray | memoryview: ...

    def release(self, node: int, fh: int) -> None:
        """The last user of the handle is gone, mmaps included. Idempotent; never raises."""

    def opendir_nowait(self, node: int) -> OpenDirReply: ...

    async def opendir(self, node: int) -> OpenDirReply: ...

    def readdir_nowait(self, fh: int, offset: int, limit: int) -> Sequence[DirEntry]:
        """Up to `limit` entries after `offset` (0 is the start); empty at the end. The driver may use fewer than it got
        and ask again from the last one used. "." and ".." may be left out. `lookup` counts are not owed for these: see
        `forget`.
        """

    async def readdir(self, fh: int, offset: int, limit: int) -> Sequence[DirEntry]: ...

    def adopt_directory(self, node: int, fh: int) -> None:
        """A handle of this directory, which an earlier server may have given, is about to be read. Never raises."""

    def releasedir(self, fh: int) -> None:
        """Idempotent; never raises."""

    async def xattrs(self, node: int) -> Mapping[bytes, bytes]:
        """Extended attributes, all below `user.`. Asked with `SessionOptions.xattr` only."""

    def statfs(self) -> StatfsReply: ...

    def forget(self, node: int, lookups: int) -> None:
        """The kernel drops so many references to the node. A hint: references made by READDIRPLUS were never reported
        as lookups, and a successor of a killed server does not know the earlier ones. Never raises."""
