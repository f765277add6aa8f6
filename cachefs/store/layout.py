"""The directory of a tier: names in it, the file that identifies it, and the lock that gives it to one worker.

    sealed/<2 hex>/<32 hex key>-<block>[.sums]     complete, immutable
    partial/<2 hex>/<key>-<block>[.sums]           sparse, being filled
    suspect/<2 hex>/<key>-<block>[.sums]           sealed in an earlier boot, not verified since
    staging/                                       files being written
    tier.json                                      {"format", "cluster_id", "boot_id"}

The directories of two digits are made when something first goes there: three times 256 of them are what a new tier
would begin with, and some file systems take half a second for that.

All names are resolved below descriptors of the directories, so that the tree in use is the one that is locked, whatever
happens to the path that led to it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from cachefs.model import BlockId, TierError

FORMAT_VERSION = 1
TIER_FILE = "tier.json"
SUMS_SUFFIX = ".sums"
_DIRECTORY_MODE = 0o700
_FILE_MODE = 0o600
_MAX_TIER_FILE_BYTES = 64 * 1024
_OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_FS_IOC_GETFLAGS = 0x80086601
_FS_IOC_SETFLAGS = 0x40086602
_FS_NOATIME_FL = 0x80
_FLAGS = struct.Struct("@i")
READ_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
"""For files of a tier. O_NONBLOCK, as a FIFO that somebody put in a file's place would hold up whoever opens it."""
T = TypeVar("T")

FAN_OUT = tuple(f"{value:02x}" for value in range(256))


class TierFile(msgspec.Struct, frozen=True):
    """The contents of tier.json."""

    format: int
    cluster_id: str
    boot_id: str
    """Of the kernel under which everything in sealed/ was written or verified."""


class _AnyFormat(msgspec.Struct):
    format: int


def running_boot_id() -> str:
    """A random id the kernel makes at boot."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()


def data_name(block: BlockId) -> str:
    """`<2 hex>/<32 hex>-<index>`: the data file, below sealed/, partial/ or suspect/."""
    # Formatted by hand: this is on the path of every open, and `BlockId.filename` would cost a second string.
    digits = block.key.hex()
    return f"{digits[:2]}/{digits}-{block.block_index}"


def sums_name(block: BlockId) -> str:
    return data_name(block) + SUMS_SUFFIX


def parse_tier_file(data: bytes, where: str) -> TierFile:
    """Raises TierError for a damaged file or a newer format; `where` names the file in the message."""
    try:
        # By itself: of another format, nothing else needs to be where we know it.
        version = msgspec.json.decode(data, type=_AnyFormat).format
        if version != FORMAT_VERSION:
            raise TierError(f"{where} has format {version}; this version reads format {FORMAT_VERSION}")
        return msgspec.json.decode(data, type=TierFile)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise TierError(f"{where} is damaged ({error}); remove it to have the cached files verified again") from error


def load_tier_file(name: str, where: str, dir_fd: int | None = None) -> TierFile | None:
    """None when there is none. Raises TierError as `parse_tier_file`, and when it cannot be read."""
    with tier_errors(where):
        try:
            fd = os.open(name, READ_FLAGS, dir_fd=dir_fd)
        except FileNotFoundError:
            return None
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise TierError(f"{where} is not a plain file; remove it to have the cached files verified again")
            data = os.read(fd, _MAX_TIER_FILE_BYTES)
        finally:
            os.close(fd)
    return parse_tier_file(data, where)


@dataclass(frozen=True)
class Layout:
    """Open descriptors of a tier's directories. `open_layout` makes and owns one."""

    path: str
    """For messages only."""
    tier_fd: int
    sealed_fd: int
    partial_fd: int
    suspect_fd: int

    def read_tier_file(self) -> TierFile | None:
        """As `load_tier_file`."""
        return load_tier_file(TIER_FILE, os.path.join(self.path, TIER_FILE), self.tier_fd)

    def write_tier_file(self, tier_file: TierFile) -> None:
        """Replace tier.json atomically, and durably where the medium is durable."""
        temporary = TIER_FILE + ".new"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        unlink_if_exists(temporary, self.tier_fd)
        with open(os.open(temporary, flags, _FILE_MODE, dir_fd=self.tier_fd), "wb") as file:
            file.write(msgspec.json.format(msgspec.json.encode(tier_file), indent=2) + b"\n")
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, TIER_FILE, src_dir_fd=self.tier_fd, dst_dir_fd=self.tier_fd)
        os.fsync(self.tier_fd)


