"""Programs of a user who is not root, run by root: for what a mount without root can do."""

from __future__ import annotations

import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cachefs.fuse import probe

UID = 65534
DEVICE = Path("/dev/fuse")


@dataclass(frozen=True)
class User:
    directory: Path
    """A home of its own, that it can reach."""
    prefix: tuple[str, ...]
    """What a command line begins with, to be run by this user. The process stays the same."""
    environment: dict[str, str]


def why_no_user() -> str | None:
    """Why there can be none here."""
    if os.geteuid() != 0 or not probe().can_mount:
        return "needs root and /dev/fuse"
    if shutil.which("setpriv") is None or shutil.which("fusermount3") is None:
        return "needs setpriv and fusermount3: apt-get install util-linux fuse3"
    return None


@contextmanager
def a_user() -> Iterator[User]:
    """Its home is gone at the end; what is mounted there, the caller takes away before."""
    setpriv = shutil.which("setpriv")
    assert setpriv is not None
    prefix = [setpriv, "--reuid", str(UID), "--regid", str(UID), "--clear-groups"]
    if not _can_be_reached(Path(sys.executable).resolve()) or not _can_be_reached(Path(__file__)):
        # Python, or this package, is in a directory of root's alone. Being able to read everything does not help to
        # mount anything: what is tested stays what it is.
        prefix += ["--inh-caps", "+dac_read_search", "--ambient-caps", "+dac_read_search"]
    # Not below pytest's own directory, which is root's alone: fusermount3 looks at the mountpoint as the user.
    directory = Path(tempfile.mkdtemp(prefix="cachefs-user-"))
    directory.chmod(0o711)
    os.chown(directory, UID, UID)
    environment = {"HOME": str(directory), "XDG_RUNTIME_DIR": str(directory), "TMPDIR": str(directory)}
    environment["XDG_CACHE_HOME"] = str(directory / "cache")
    mode = stat.S_IMODE(DEVICE.stat().st_mode)
    DEVICE.chmod(0o666)  # as udev has it, which not every container or small machine runs
    try:
        yield User(directory, tuple(prefix), environment)
    finally:
        DEVICE.chmod(mode)
        shutil.rmtree(directory)


def _can_be_reached(path: Path) -> bool:
    return all(each.stat().st_mode & stat.S_IXOTH for each in path.parents)
