"""mountinfo, as the kernel writes it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachefs.fuse import find_mount, is_mounted, mountinfo
from cachefs.fuse.mountinfo import parse_mountinfo
from cachefs.model import RemoteProtocolError
from cachefs.store.config import filesystem_type

LINES = rb"""22 28 0:21 / /proc rw,nosuid,nodev,noexec,relatime shared:12 - proc proc rw
36 28 0:45 / /mnt/two\040words\011and\134more ro,nosuid,nodev,relatime master:2 - fuse.cachefs s3://a\040b ro,user_id=0
37 28 0:46 /a\040directory /mnt/data ro - fuse.cachefs first ro
38 37 0:47 / /mnt/data ro - fuse.sshfs second ro
"""


def test_lines() -> None:
    proc, escaped, first, second = parse_mountinfo(LINES)
    assert (proc.mountpoint, proc.device, proc.fs_type, proc.source) == ("/proc", "0:21", "proc", "proc")
    assert "noexec" in proc.options
    assert escaped.mountpoint == "/mnt/two words\tand\\more"
    assert escaped.source == "s3://a b"
    assert escaped.connection == 45
    assert {"ro", "nosuid", "user_id=0"} <= escaped.options
    assert (proc.root, first.root) == ("/", "/a directory")
    assert (first.mountpoint, second.mountpoint) == ("/mnt/data", "/mnt/data")


@pytest.mark.skipif(os.geteuid() != 0, reason="root mounts")
def test_a_name_that_the_kernel_does_not_escape_all_of(tmp_path: Path) -> None:
    """Whoever may mount may choose it, and everybody sees it."""
    mountpoint = tmp_path / "a\rb \n\x0b\x85#"
    mountpoint.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "some", mountpoint], check=True)
    try:
        found = find_mount(mountpoint)
        assert found is not None and (found.fs_type, found.source) == ("tmpfs", "some")
        fd = os.open(mountpoint, os.O_RDONLY)
        try:
            assert filesystem_type(fd) == "tmpfs"
        finally:
            os.close(fd)
    finally:
        subprocess.run(["umount", mountpoint], check=True)


@pytest.mark.parametrize("line", [b"nonsense", b"1 2 0:3 / /mnt rw - fuse", b"1 2 0:3 / /mnt rw fuse a b"])
def test_lines_that_are_none(line: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        parse_mountinfo(LINES + line)


@given(st.binary())
def test_garbage_raises_nothing_else(data: bytes) -> None:
    try:
        parse_mountinfo(data)
    except RemoteProtocolError:
        pass


def test_the_topmost_mount_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listing = tmp_path / "mountinfo"
    listing.write_bytes(LINES)
    monkeypatch.setattr(mountinfo, "MOUNTINFO", listing)
    found = find_mount("/mnt/data/")
    assert found is not None
    assert found.source == "second"
    assert not is_mounted("/mnt/data")  # a file system of somebody else hides ours
    assert is_mounted("/mnt/x/../two words\tand\\more")
    assert find_mount("/mnt") is None


def test_a_link_to_a_mountpoint_or_to_its_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real" / "data").mkdir(parents=True)
    (tmp_path / "parent").symlink_to("real")
    (tmp_path / "link").symlink_to("real/data")
    listing = tmp_path / "mountinfo"
    listing.write_bytes(f"36 28 0:45 / {tmp_path}/real/data ro - fuse.cachefs s ro\n".encode())
    monkeypatch.setattr(mountinfo, "MOUNTINFO", listing)
    assert is_mounted(tmp_path / "real" / "data")
    assert is_mounted(tmp_path / "parent" / "data")
    assert is_mounted(tmp_path / "link")
    assert not is_mounted(tmp_path / "real")
