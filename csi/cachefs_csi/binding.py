"""Bind mounts: how a mount that is staged on a node is shown to each of its pods, at a target of its own.

All that is known here stands in the kernel's mount table, so that whoever comes after a plugin that was killed finds
what there is. A bind mount appears at its target with all its flags, or not at all: it is made apart (open_tree,
mount_setattr) and put there in one step (move_mount), which Linux has since 5.12.

Targets are made by us, and are directories: a symbolic link there is never followed, what is in one is never touched,
and nothing but a mount of cachefs is ever unmounted. Everything here blocks: to be called in a thread, one at a time
for each target. It never waits long for a file system that hangs; `check` has a limit of its own.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import re
import stat
from contextlib import suppress

from cachefs.fuse import FS_TYPE, MountError, MountInfo, all_mounts, find_mount, is_dead, unmount
from cachefs.fuse.bounded import within
from cachefs.model import ConfigError, DeadlineError, UnavailableError

logger = logging.getLogger(__name__)

CHECK_S = 10.0
"""For a root that has to be listed in the under-store first."""

# The numbers are the same on every architecture. Of <linux/mount.h> and <fcntl.h>.
_SYS_OPEN_TREE, _SYS_MOVE_MOUNT, _SYS_MOUNT_SETATTR = 428, 429, 442
_OPEN_TREE_CLONE, _CLOEXEC = 1, os.O_CLOEXEC
_MOVE_FROM_EMPTY_PATH, _MOVE_TO_EMPTY_PATH = 0x4, 0x40
_AT_FDCWD, _AT_SYMLINK_NOFOLLOW, _AT_EMPTY_PATH = -100, 0x100, 0x1000
_TREE_FLAGS = ctypes.c_uint(_OPEN_TREE_CLONE | _CLOEXEC | _AT_SYMLINK_NOFOLLOW)
_ATTRIBUTES = 1 | 2 | 4  # MOUNT_ATTR_RDONLY, _NOSUID, _NODEV
_MS_PRIVATE = 1 << 18
_OF_A_POD = re.compile(r"(?P<pod>.*/pods/[^/]+)/volumes/[^/]+/(?P<volume>[^/]+)/mount")
"""Targets that kubelet gives."""
_FLAGS = frozenset({"ro", "nosuid", "nodev"})
"""The same as /proc/self/mountinfo shows them."""

_libc = ctypes.CDLL(None, use_errno=True)


class _MountAttr(ctypes.Structure):
    """struct mount_attr"""

    _fields_ = tuple((name, ctypes.c_uint64) for name in ("attr_set", "attr_clr", "propagation", "userns_fd"))


def bind(mountpoint: str, target: str) -> bool:
    """Show the cachefs mount at `mountpoint` at `target` too, read-only. The directory is made, without permissions:
    who writes there because the mount is gone gets an error. False if it is there as it must be.

    What else of cachefs is mounted at the target is taken away first: a bind mount of a dead mount, or of another.
    Raises UnavailableError when nothing is mounted at `mountpoint`, or it is dead; ConfigError for a target that is no
    empty directory; MountError. Nothing new is mounted then.
    """
    source = find_mount(mountpoint)
    if source is None or source.fs_type != FS_TYPE:
        raise UnavailableError(f"no cachefs is mounted at {mountpoint}")
    if is_dead(source):
        raise UnavailableError(f"the mount at {mountpoint} is dead")
    # Asked once more: what was taken away while it was looked at is not dead, it is not there.
    still = find_mount(mountpoint)
    if still is None or still.device != source.device:
        raise UnavailableError(f"the mount at {mountpoint} was taken away just now")
    found = _mounts_at(target)
    if len(found) == 1 and _is_whole(found[0], source.device) and found[0].options >= _FLAGS:
        return False
    _take_away(target)
    directory = _empty_directory(target)
    try:
        tree = _checked(_libc.syscall(_SYS_OPEN_TREE, _AT_FDCWD, os.fsencode(source.mountpoint), _TREE_FLAGS), source)
        try:
            # Private: what somebody mounts below one target is not to appear in the others.
            wanted = _MountAttr(attr_set=_ATTRIBUTES, propagation=_MS_PRIVATE)
            size = ctypes.c_size_t(ctypes.sizeof(wanted))
            flags = ctypes.c_uint(_AT_EMPTY_PATH)
            _checked(_libc.syscall(_SYS_MOUNT_SETATTR, tree, b"", flags, ctypes.byref(wanted), size), source)
            how = ctypes.c_uint(_MOVE_FROM_EMPTY_PATH | _MOVE_TO_EMPTY_PATH)
            _checked(_libc.syscall(_SYS_MOVE_MOUNT, tree, b"", directory, b"", how), source)
        finally:
            os.close(tree)
    finally:
        os.close(directory)
    shown = _mounts_at(target)[-1:]
    if shown and shown[0].device != source.device:
        # It was taken away in the moment before: this is the directory that was below it.
        unmount(target)
        raise UnavailableError(f"the mount at {mountpoint} was taken away just now")
    return True


def _checked(result: int, source: MountInfo) -> int:
    if result < 0:
        code = ctypes.get_errno()
        hint = {
            errno.ENOSYS: "; Linux 5.12 or newer is needed",
            errno.EPERM: "; root (CAP_SYS_ADMIN) is needed",
        }.get(code, "")
        raise MountError(f"cannot bind the mount at {source.mountpoint}: {os.strerror(code)}{hint}", code)
    return result


def unbind(target: str) -> bool:
    """Take away what `bind` has put there, however often and dead or not, and the directory. False: nothing was there.

    A mount in use is taken out of the tree: who has files open reads on. Raises ConfigError when something else than
    cachefs is mounted there, or the target is no directory or has entries: all of that stays. MountError.
    """
    taken = _take_away(target)
    try:
        os.rmdir(target)
    except FileNotFoundError:
        return taken
    except OSError as error:
        raise ConfigError("target_path", target, f"an empty directory ({error.strerror})") from error
    return True


def unbind_parts(target: str, *, shown: str | None = None) -> None:
    """Take away what kubelet has shown of a target at other places: parts of a volume (subPath), which it binds by
    itself below the pod's directory. `shown`: the device of what the target shows again; only dead parts of others
    go then, as kubelet makes them anew when a container starts, but stops at one that does not answer.

    It takes them away before it has the target unpublished. One that is there nevertheless is to keep neither the
    volume from being unstaged nor the mount alive, for which nobody would come back. Its mountpoint is kubelet's, and
    stays. Raises MountError.
    """
    path = os.path.join(os.path.realpath(os.path.dirname(target)), os.path.basename(target))
    match = _OF_A_POD.fullmatch(path)
    if match is None:
        return
    below = f"{match['pod']}/volume-subpaths/{match['volume']}/"
    found = [each for each in all_mounts() if each.fs_type == FS_TYPE and each.mountpoint.startswith(below)]
    for each in reversed(found):
        if shown is None or (each.device != shown and is_dead(each)):
            take_off(each.mountpoint)


def take_off(target: str) -> bool:
    """Unmount what is on top there; who has files open there reads on. False: nothing was. Raises MountError."""
    try:
        unmount(target)
    except MountError as error:
        if error.errno == errno.EINVAL:  # somebody else was faster
            return False
        if error.errno != errno.EBUSY:
            raise
        logger.warning("a mount in use is taken out of the tree target=%s", target)
        unmount(target, lazy=True)
    return True


def check(path: str, limit_s: float = CHECK_S) -> None:
    """Returns when what is mounted there answers: it is another file system than the directory above, and its root can
    be listed.

    Raises UnavailableError saying why not, DeadlineError for one that hangs.
    """

    def ask() -> OSError | None:
        try:
            with os.scandir(path) as entries:
                next(entries, None)
            if os.stat(path).st_dev == os.stat(os.path.dirname(path)).st_dev:
                raise OSError(errno.EINVAL, "nothing is mounted there")
        except OSError as error:
            return error
        return None

    found = find_mount(path)
    late: OSError | None = OSError(errno.ETIMEDOUT, "")
    failure = within(limit_s, ("check", found and found.device, path), ask, late)
    if failure is late:
        raise DeadlineError(f"the mount at {path} did not answer within {limit_s:g} s")
    if failure is not None:
        raise UnavailableError(f"the mount at {path} cannot be read: {failure.strerror}") from failure


def binds_of(device: str, mountpoint: str) -> list[str]:
    """Where else than at `mountpoint` a cachefs mount is shown, by its `MountInfo.device`; in mount order."""
    own = os.path.join(os.path.realpath(os.path.dirname(mountpoint)), os.path.basename(mountpoint))
    found = (each.mountpoint for each in all_mounts() if _is_whole(each, device))
    return [each for each in dict.fromkeys(found) if each != own]


def parts_of(device: str) -> list[str]:
    """Where only a file or directory of it is shown: by others, such as kubelet for the subPath of a pod."""
    found = (each for each in all_mounts() if each.fs_type == FS_TYPE and each.device == device)
    return list(dict.fromkeys(each.mountpoint for each in found if each.root != "/"))


def _is_whole(info: MountInfo, device: str) -> bool:
    return info.fs_type == FS_TYPE and info.device == device and info.root == "/"


def _mounts_at(target: str) -> list[MountInfo]:
    """All that are mounted on exactly this directory; the last one is seen."""
    path = os.path.join(os.path.realpath(os.path.dirname(target)), os.path.basename(target))
    return [each for each in all_mounts() if each.mountpoint == path]


def _take_away(target: str) -> bool:
    """Every mount at a target. Raises ConfigError, before anything is changed, if one is not of cachefs; MountError."""
    found = _mounts_at(target)
    foreign = [each.fs_type for each in found if each.fs_type != FS_TYPE]
    if foreign:
        raise ConfigError("target_path", target, f"a directory without the mount of another kind on it ({foreign[-1]})")
    for _ in found:
        if not take_off(target):
            break
    return bool(found)


def _empty_directory(target: str) -> int:
    """A descriptor (O_PATH) of the target, made if it is missing, without permissions. Raises ConfigError."""
    with suppress(FileExistsError):
        try:
            os.mkdir(target, 0)
        except FileNotFoundError as error:
            raise ConfigError("target_path", target, "a path in a directory that exists") from error
    try:
        status = os.lstat(target)
        if not stat.S_ISDIR(status.st_mode):
            raise ConfigError("target_path", target, "a directory, or nothing; not a file or a symbolic link")
        fd = os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            with os.scandir(fd) as entries:
                if next(entries, None) is not None:
                    raise ConfigError("target_path", target, "a directory without entries: they would be hidden")
            os.fchmod(fd, 0)
        except BaseException:
            os.close(fd)
            raise
    except OSError as error:
        raise ConfigError("target_path", target, f"a directory that can be used ({error.strerror})") from error
    return fd
