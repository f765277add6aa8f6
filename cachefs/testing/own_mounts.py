"""A mount namespace of this process: what it mounts, others do not see, nor it what they mount."""

from __future__ import annotations

import ctypes
import os

_CLONE_NEWNS = 0x00020000
# Of <sys/mount.h>.
_MS_BIND, _MS_REC, _MS_PRIVATE = 0x1000, 0x4000, 1 << 18


def leave_the_mounts_of_others(directory: str, device: str) -> bool:
    """For this thread, those it starts and their children; it cannot be undone. The mounts go with the last of them.

    `directory` holds from then on what these processes put there, and a node of `device`: who may open that, they
    change for themselves alone.

    To call in the main thread: `/proc/self/mountinfo` is about that one. Returns False, and changes nothing, where the
    rights to mount are missing.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS) != 0:
        return False

    def mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
        texts = [os.fsencode(each) if each is not None else None for each in (source, target, kind)]
        if libc.mount(*texts, ctypes.c_ulong(flags), options.encode()) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), target)

    mount("none", "/", None, _MS_REC | _MS_PRIVATE)
    mount("tmpfs", directory, "tmpfs", 0, "mode=0700")
    if os.path.exists(device):
        found, node = os.stat(device), os.path.join(directory, "device")
        os.mknod(node, found.st_mode, found.st_rdev)
        mount(node, device, None, _MS_BIND)
    return True
