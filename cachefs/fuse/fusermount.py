"""Mounting without root: `fusermount3`, setuid root, opens /dev/fuse, mounts, and hands the device over.

It is of the package fuse3, and speaks the protocol of libfuse: the number of a socket is in the environment, and one
message with the descriptor comes over it. It insists on nosuid and nodev, on a mountpoint that the user may write to,
and on `user_allow_other` in /etc/fuse.conf for allow_other.
"""

from __future__ import annotations

import errno
import os
import shutil
import socket
import stat
import subprocess
from pathlib import Path

from cachefs.model import CachefsError

PROGRAM = "fusermount3"
CONFIGURATION = Path("/etc/fuse.conf")

_SOCKET_VARIABLE = "_FUSE_COMMFD"
_LIMIT_S = 30.0
_CAP_SYS_ADMIN = 21
_ERRORS = {
    "Device or resource busy": errno.EBUSY,
    "not found in": errno.EINVAL,
    "Invalid argument": errno.EINVAL,
}
"""What it says about an unmount, and what umount2(2) would have said."""


class FusermountError(CachefsError):
    """It refused; the message is its own."""

    def __init__(self, message: str, errno_: int = errno.EPERM) -> None:
        super().__init__(message)
        self.errno = errno_


def why_not_usable() -> str | None:
    """Why it could not mount for this process, as a sentence with what mends it; None if it can."""
    path = shutil.which(PROGRAM)
    if path is None:
        return f"there is no {PROGRAM}, which mounts for users who are not root: apt-get install fuse3"
    status = os.stat(path)
    if status.st_uid != 0 or not status.st_mode & stat.S_ISUID or os.statvfs(path).f_flag & os.ST_NOSUID:
        return f"{path} is not setuid root, so that it cannot mount either: apt-get install --reinstall fuse3"
    own = _status_of_this_process()
    if own.get("NoNewPrivs", "0") != "0":
        return f"this process may gain no privileges (no_new_privs), so that {PROGRAM} cannot mount either"
    if not int(own.get("CapBnd", "0"), 16) >> _CAP_SYS_ADMIN & 1:
        return (
            f"nothing started here may have CAP_SYS_ADMIN, so that {PROGRAM} cannot mount either; a container gets it "
            "by docker run --cap-add SYS_ADMIN"
        )
    return None


def has_sys_admin() -> bool:
    """Whether this process has CAP_SYS_ADMIN by itself."""
    return bool(int(_status_of_this_process().get("CapEff", "0"), 16) >> _CAP_SYS_ADMIN & 1)


def user_allow_other() -> bool:
    """Whether users who are not root may let others use their mounts."""
    try:
        lines = CONFIGURATION.read_text(errors="replace").splitlines()
    except OSError:
        return False
    return "user_allow_other" in (line.strip() for line in lines)


def mount(path: str, source: str, subtype: str, options: list[str]) -> int:
    """A /dev/fuse file, mounted on `path`; close-on-exec and non-blocking, for the caller to close.

    Raises FusermountError.
    """
    escaped = source.replace("\\", "\\\\").replace(",", "\\,")
    data = ",".join([*options, "nosuid", "nodev", f"fsname={escaped}", f"subtype={subtype}"])
    ours, theirs = socket.socketpair()
    with ours, theirs:
        _run(["-o", data, "--", path], (theirs.fileno(),))
        theirs.close()
        _, descriptors, _, _ = socket.recv_fds(ours, 1, 1)
    if not descriptors:
        raise FusermountError(f"{PROGRAM} handed nothing over")
    os.set_inheritable(descriptors[0], False)
    os.set_blocking(descriptors[0], False)
    return descriptors[0]


def unmount(path: str, *, lazy: bool) -> None:
    """Raises FusermountError: EBUSY, EINVAL (nothing of this user is mounted there), or EPERM."""
    _run(["-u", *(["-z"] if lazy else []), "--", path])


def _run(arguments: list[str], descriptors: tuple[int, ...] = ()) -> None:
    environment = {**os.environ, "LC_ALL": "C"}
    if descriptors:
        environment[_SOCKET_VARIABLE] = str(descriptors[0])
    try:
        done = subprocess.run(
            [PROGRAM, *arguments],
            env=environment,
            pass_fds=descriptors,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_LIMIT_S,
        )
    except FileNotFoundError as error:
        raise FusermountError(why_not_usable() or f"{PROGRAM} is not in the PATH") from error
    except subprocess.TimeoutExpired as error:
        raise FusermountError(f"{PROGRAM} has not ended within {_LIMIT_S:g} s", errno.ETIMEDOUT) from error
    if done.returncode != 0:
        said = " ".join(done.stderr.decode(errors="replace").split()) or f"{PROGRAM} failed"
        raise FusermountError(said, next((code for text, code in _ERRORS.items() if text in said), errno.EPERM))


def _status_of_this_process() -> dict[str, str]:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return {}
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}
