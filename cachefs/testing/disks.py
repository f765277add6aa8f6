"""Small real disks, healthy and not: file systems in files. Root only."""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from cachefs.model import MiB

_LOOP_SET_STATUS64, _LOOP_GET_STATUS64 = 0x4C04, 0x4C05
_LOOP_CTL_GET_FREE = 0x4C82
_LOOP_INFO64_BYTES, _SIZE_LIMIT_AT = 232, 32
"""struct loop_info64 and its lo_sizelimit; linux/loop.h."""
_FIBMAP = 1
"""Where on its disk a block of a file is; from the kernel's linux/fs.h. Root only."""


def why_no_disks() -> str | None:
    """Why there can be none here; None if there can."""
    if os.geteuid() != 0:
        return "disks are mounted by root"
    if shutil.which("mkfs.ext4") is None:
        return "mkfs.ext4 is missing (package e2fsprogs)"
    try:
        control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        return f"no loop devices: {error}"
    try:
        device = f"/dev/loop{fcntl.ioctl(control, _LOOP_CTL_GET_FREE)}"
    except OSError as error:
        return f"no loop devices: {error}"
    finally:
        os.close(control)
    return None if os.path.exists(device) else f"no loop devices: {device} is missing"


@contextmanager
def small_disk(directory: Path, size_bytes: int) -> Iterator[Path]:
    """An ext4 file system of that size; its mount point. `directory` keeps what it is made of."""
    image, mountpoint = directory / "disk.img", directory / "disk"
    with image.open("wb") as file:
        file.truncate(size_bytes)
    _run("mkfs.ext4", "-q", "-O", "^has_journal", str(image))
    mountpoint.mkdir()
    _run("mount", "-o", "loop", str(image), str(mountpoint))
    try:
        yield mountpoint
    finally:
        _run("umount", "-l", str(mountpoint))
        image.unlink()


@contextmanager
def lying_disk(directory: Path, real_bytes: int) -> Iterator[Path]:
    """A file system that takes 64 MiB, of which the medium below holds `real_bytes`: writes succeed, syncing fails."""
    backing = directory / "backing"
    backing.mkdir()
    _run("mount", "-t", "tmpfs", "-o", f"size={real_bytes}", "tmpfs", str(backing))
    try:
        with small_disk(backing, 64 * MiB) as mountpoint:
            yield mountpoint
    finally:
        _run("umount", "-l", str(backing))


class Medium(NamedTuple):
    """What a `small_disk` has below a file, changed behind the back of its file system."""

    image: int
    file: int
    at: int
    """Where the first block of the file is."""

    def read(self, length: int) -> bytes:
        return os.pread(self.image, length, self.at)

    def rewrite(self, data: bytes) -> None:
        """What the page cache has of the file stays."""
        os.pwrite(self.image, data, self.at)
        os.fsync(self.image)

    def drop_cache(self) -> None:
        os.posix_fadvise(self.file, 0, 0, os.POSIX_FADV_DONTNEED)


@contextmanager
def medium_of(directory: Path, file: Path) -> Iterator[Medium]:
    """Of a file on the `small_disk` in `directory`."""
    image, fd = os.open(directory / "disk.img", os.O_RDWR), os.open(file, os.O_RDONLY)
    try:
        os.fsync(fd)
        yield Medium(image, fd, _place_of(fd))
    finally:
        os.close(fd)
        os.close(image)


def _place_of(fd: int) -> int:
    """Where the first data of a file is on its disk, bytes."""
    size = os.fstatvfs(fd).f_bsize
    first = os.lseek(fd, 0, os.SEEK_DATA) // size
    (block,) = struct.unpack("i", fcntl.ioctl(fd, _FIBMAP, struct.pack("i", first)))
    return int(block) * size


@contextmanager
def unreadable(directory: Path, file: Path) -> Iterator[None]:
    """Reading this file of the `small_disk` in `directory` from its medium fails with EIO; its page cache is empty.

    So does everything that the disk has behind it.
    """
    image = directory / "disk.img"
    size = image.stat().st_size
    fd = os.open(file, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.truncate(image, _place_of(fd))
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)
    try:
        yield
    finally:
        os.truncate(image, size)


@contextmanager
def broken(mountpoint: Path) -> Iterator[None]:
    """The `small_disk` there fails with EIO whatever it is asked for beyond its first 64 KiB. What it has, it keeps."""
    command = ["findmnt", "-n", "-o", "SOURCE", str(mountpoint)]
    device = os.open(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip(), os.O_RDONLY)
    try:
        before = fcntl.ioctl(device, _LOOP_GET_STATUS64, bytes(_LOOP_INFO64_BYTES))
        limited = bytearray(before)
        struct.pack_into("=Q", limited, _SIZE_LIMIT_AT, 64 * 1024)
        fcntl.ioctl(device, _LOOP_SET_STATUS64, bytes(limited))
        try:
            yield
        finally:
            fcntl.ioctl(device, _LOOP_SET_STATUS64, before)
    finally:
        os.close(device)


@contextmanager
def read_only(path: Path) -> Iterator[None]:
    """A directory on a file system of its own that cannot be written."""
    _run("mount", "--bind", str(path), str(path))
    try:
        _run("mount", "-o", "remount,ro,bind", str(path))
        yield
    finally:
        _run("umount", str(path))


@contextmanager
def overlay(directory: Path) -> Iterator[Path]:
    """A file system on which passthrough is impossible: a stacked one."""
    for name in ("lower", "upper", "work", "merged"):
        (directory / name).mkdir(parents=True)
    merged = directory / "merged"
    layers = ",".join(f"{name}dir={directory / name}" for name in ("lower", "upper", "work"))
    _run("mount", "-t", "overlay", "overlay", "-o", layers, str(merged))
    try:
        yield merged
    finally:
        _run("umount", "-l", str(merged))


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)
