"""Bind mounts of a real cachefs mount: as they must be, or not there; and nothing else is touched."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from cachefs_csi import binding
from cachefs_csi.binding import bind, binds_of, check, unbind

from cachefs.fuse import all_mounts, find_mount, open_mount, probe, unmount
from cachefs.model import ConfigError, DeadlineError, UnavailableError
from cachefs.testing.processes import Running, child_of, kill_mount, mountpoint_below, running

pytestmark = pytest.mark.skipif(not probe().can_mount, reason="needs root and /dev/fuse")

_MS_SHARED = 1 << 20


class Staged:
    def __init__(self, mountpoint: Path, process: Running) -> None:
        self.mountpoint = str(mountpoint)
        self.process = process


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Staged]:
    """A mount of a directory with one file and one directory."""
    directory = tmp_path_factory.mktemp("staged")
    with up(directory) as found:
        yield found


@contextmanager
def up(directory: Path) -> Iterator[Staged]:
    (directory / "data" / "dir").mkdir(parents=True)
    (directory / "data" / "file").write_bytes(b"content")
    with mountpoint_below(directory) as mountpoint:
        arguments = ((directory / "data").as_uri(), mountpoint, "--state-dir", directory / "state")
        with running("up", *arguments, "--tier", f"ssd:{directory / 'tier'}:64M") as process:
            yield Staged(mountpoint, process)


@pytest.fixture
def target(tmp_path: Path) -> Iterator[str]:
    """Not there yet; whatever is mounted there in the end is taken away."""
    path = tmp_path / "target"
    yield str(path)
    while any(each.mountpoint == str(path) for each in all_mounts()):
        unmount(path, lazy=True)


def mounted_at(target: str) -> int:
    return sum(each.mountpoint == target for each in all_mounts())


def dead_mount(target: str) -> None:
    """What a server that was killed leaves: every call gets ENOTCONN."""
    os.mkdir(target)
    fd, _ = open_mount(target, "dead")
    os.close(fd)


def test_it_shows_the_mount_read_only_with_all_flags(staged: Staged, target: str) -> None:
    assert bind(staged.mountpoint, target)
    check(target)
    found, source = find_mount(target), find_mount(staged.mountpoint)
    assert found is not None and source is not None
    assert found.device == source.device and {"ro", "nosuid", "nodev"} <= found.options
    assert Path(target, "file").read_bytes() == b"content"
    with pytest.raises(OSError) as refused:
        Path(target, "new").touch()
    assert refused.value.errno == errno.EROFS
    assert binds_of(source.device, staged.mountpoint) == [target]


def test_the_directory_below_is_made_without_permissions_and_goes_in_the_end(staged: Staged, target: str) -> None:
    bind(staged.mountpoint, target)
    unmount(target)
    assert stat.S_IMODE(os.stat(target).st_mode) == 0
    bind(staged.mountpoint, target)
    assert unbind(target)
    assert not os.path.lexists(target) and not mounted_at(target)
    check(staged.mountpoint)


def test_an_empty_directory_that_is_there_is_taken_and_loses_its_permissions(staged: Staged, target: str) -> None:
    os.mkdir(target, 0o755)
    bind(staged.mountpoint, target)
    unmount(target)
    assert stat.S_IMODE(os.stat(target).st_mode) == 0


def test_the_same_again_changes_nothing(staged: Staged, target: str) -> None:
    assert bind(staged.mountpoint, target)
    with open(Path(target, "file"), "rb") as file:
        assert not bind(staged.mountpoint, target)
        assert file.read() == b"content"
    assert mounted_at(target) == 1
    assert unbind(target)
    assert not unbind(target)


def test_a_bind_mount_without_its_flags_is_made_again(staged: Staged, target: str) -> None:
    """As another driver, or an older one that was killed halfway, has left it."""
    os.mkdir(target)
    for _ in range(2):
        subprocess.run(["mount", "--bind", staged.mountpoint, target], check=True)
        subprocess.run(["mount", "-o", "remount,bind,rw,suid", target], check=True)
    assert mounted_at(target) == 2
    assert bind(staged.mountpoint, target)
    found = find_mount(target)
    assert mounted_at(target) == 1 and found is not None and {"ro", "nosuid", "nodev"} <= found.options


def test_a_dead_mount_at_the_target_is_replaced(staged: Staged, target: str) -> None:
    dead_mount(target)
    with pytest.raises(UnavailableError, match="Transport endpoint is not connected"):
        check(target)
    assert bind(staged.mountpoint, target)
    check(target)
    assert mounted_at(target) == 1


def test_a_dead_mount_at_the_target_can_be_taken_away(target: str) -> None:
    dead_mount(target)
    assert unbind(target)
    assert not os.path.lexists(target)


def test_a_bind_mount_of_a_mount_that_died_is_replaced_by_one_of_its_successor(tmp_path: Path, target: str) -> None:
    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    with up(tmp_path / "first") as first:
        bind(first.mountpoint, target)
        source = find_mount(first.mountpoint)
        assert source is not None
        # It would take away what the mount leaves.
        os.kill(first.process.process.pid, signal.SIGSTOP)
        try:
            kill_mount(first.process)
            with pytest.raises(UnavailableError):
                check(target)
            with pytest.raises(UnavailableError, match="is dead"):
                bind(first.mountpoint, target)
        finally:
            os.kill(first.process.process.pid, signal.SIGCONT)
        assert binds_of(source.device, first.mountpoint) == [target]
    with up(tmp_path / "second") as second:
        assert bind(second.mountpoint, target)
        check(target)
        assert mounted_at(target) == 1
        assert unbind(target)


@pytest.mark.parametrize("moment", ["is_dead", "_empty_directory"])
def test_a_mount_that_is_taken_away_while_it_is_bound_is_not_replaced_by_the_directory_below(
    tmp_path: Path, target: str, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    staged = str(tmp_path / "staged")
    dead_mount(staged)
    found = {"is_dead": lambda source: False, "_empty_directory": binding._empty_directory}[moment]

    def in_this_moment(argument: Any) -> Any:
        unmount(staged)
        return found(argument)

    monkeypatch.setattr(binding, "is_dead", lambda source: False)
    monkeypatch.setattr(binding, moment, in_this_moment)
    with pytest.raises(UnavailableError, match="was taken away just now"):
        bind(staged, target)
    assert not mounted_at(target)


def test_a_link_as_target_is_refused_and_not_followed(staged: Staged, tmp_path: Path, target: str) -> None:
    (tmp_path / "elsewhere").mkdir(0o755)
    os.symlink(tmp_path / "elsewhere", target)
    with pytest.raises(ConfigError, match="symbolic link"):
        bind(staged.mountpoint, target)
    with pytest.raises(ConfigError, match="target_path"):
        unbind(target)
    assert os.path.islink(target)
    assert not mounted_at(str(tmp_path / "elsewhere"))
    assert stat.S_IMODE((tmp_path / "elsewhere").stat().st_mode) == 0o755


def test_a_link_as_target_to_a_mount_does_not_take_that_away(staged: Staged, target: str) -> None:
    os.symlink(staged.mountpoint, target)
    with pytest.raises(ConfigError):
        unbind(target)
    check(staged.mountpoint)


@pytest.mark.parametrize("kind", ["file", "entries", "no parent"])
def test_a_target_that_will_not_do_is_refused_and_left_alone(staged: Staged, target: str, kind: str) -> None:
    path = Path(target)
    if kind == "file":
        path.write_bytes(b"mine")
    elif kind == "entries":
        path.mkdir(0o755)
        (path / "mine").write_bytes(b"mine")
    else:
        path = path / "below"
    with pytest.raises(ConfigError, match="target_path"):
        bind(staged.mountpoint, str(path))
    assert not mounted_at(str(path))
    if kind == "no parent":
        assert not unbind(str(path))
        return
    with pytest.raises(ConfigError, match="target_path"):
        unbind(str(path))
    assert (path if kind == "file" else path / "mine").read_bytes() == b"mine"
    if kind == "entries":
        assert stat.S_IMODE(path.stat().st_mode) == 0o755


def test_what_others_mounted_at_a_target_stays(staged: Staged, target: str) -> None:
    os.mkdir(target)
    subprocess.run(["mount", "-t", "tmpfs", "others", target], check=True)
    for call in (lambda: bind(staged.mountpoint, target), lambda: unbind(target)):
        with pytest.raises(ConfigError, match="tmpfs"):
            call()
    found = find_mount(target)
    assert found is not None and found.fs_type == "tmpfs"


def test_without_a_mount_there_is_nothing_to_bind(tmp_path: Path, target: str) -> None:
    with pytest.raises(UnavailableError, match="no cachefs is mounted"):
        bind(str(tmp_path), target)
    assert not os.path.lexists(target)


@pytest.mark.expect_warnings("it says so")
def test_a_target_in_use_is_taken_out_of_the_tree_and_read_to_the_end(
    staged: Staged, target: str, caplog: pytest.LogCaptureFixture
) -> None:
    bind(staged.mountpoint, target)
    with open(Path(target, "file"), "rb") as file:
        assert unbind(target)
        assert not os.path.lexists(target)
        assert file.read() == b"content"
    assert "in use" in caplog.text


def test_what_is_mounted_below_one_target_is_in_no_other(staged: Staged, tmp_path: Path) -> None:
    """Where everything is shared, as on a node with systemd."""
    shared = tmp_path / "shared"
    shared.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "shared", shared], check=True)
    make_shared(str(shared))
    make_shared(staged.mountpoint)
    try:
        one, other = str(shared / "one"), str(shared / "other")
        bind(staged.mountpoint, one)
        bind(staged.mountpoint, other)
        subprocess.run(["mount", "-t", "tmpfs", "below", f"{one}/dir"], check=True)
        try:
            assert [each.mountpoint for each in all_mounts() if each.source == "below"] == [f"{one}/dir"]
        finally:
            unmount(f"{one}/dir")
        assert unbind(one) and unbind(other)
        check(staged.mountpoint)
    finally:
        unmount(shared, lazy=True)


def make_shared(path: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mount(None, os.fsencode(path), None, ctypes.c_ulong(_MS_SHARED), None) == 0


def test_one_that_hangs_is_not_waited_for_longer_than_allowed(tmp_path: Path, target: str) -> None:
    with up(tmp_path) as staged:
        bind(staged.mountpoint, target)
        server = child_of(staged.process, "mount")
        os.kill(server, signal.SIGSTOP)
        try:
            with pytest.raises(DeadlineError, match=r"within 0\.5 s"):
                check(target, limit_s=0.5)
        finally:
            os.kill(server, signal.SIGCONT)
        check(target)
        assert unbind(target)


def test_what_is_not_mounted_does_not_pass_the_check(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="nothing is mounted"):
        check(str(tmp_path))


def test_a_refusal_of_the_kernel_says_why(staged: Staged, target: str) -> None:
    """In a process without the right to mount."""
    program = (
        "import sys\n"
        "from cachefs.fuse import MountError\n"
        "from cachefs_csi.binding import bind\n"
        "try:\n    bind(*sys.argv[1:])\n"
        "except MountError as error:\n    print(error)\n"
    )
    dropped = ["setpriv", "--bounding-set", "-sys_admin", "--inh-caps", "-sys_admin"]
    command = [*dropped, sys.executable, "-c", program, staged.mountpoint, target]
    answer = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "root (CAP_SYS_ADMIN) is needed" in answer.stdout
    assert not mounted_at(target)
