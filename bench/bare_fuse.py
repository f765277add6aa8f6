"""The least that a mount by passthrough can do: one loop on /dev/fuse that opens, registers, replies and closes.

`python -m bench.bare_fuse SOURCE MOUNTPOINT` serves the files of one flat directory, from numbers it looked up before.
What it leaves out is everything else: names that change, eviction, checksums, other tasks. It ends with its unmounting.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import sys

from cachefs.fuse.mounting import MountOptions, mount, open_device
from cachefs.fusewire import (
    IOC_BACKING_CLOSE,
    IOC_BACKING_OPEN,
    InitOptions,
    Opcode,
    attr_reply,
    empty_reply,
    entry_reply,
    error_reply,
    init_reply,
    negotiate,
    open_reply,
    parse_init,
)
from cachefs.model import Attr, ContentKey, Ino, Kind

_HEADER = struct.Struct("<IIQQ")
_RELEASE = struct.Struct("<Q")
_MAP = struct.Struct("<iIQ")
_OPEN_OUT = struct.Struct("<IiQQIi")
_EMPTY_OUT = struct.Struct("<IiQ")
_TTL_S = 3600.0
_PASSTHROUGH_NOFLUSH = 1 << 7 | 1 << 5


def serve(source: str, mountpoint: str) -> None:
    fd = open_device()
    mount(fd, mountpoint, "bare", MountOptions())
    os.set_blocking(fd, True)
    names = sorted(os.listdir(source))
    nodes = {name.encode(): number + 2 for number, name in enumerate(names)}
    paths = {number + 2: os.path.join(source, name) for number, name in enumerate(names)}
    attrs = {node: _attr(node, path) for node, path in paths.items()}
    attrs[1] = Attr(Ino(1), Kind.DIRECTORY, 0, 0, 0o755, 0, 0, ContentKey(b""))
    agreed = None
    read, write, ioctl, open_, close = os.read, os.write, fcntl.ioctl, os.open, os.close
    flags = os.O_RDONLY | os.O_CLOEXEC
    size = 1 << 17
    while True:
        try:
            request = read(fd, size)
        except OSError as error:
            if error.errno == errno.ENODEV:
                return
            continue
        _, opcode, unique, node = _HEADER.unpack_from(request)
        if opcode == 14:  # OPEN
            file = open_(paths[node], flags)
            backing = ioctl(fd, IOC_BACKING_OPEN, bytearray(_MAP.pack(file, 0, 0)), True)
            close(file)
            write(fd, _OPEN_OUT.pack(32, 0, unique, backing, _PASSTHROUGH_NOFLUSH, backing))
        elif opcode == 18:  # RELEASE
            ioctl(fd, IOC_BACKING_CLOSE, bytearray(request[40:44]), True)
            write(fd, _EMPTY_OUT.pack(16, 0, unique))
        elif opcode == Opcode.INIT:
            agreed = negotiate(parse_init(request), InitOptions())
            write(fd, init_reply(unique, agreed))
            size = agreed.buffer_size
        elif opcode == Opcode.LOOKUP:
            found = nodes.get(request[40:-1])
            if found is None:
                write(fd, error_reply(unique, errno.ENOENT))
            else:
                write(fd, entry_reply(unique, found, attrs[found], _TTL_S, _TTL_S))
        elif opcode == Opcode.GETATTR:
            write(fd, attr_reply(unique, node, attrs[node], _TTL_S))
        elif opcode == Opcode.OPENDIR:
            write(fd, open_reply(unique, 0, 0))
        elif opcode == Opcode.RELEASEDIR:
            write(fd, empty_reply(unique))
        elif opcode not in (Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.INTERRUPT):
            write(fd, error_reply(unique, errno.ENOSYS))


def _attr(node: int, path: str) -> Attr:
    return Attr(Ino(node), Kind.FILE, os.stat(path).st_size, 0, 0o644, 0, 0, ContentKey(b""))


if __name__ == "__main__":
    serve(*sys.argv[1:])
