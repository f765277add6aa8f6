"""INIT: what the kernel offers, what we want, what both then hold to.

Bodies (little endian, from linux/fuse.h): the kernel sends `major minor max_readahead flags` and, if flags has
INIT_EXT (7.36), `flags2` and 44 unused bytes. We answer 64 bytes: `major minor max_readahead flags max_background(16)
congestion_threshold(16) max_write time_gran max_pages(16) map_alignment(16) flags2 max_stack_depth`, and 24 zeros
(newer kernels read a request timeout in the first two of them; its expiry aborts the whole connection).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import NamedTuple

import msgspec

from cachefs.fusewire.abi import (
    IN_HEADER_SIZE,
    KERNEL_MAJOR,
    KERNEL_MINOR,
    MIN_MAX_WRITE,
    MIN_READ_BUFFER,
    OLDEST_MINOR,
    PAGE_SIZE,
    WRITE_IN_SIZE,
    InitFlag,
)
from cachefs.model import ConfigError, MiB, RemoteProtocolError

_IN = struct.Struct("<IIII")
_FLAGS2 = struct.Struct("<I")
_OUT = struct.Struct("<IiQIIIIHHIIHHII24x")
_MAJOR_ONLY = struct.Struct("<IiQII")

_ALWAYS = (
    InitFlag.ASYNC_READ  # read-ahead in several requests at once
    | InitFlag.BIG_WRITES
    | InitFlag.PARALLEL_DIROPS
    | InitFlag.MAX_PAGES
    | InitFlag.NO_OPENDIR_SUPPORT  # only says that ENOSYS to OPENDIR would be understood
    | InitFlag.INIT_EXT
    | InitFlag.NO_EXPORT_SUPPORT  # node ids alone do not open files over NFS
    | InitFlag.HAS_RESEND  # a successor of this server may ask for what was left unanswered
)


@dataclass(frozen=True)
class InitOptions:
    """What we want of the kernel; it may grant less. Sizes in bytes. Raises ConfigError for values out of range."""

    max_readahead: int = 4 * MiB
    """Upper bound of the kernel's read-ahead in cached mode; the device's own read_ahead_kb applies below it."""
    max_background: int = 64
    """Read-ahead requests in flight at once; the kernel's 12 starve a server that fetches over a network."""
    max_write: int = MIN_MAX_WRITE
    """Largest WRITE. A read-only mount has none: the smallest value keeps the buffer of every read(2) small."""
    max_pages: int = 256
    """Pages of 4 KiB in one request, so 1 MiB; above 256 needs the sysctl fs.fuse.max_pages_limit."""
    passthrough: bool = True
    """Let OPEN hand out backing files (Linux 6.9+, CAP_SYS_ADMIN)."""
    max_stack_depth: int = 1
    """1: backing files lie on an ordinary file system; 2: on a stacked one such as overlayfs."""
    readdirplus: bool = True
    """Listings bring attributes along, at the kernel's choice, which sees who looks at them."""
    no_open: bool = False
    """No OPEN and RELEASE at all: reads carry the node id only, and the page cache is kept. Excludes passthrough."""
    ignored: int = 0
    """`InitFlag`s that the kernel offers and we do as if it did not: to see what becomes of it on an older one."""

    def __post_init__(self) -> None:
        for key, low, high in (
            ("max_readahead", 0, 2**32 - 1),
            ("max_background", 1, 2**16 - 1),
            ("max_write", MIN_MAX_WRITE, 16 * MiB),
            ("max_pages", 1, 2**16 - 1),
            ("max_stack_depth", 1, 2),
        ):
            value = getattr(self, key)
            if not low <= value <= high:
                raise ConfigError(key, value, f"{low} to {high}")
        if self.no_open and self.passthrough:
            raise ConfigError("no_open", True, "false with passthrough, which needs OPEN")


class InitRequest(NamedTuple):
    major: int
    minor: int
    max_readahead: int
    flags: InitFlag


