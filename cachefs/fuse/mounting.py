"""Mounting and unmounting: mount(2) on a /dev/fuse file, and the read-ahead setting.

No libfuse. With root (CAP_SYS_ADMIN) everything here is a few system calls; without, mounting and unmounting go through
a helper program (see `fusermount`), and the read-ahead stays what it is. An `unmount` may wait for the file system's
server, so that a program that serves its own mount runs it in a thread.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import stat
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from cachefs.fuse import fusermount
from cachefs.fuse.connections import MountError, is_dead
from cachefs.fuse.fusermount import FusermountError
from cachefs.fuse.mountinfo import FS_TYPE, find_mount
from cachefs.fuse.places import check_apart
from cachefs.fusewire import PAGE_SIZE
from cachefs.model import ConfigError, MiB

logger = logging.getLogger(__name__)

DEVICE = Path("/dev/fuse")

_MS_RDONLY, _MS_NOSUID, _MS_NODEV = 1, 2, 4
_MNT_DETACH, _UMOUNT_NOFOLLOW = 2, 8
_BDI = Path("/sys/class/bdi")
_MAX_PAGES_LIMIT = Path("/proc/sys/fs/fuse/max_pages_limit")
_MAX_PAGES = 256
"""Before Linux 6.13, which made it a setting."""
_USUAL_MODE = 0o755

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class MountOptions:
    """Raises ConfigError for values out of range."""

    read_only: bool = True
    """The kernel answers every attempt to write with EROFS, without asking us."""
    allow_other: bool | None = None
    """Other users than the one who mounted: pods seldom run as root. None: where this user may allow it."""
    default_permissions: bool = True
    """The kernel checks mode bits, so that we are not asked (ACCESS)."""
    max_read: int = MiB
    """Bytes in the largest READ, up to `max_read_limit`."""
    read_ahead_kb: int | None = 1024
    """For cached mode; the kernel's own 128 KiB halves sequential throughput. None leaves it alone. Set by
    `set_read_ahead`, once the session has begun."""
    allow_nonempty: bool = False
    """Mount over a directory that has entries, hiding them."""
    needed: tuple[tuple[str, str], ...] = ()
    """(what it is, its directory) of what must not be at, below or above the mountpoint; see `check_apart`."""
    forbid_below: bool = False
    """Take all permissions from the directory below, if it is empty and ours to change: who writes there by mistake,
    because the mount is gone, gets an error instead of filling a disk (root does not). See `allow_below`."""
    replace_dead: bool = False
    """Take away a cachefs mount whose server is gone ("Transport endpoint is not connected") before mounting."""

    def __post_init__(self) -> None:
        if not PAGE_SIZE <= self.max_read <= max_read_limit():
            accepted = f"{PAGE_SIZE} to {max_read_limit()} bytes; the sysctl fs.fuse.max_pages_limit sets the limit"
            raise ConfigError("max_read", self.max_read, accepted)
        if self.read_ahead_kb is not None and not 0 <= self.read_ahead_kb <= 2**20:
            raise ConfigError("read_ahead_kb", self.read_ahead_kb, "0 to 1048576")


@dataclass(frozen=True)
class Mount:
    mountpoint: str
    """Absolute, without symbolic links: as the kernel shows it."""
    source: str
    device: str
    """`major:minor`, st_dev of everything on the mount."""
    allows_other: bool = True
    below: tuple[int, int, int] | None = None
    """Mode, st_dev and st_ino of the directory under the mount, if its mode was changed; see `allow_below`."""

    @property
    def connection(self) -> int:
        """The number of the connection; see `connections.abort`."""
        return int(self.device.partition(":")[2])


@dataclass(frozen=True)
class Probe:
    """What this process may do with FUSE; whether passthrough is on offer, only INIT tells."""

    device_error: str | None
    """Why /dev/fuse cannot be opened, as a sentence; None if it can."""
    sys_admin: bool
    """CAP_SYS_ADMIN, which mount(2) and passthrough need."""
    kernel: tuple[int, int]
    helper_error: str | None
    """Why fusermount3 cannot mount for this process, as a sentence; None if it can."""

    @property
    def can_mount(self) -> bool:
        """By itself, with all that root can have."""
        return self.device_error is None and self.sys_admin

    @property
    def why_no_mount(self) -> str | None:
        """Why this process cannot mount at all, as a sentence that says what mends it."""
        if self.device_error is not None:
            return self.device_error
        if self.sys_admin or self.helper_error is None:
            return None
        return f"mounting needs root (CAP_SYS_ADMIN), or {fusermount.PROGRAM}; {self.helper_error}"

    @property
    def passthrough_possible(self) -> bool:
        """False rules it out; true leaves it to the kernel's configuration and the cache's file system."""
        return self.can_mount and self.kernel >= (6, 9)


def max_read_limit() -> int:
    """Bytes of the largest READ that this kernel sends."""
    try:
        pages = int(_MAX_PAGES_LIMIT.read_text())
    except (OSError, ValueError):
        pages = _MAX_PAGES
    return pages * PAGE_SIZE


def probe() -> Probe:
    device_error = None
    try:
        os.close(open_device())
    except MountError as exc:
        device_error = str(exc)
    release = os.uname().release.split(".")
    kernel = int(release[0]), int(release[1])
    return Probe(device_error, fusermount.has_sys_admin(), kernel, fusermount.why_not_usable())


def open_device() -> int:
    """A new /dev/fuse file, close-on-exec and non-blocking: one per mount. Raises MountError."""
    try:
        return os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as exc:
        if exc.errno in (errno.ENOENT, errno.ENXIO, errno.ENODEV):
            hint = "this machine has no FUSE; load the kernel module fuse, or give the container the device"
        else:
            hint = "the user or the container needs access to the device (chmod 666 /dev/fuse, as udev does it)"
        raise MountError(f"cannot open {DEVICE}: {exc.strerror}; {hint}", exc.errno or 0) from exc


def check_options(options: MountOptions) -> None:
    """Raises ConfigError for what this user may not have."""
    if options.allow_other and not fusermount.has_sys_admin() and not fusermount.user_allow_other():
        accepted = f"false for users who are not root, unless {fusermount.CONFIGURATION} has the line user_allow_other"
        raise ConfigError("allow_other", "true", accepted)


def open_mount(
    mountpoint: str | os.PathLike[str], source: str, options: MountOptions | None = None
) -> tuple[int, Mount]:
    """A new /dev/fuse file (close-on-exec, non-blocking, the caller's to close), mounted: by this process if it may,
    else by fusermount3.

    Raises ConfigError if the mountpoint or an option will not do, MountError.
    """
    options = options or MountOptions()
    if not fusermount.has_sys_admin():
        return _mount_by_helper(mountpoint, source, options)
    fd = open_device()
    try:
        return fd, mount(fd, mountpoint, source, options)
    except BaseException:
        os.close(fd)
        raise


def mount(fd: int, mountpoint: str | os.PathLike[str], source: str, options: MountOptions | None = None) -> Mount:
    """Mount the connection of `fd` (from `open_device`), which then asks INIT. `source` is what `mount` shows. Needs
    root; see `open_mount`.

    Raises ConfigError if the mountpoint will not do, MountError if the kernel refuses.
    """
    options = options or MountOptions()
    _check_source(source)
    path = _check_mountpoint(mountpoint, options)
    allow_other = options.allow_other is not False
    # Only numbers and fixed words go into the comma-separated data; the source has an argument of its own, and the
    # kernel escapes it where it shows it.
    data = f"fd={fd},rootmode=40000,user_id={os.geteuid()},group_id={os.getegid()},"
    data += ",".join(_words(options, allow_other))
    flags = _MS_NOSUID | _MS_NODEV | (_MS_RDONLY if options.read_only else 0)
    raw_source, raw_path = os.fsencode(source), os.fsencode(path)
    below = _Below(path, options.forbid_below)
    if _libc.mount(raw_source, raw_path, FS_TYPE.encode(), ctypes.c_ulong(flags), data.encode()) != 0:
        code = ctypes.get_errno()
        hint = "; root (CAP_SYS_ADMIN) is needed" if code == errno.EPERM else ""
        below.close()
        raise MountError(f"cannot mount on {path}: {os.strerror(code)}{hint}", code)
    return replace(_found(path, source, allow_other), below=below.forbid())


def _mount_by_helper(mountpoint: str | os.PathLike[str], source: str, options: MountOptions) -> tuple[int, Mount]:
    reason = probe().why_no_mount
    if reason is not None:
        raise MountError(f"cannot mount on {os.fspath(mountpoint)}: {reason}", errno.EPERM)
    check_options(options)
    _check_source(source)
    path = _check_mountpoint(mountpoint, options)
    allow_other = fusermount.user_allow_other() if options.allow_other is None else options.allow_other
    words = [*_words(options, allow_other), *(["ro"] if options.read_only else [])]
    below = _Below(path, options.forbid_below)
    try:
        fd = fusermount.mount(path, source, FS_TYPE.partition(".")[2], words)
    except FusermountError as error:
        below.close()
        raise MountError(f"cannot mount on {path}: {error}", error.errno) from error
    try:
        return fd, replace(_found(path, source, allow_other), below=below.forbid())
    except BaseException:
        os.close(fd)
        raise


def _words(options: MountOptions, allow_other: bool) -> list[str]:
    found = [f"max_read={options.max_read}"]
    if allow_other:
        found.append("allow_other")
    if options.default_permissions:
        found.append("default_permissions")
    return found


def _check_source(source: str) -> None:
    if "\0" in source or not source:
        raise ConfigError("source", source, "text without NUL characters")


def _found(path: str, source: str, allows_other: bool) -> Mount:
    info = find_mount(path)
    if info is None:
        raise MountError(f"cannot mount on {path}: it was unmounted at once", errno.ENOENT)
    return Mount(path, source, info.device, allows_other)


class _Below:
    """The directory under a mount, opened before there is one."""

    def __init__(self, path: str, wanted: bool) -> None:
        self._fd = -1
        if wanted:
            with suppress(OSError):
                self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def forbid(self) -> tuple[int, int, int] | None:
        """Take all permissions; what `Mount.below` says. None where it is in use, or not ours to change."""
        if self._fd < 0:
            return None
        try:
            status = os.fstat(self._fd)
            with os.scandir(self._fd) as entries:
                if next(entries, None) is not None:
                    return None
            os.fchmod(self._fd, 0)
        except OSError:
            return None
        finally:
            self.close()
        # Without any, because it was left so: see `allow_left_below`.
        return stat.S_IMODE(status.st_mode) or _USUAL_MODE, status.st_dev, status.st_ino

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def allow_below(mounted: Mount) -> None:
    """Give the directory back the permissions that it had, now that nothing of ours is mounted there."""
    found = find_mount(mounted.mountpoint)
    if mounted.below is None or (found is not None and found.fs_type == FS_TYPE):
        return
    mode, *identity = mounted.below
    with suppress(OSError):
        status = os.stat(mounted.mountpoint, follow_symlinks=False)
        if [status.st_dev, status.st_ino] == identity and stat.S_IMODE(status.st_mode) == 0:
            os.chmod(mounted.mountpoint, mode)


def allow_left_below(mountpoint: str | os.PathLike[str]) -> None:
    """The same for a directory that a killed mount has left without any, so that its owner can look into it."""
    with suppress(OSError):
        status = os.stat(mountpoint)
        if stat.S_ISDIR(status.st_mode) and stat.S_IMODE(status.st_mode) == 0 and status.st_uid == os.geteuid():
            os.chmod(mountpoint, _USUAL_MODE)


def unmount(mountpoint: str | os.PathLike[str], *, lazy: bool = False) -> None:
    """Unmount what is on top of this directory. Lazy: take it out of the tree now, while open files stay usable, and
    end the connection when the last is closed. Without root, what this user has mounted.

    Raises MountError: not mounted (EINVAL), files are open on it (EBUSY), or another user's (EPERM).
    """
    info = find_mount(mountpoint)
    path = info.mountpoint if info is not None else os.path.abspath(os.fspath(mountpoint))
    if _libc.umount2(os.fsencode(path), _UMOUNT_NOFOLLOW | (_MNT_DETACH if lazy else 0)) == 0:
        return
    code, said = ctypes.get_errno(), ""
    if code == errno.EPERM and info is not None:
        try:
            fusermount.unmount(path, lazy=lazy)
            return
        except FusermountError as error:
            code, said = error.errno, f"; {error}"
    hint = {
        errno.EBUSY: "; files on it are open, or a shell stands in it (cachefs umount --lazy does not wait)",
        errno.EINVAL: "; nothing is mounted there",
        errno.EPERM: f"; root or the user who mounted it is needed{said}",
    }.get(code, said)
    if code == errno.EINVAL and info is not None:
        code, hint = errno.EPERM, "; it is another user's"
    raise MountError(f"cannot unmount {path}: {os.strerror(code)}{hint}", code)


def set_read_ahead(mounted: Mount, read_ahead_kb: int) -> None:
    """How far the kernel reads ahead in cached mode, and how large its READs get. After INIT, which sets it to the
    kernel's own 128 KiB. Raises OSError: only root can, where /sys is writable.
    """
    (_BDI / mounted.device / "read_ahead_kb").write_text(str(read_ahead_kb))


def _check_mountpoint(mountpoint: str | os.PathLike[str], options: MountOptions) -> str:
    """The resolved path of a directory that can be mounted on. Raises ConfigError."""
    given = os.fspath(mountpoint)
    info = find_mount(given)
    while info is not None and info.fs_type == FS_TYPE:
        # Asked before the directory is looked at: a living mount's server may be this very thread.
        if not is_dead(info):
            raise ConfigError("mountpoint", given, "a directory that no cachefs is mounted on; unmount it first")
        if not options.replace_dead:
            raise ConfigError("mountpoint", given, "a directory without a dead cachefs mount; `umount -l` it first")
        unmount(given, lazy=True)
        logger.info("dead mount taken away mountpoint=%s source=%s", info.mountpoint, info.source)
        info = find_mount(given)
    allow_left_below(given)
    try:
        with os.scandir(given) as entries:
            occupied = next(entries, None) is not None
    except FileNotFoundError as exc:
        raise ConfigError("mountpoint", given, "an existing directory") from exc
    except NotADirectoryError as exc:
        raise ConfigError("mountpoint", given, "a directory") from exc
    except OSError as exc:
        if exc.errno == errno.ENOTCONN:
            dead = info.fs_type if info is not None else "FUSE"
            accepted = f"a directory without the dead {dead} mount on it; `umount -l` it first"
        else:
            accepted = f"a directory that can be read ({exc.strerror})"
        raise ConfigError("mountpoint", given, accepted) from exc
    if occupied and not options.allow_nonempty:
        raise ConfigError("mountpoint", given, "an empty directory, unless a non-empty one is asked for")
    check_apart(given, options.needed)
    return os.path.realpath(given)
