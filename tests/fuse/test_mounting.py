"""Mounts without a server, dead ones, and connections that are aborted. Nothing here is asked anything by the kernel
that this process would have to answer."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from cachefs.fuse import (
    BackingRegistry,
    Mount,
    MountError,
    MountOptions,
    PassthroughUnavailable,
    abort,
    abort_of,
    connections,
    find_mount,
    is_dead,
    is_mounted,
    is_over,
    mount,
    mounting,
    open_device,
    probe,
    service,
    unmount,
)
from cachefs.fuse.mounting import allow_below
from cachefs.model import ConfigError, MiB

needs_mount = pytest.mark.skipif(not probe().can_mount, reason="needs root and /dev/fuse")


@pytest.fixture
def mountpoint(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "mnt"
    path.mkdir()
    yield path
    while (left := find_mount(path)) is not None:
        abort(left)
        unmount(path, lazy=True)


def mount_and_die(mountpoint: Path) -> Mount:
    fd = open_device()
    try:
        return mount(fd, mountpoint, "dead")
    finally:
        os.close(fd)


@needs_mount
def test_what_the_kernel_shows_of_a_mount(mountpoint: Path) -> None:
    fd = open_device()
    try:
        mounted = mount(fd, mountpoint, "s3://bucket, with commas")
        info = find_mount(mountpoint)
        assert info is not None
        assert (info.fs_type, info.source) == ("fuse.cachefs", "s3://bucket, with commas")
        assert {"ro", "nosuid", "nodev", "allow_other", "default_permissions"} <= info.options
        assert (mounted.mountpoint, mounted.device) == (str(mountpoint), info.device)
        assert mounted.connection == info.connection
        assert is_mounted(mountpoint)
        # It has a server as long as the device is open, even one that never answers.
        with pytest.raises(ConfigError, match="no cachefs is mounted"):
            mount(fd, mountpoint, "again", MountOptions(replace_dead=True))
        assert abort(mounted)
        assert is_dead(info)
        unmount(mountpoint, lazy=True)
        assert not is_mounted(mountpoint)
    finally:
        os.close(fd)


@needs_mount
def test_a_dead_mount_is_replaced_if_that_is_wanted(mountpoint: Path) -> None:
    mount_and_die(mountpoint)
    mounted = find_mount(mountpoint)
    assert mounted is not None
    assert is_dead(mounted)
    fd = open_device()
    try:
        with pytest.raises(ConfigError, match="dead cachefs mount"):
            mount(fd, mountpoint, "new")
        mount(fd, mountpoint, "new", MountOptions(replace_dead=True))
        found = find_mount(mountpoint)
        assert found is not None
        assert found.source == "new"
    finally:
        os.close(fd)
    unmount(mountpoint, lazy=True)
    assert find_mount(mountpoint) is None


@needs_mount
def test_what_is_mounted_no_more_is_not_ended_by_its_number_which_may_be_anothers(mountpoint: Path) -> None:
    fd = open_device()
    try:
        first = mount(fd, mountpoint, "first")
        unmount(mountpoint, lazy=True)
    finally:
        os.close(fd)
    assert not abort(first)  # nothing is there
    fd = open_device()
    try:
        second = mount(fd, mountpoint, "second")
        for gone in (replace(second, device="0:1048575"), replace(second, mountpoint=str(mountpoint.parent))):
            assert not abort(gone)
        assert not is_over(fd)
        assert abort_of(fd, second.connection) and is_over(fd)
        # Without a mount to hold on to, the device says whether the number is still its own.
        assert not abort_of(fd, second.connection)
    finally:
        os.close(fd)


@needs_mount
def test_a_number_stays_that_of_a_mount_while_it_is_ended(mountpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody unmounts at the last moment, and another mount is made."""
    other = mountpoint.parent / "other"
    other.mkdir()
    with ExitStack() as stack:
        first, second = open_device(), open_device()
        for fd in (first, second):
            stack.callback(os.close, fd)
        mounted = mount(first, mountpoint, "first")
        end = connections._abort

        def late(number: int) -> bool:
            unmount(mountpoint, lazy=True)
            stack.callback(unmount, other, lazy=True)
            assert mount(second, other, "second").connection != number
            return end(number)

        monkeypatch.setattr(connections, "_abort", late)
        assert abort(mounted) and is_over(first) and not is_over(second)


@needs_mount
def test_a_server_at_its_end_leaves_what_another_has_mounted_there_since(mountpoint: Path) -> None:
    first = open_device()
    try:
        mounted = mount(first, mountpoint, "first")
        unmount(mountpoint)
        fd = open_device()
        try:
            another = mount(fd, mountpoint, "second")
            if another.device != mounted.device:
                pytest.skip("the number was taken by somebody else")
            service._unmount_now(mounted, first)
            assert find_mount(mountpoint) is not None and not is_over(fd)
            # What is its own it takes away, dead or alive.
            assert abort(another)
            service._unmount_now(another, fd)
            assert find_mount(mountpoint) is None
        finally:
            os.close(fd)
        fd = open_device()
        try:
            service._unmount_now(mount(fd, mountpoint, "third"), fd)
            assert find_mount(mountpoint) is None
        finally:
            os.close(fd)
    finally:
        os.close(first)


@needs_mount
def test_a_server_ends_its_connection_also_when_its_mount_has_left_the_tree(mountpoint: Path) -> None:
    fd = open_device()
    try:
        mounted = mount(fd, mountpoint, "used")
        user = os.open(mountpoint, os.O_PATH)
        try:
            unmount(mountpoint, lazy=True)
            assert find_mount(mountpoint) is None and not is_over(fd)
            service._end(mounted, fd)
            assert is_over(fd)
        finally:
            os.close(user)
    finally:
        os.close(fd)


@needs_mount
def test_nothing_is_mounted_there(tmp_path: Path) -> None:
    with pytest.raises(MountError, match="nothing is mounted"):
        unmount(tmp_path)


@needs_mount
def test_no_passthrough_before_it_was_negotiated(mountpoint: Path, tmp_path: Path) -> None:
    fd = open_device()
    try:
        mount(fd, mountpoint, "test")
        backings = BackingRegistry(fd)
        with open(tmp_path / "file", "w+b") as file, pytest.raises(PassthroughUnavailable, match="passthrough"):
            backings.register(file.fileno())
    finally:
        os.close(fd)


def test_no_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mounting, "DEVICE", tmp_path / "fuse")
    with pytest.raises(MountError, match="no FUSE"):
        open_device()
    found = probe()
    assert found.device_error is not None
    assert not found.can_mount
    assert not found.passthrough_possible


def test_wrong_source_and_options(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="source"):
        mount(-1, tmp_path, "")
    with pytest.raises(ConfigError, match="read_ahead_kb"):
        MountOptions(read_ahead_kb=-1)
    assert MountOptions().max_read == MiB


@needs_mount
def test_a_directory_that_is_a_mount_itself_gets_its_mode_back(mountpoint: Path) -> None:
    """Like the volumes of a pod."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=0750", "none", mountpoint], check=True)
    try:
        fd = open_device()
        try:
            mounted = mount(fd, mountpoint, "mounted", MountOptions(forbid_below=True))
            unmount(mountpoint)
        finally:
            os.close(fd)
        assert mountpoint.stat().st_mode & 0o777 == 0
        allow_below(mounted)
        assert mountpoint.stat().st_mode & 0o777 == 0o750
    finally:
        subprocess.run(["umount", mountpoint], check=True)