@dataclass(frozen=True)
class Negotiated:
    """What holds on one connection from INIT to its end, also for a successor that takes the connection over."""

    minor: int
    flags: int
    """The granted `InitFlag`s; an int so that flags we have no name for survive saving."""
    max_readahead: int
    max_background: int
    max_write: int
    max_pages: int
    max_stack_depth: int
    kernel_minor: int = 0
    """What the kernel speaks itself: it takes notifications of newer minors, whatever was agreed."""

    @property
    def passthrough(self) -> bool:
        return bool(self.flags & InitFlag.PASSTHROUGH)

    @property
    def no_open(self) -> bool:
        return bool(self.flags & InitFlag.NO_OPEN_SUPPORT)

    @property
    def readdirplus(self) -> bool:
        return bool(self.flags & InitFlag.DO_READDIRPLUS)

    @property
    def resend(self) -> bool:
        """A successor can have unanswered requests sent again."""
        return bool(self.flags & InitFlag.HAS_RESEND)

    @property
    def max_read(self) -> int:
        """Bytes in the largest READ; the mount option max_read can make it smaller."""
        return self.max_pages * PAGE_SIZE

    @property
    def buffer_size(self) -> int:
        """Bytes to offer to read(2) on the device: less is EINVAL."""
        return max(MIN_READ_BUFFER, IN_HEADER_SIZE + WRITE_IN_SIZE + self.max_write)

    def save(self) -> bytes:
        return msgspec.json.encode(self)

    @classmethod
    def load(cls, saved: bytes) -> Negotiated:
        """The inverse of `save`. Raises msgspec.MsgspecError."""
        return msgspec.json.decode(saved, type=cls)


def parse_init(request: bytes) -> InitRequest:
    """The body of an INIT request (header included in `request`). Raises RemoteProtocolError."""
    try:
        major, minor, max_readahead, flags = _IN.unpack_from(request, IN_HEADER_SIZE)
        if flags & InitFlag.INIT_EXT:
            flags |= _FLAGS2.unpack_from(request, IN_HEADER_SIZE + _IN.size)[0] << 32
    except struct.error as exc:
        raise RemoteProtocolError(f"INIT of {len(request)} bytes is too short") from exc
    return InitRequest(major, minor, max_readahead, InitFlag(flags))


def negotiate(init: InitRequest, options: InitOptions) -> Negotiated:
    """What we answer to this offer: nothing the kernel did not offer, nothing we did not ask for.

    Raises RemoteProtocolError if the kernel is too old. A kernel with a newer major is answered by
    `major_reply` first and then sends another INIT.
    """
    if init.major != KERNEL_MAJOR or init.minor < OLDEST_MINOR:
        raise RemoteProtocolError(
            f"the kernel speaks FUSE {init.major}.{init.minor}; {KERNEL_MAJOR}.{OLDEST_MINOR} or newer is needed"
        )
    wanted = _ALWAYS
    if options.readdirplus:
        wanted |= InitFlag.DO_READDIRPLUS | InitFlag.READDIRPLUS_AUTO
    if options.passthrough:
        wanted |= InitFlag.PASSTHROUGH
    if options.no_open:
        wanted |= InitFlag.NO_OPEN_SUPPORT
    flags = wanted & init.flags & ~options.ignored
    return Negotiated(
        minor=min(init.minor, KERNEL_MINOR),
        flags=int(flags),
        max_readahead=min(options.max_readahead, init.max_readahead),
        max_background=options.max_background,
        max_write=options.max_write,
        max_pages=options.max_pages if flags & InitFlag.MAX_PAGES else 32,
        max_stack_depth=options.max_stack_depth if flags & InitFlag.PASSTHROUGH else 0,
        kernel_minor=init.minor,
    )


def init_reply(unique: int, agreed: Negotiated) -> bytes:
    return _OUT.pack(
        _OUT.size,
        0,
        unique,
        KERNEL_MAJOR,
        agreed.minor,
        agreed.max_readahead,
        agreed.flags & 0xFFFFFFFF,
        agreed.max_background,
        max(1, agreed.max_background * 3 // 4),  # congestion threshold, in the kernel's own proportion
        agreed.max_write,
        1,  # time granularity: nanoseconds
        agreed.max_pages if agreed.flags & InitFlag.MAX_PAGES else 0,
        0,  # map alignment: DAX only
        agreed.flags >> 32,
        agreed.max_stack_depth,
    )


def major_reply(unique: int) -> bytes:
    """The answer to a kernel with a newer major: ours, upon which it sends an INIT that we understand."""
    return _MAJOR_ONLY.pack(_MAJOR_ONLY.size, 0, unique, KERNEL_MAJOR, KERNEL_MINOR)