@contextmanager
def open_layout(path: str, cluster_id: str) -> Iterator[Layout]:
    """Create what is missing of a tier's directories, take the owner lock, and keep both until the end.

    Raises TierError, having changed nothing, when another worker owns the tier, or tier.json is damaged, of a newer
    format or another cluster's; and when the directory cannot be used.
    """
    descriptors: list[int] = []
    try:
        with tier_errors(f"tier {path}"):
            os.makedirs(path, _DIRECTORY_MODE, exist_ok=True)
            tier_fd = os.open(path, _OPEN_DIRECTORY)
            descriptors.append(tier_fd)
            _lock(tier_fd, path)
            _check_identity(Layout(path, tier_fd, -1, -1, -1), cluster_id)
            _switch_off_access_times(tier_fd)
            for name in ("sealed", "partial", "suspect", "staging"):
                descriptors.append(_make_directory(name, tier_fd))
        yield Layout(path, *descriptors[:4])
    finally:
        # Closing the last descriptor of the tier's directory gives the lock back; a killed worker's are closed too.
        for fd in reversed(descriptors):
            os.close(fd)


@contextmanager
def tier_errors(what: str) -> Iterator[None]:
    """Turns an OSError of opening or recovering a tier into a TierError."""
    try:
        yield
    except OSError as error:
        reason = f"{what}: {error.strerror or error}"
        if isinstance(error.filename, str) and error.filename not in what:
            reason += f": {error.filename!a}"
        raise TierError(reason) from error


def create(name: str, flags: int, dir_fd: int) -> int:
    """A new file, by one of the names above; `flags`: of open(2), with O_CREAT. Raises OSError."""
    return _where_it_goes(name, dir_fd, lambda: os.open(name, flags, _FILE_MODE, dir_fd=dir_fd))


def move(name: str, from_fd: int, to_fd: int) -> None:
    """From one of sealed/, partial/ and suspect/ to another. Raises OSError."""
    _where_it_goes(name, to_fd, lambda: os.rename(name, name, src_dir_fd=from_fd, dst_dir_fd=to_fd))


def _where_it_goes(name: str, dir_fd: int, do: Callable[[], T]) -> T:
    try:
        return do()
    except FileNotFoundError:
        with suppress(FileExistsError):
            os.mkdir(os.path.dirname(name), _DIRECTORY_MODE, dir_fd=dir_fd)
    return do()


def unlink_if_exists(name: str, dir_fd: int) -> None:
    """Remove a file, or an empty directory in its place; OSError, naming it, for one with something in it."""
    try:
        os.unlink(name, dir_fd=dir_fd)
    except FileNotFoundError:
        pass
    except IsADirectoryError:
        try:
            os.rmdir(name, dir_fd=dir_fd)
        except OSError as error:
            raise OSError(error.errno, f"not made by cachefs, and {error.strerror}", full_name(name, dir_fd)) from error


def is_in_the_way(error: OSError) -> bool:
    """Whether `unlink_if_exists` failed since somebody put a directory with something in it where our files go."""
    return error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.EBUSY)


def full_name(name: str, dir_fd: int) -> str:
    """For messages about a name below a descriptor."""
    return os.path.join(os.readlink(f"/proc/self/fd/{dir_fd}"), name)


def _lock(tier_fd: int, path: str) -> None:
    # On the directory itself: a lock file could be unlinked and made again under the feet of its owner.
    try:
        fcntl.flock(tier_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise TierError(f"tier {path} is owned by another worker that is running") from error


def _check_identity(layout: Layout, cluster_id: str) -> None:
    tier_file = layout.read_tier_file()
    if tier_file is not None and tier_file.cluster_id != cluster_id:
        raise TierError(
            f"tier {layout.path} belongs to cluster {tier_file.cluster_id!r}, not to {cluster_id!r}; "
            "use another directory, or empty this one if that cluster is gone"
        )


def _switch_off_access_times(tier_fd: int) -> None:
    """Let everything made below the tier from now on have no access times (inherited, like chattr +A).

    Nobody asks for those of cached files, and keeping them costs each small read through the kernel some 5%. File
    systems that cannot do it are left as they are. ioctls and flag: linux/fs.h.
    """
    flags = bytearray(8)
    try:
        fcntl.ioctl(tier_fd, _FS_IOC_GETFLAGS, flags, True)
        _FLAGS.pack_into(flags, 0, _FLAGS.unpack_from(flags)[0] | _FS_NOATIME_FL)
        fcntl.ioctl(tier_fd, _FS_IOC_SETFLAGS, flags, True)
    except OSError:
        pass


def _make_directory(name: str, tier_fd: int) -> int:
    with suppress(FileExistsError):
        os.mkdir(name, _DIRECTORY_MODE, dir_fd=tier_fd)
    return open_directory(name, tier_fd)


def open_directory(name: str, dir_fd: int) -> int:
    """Raises OSError with the full name."""
    try:
        return os.open(name, _OPEN_DIRECTORY | os.O_NOFOLLOW, dir_fd=dir_fd)
    except OSError as error:
        raise OSError(error.errno, error.strerror, full_name(name, dir_fd)) from error
