"""Processes of a mount are killed, stopped and replaced, while others read through it and compare every byte."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from cachefs.cli.instances import runtime_root
from cachefs.cli.mount import keeper_socket_of, server_command
from cachefs.fuse import find_mount, is_mounted, probe
from cachefs.fuse.keeping import ask, command_file, keeper_command, listen
from cachefs.testing.processes import Running, kill_mount, mountpoint_below, running
from cachefs.testing.survivors import Report, kill, make_source, pid_of, reading, wait_for

pytestmark = pytest.mark.skipif(not probe().can_mount, reason="needs root and /dev/fuse")

LIMIT_S = 60.0
COLD = 400


@contextmanager
def up(directory: Path, *flags: str) -> Iterator[tuple[Path, Path, Running]]:
    """(mountpoint, source, process)"""
    source = directory / "source"
    make_source(source, COLD)
    with mountpoint_below(directory) as mountpoint:
        arguments = [source.as_uri(), mountpoint, "--state-dir", directory / "state", "--ufs-option", "settle=0"]
        tier = f"ssd:{directory / 'tier'}:1G"
        small = ["--page-size", "64K", "--open-wait", "512K"]
        with running("up", *arguments, "--tier", tier, *small, *flags) as process:
            yield mountpoint, source, process


class Shared(NamedTuple):
    """A master and a worker for mounts of other kinds."""

    source: Path
    master: str


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    with up(tmp_path_factory.mktemp("shared")) as (_, source, process):
        yield Shared(source, process.facts["master"])


@contextmanager
def mounted(directory: Path, shared: Shared, *flags: str) -> Iterator[tuple[Path, Running]]:
    with mountpoint_below(directory) as mountpoint:
        arguments = [mountpoint, "--master", shared.master, "--insecure", "--open-wait", "512K", *flags]
        with running("mount", *arguments) as process:
            yield mountpoint, process


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def answers(mountpoint: Path) -> None:
    """A new server has been heard from: it opens what nobody has open."""
    done = subprocess.run(["cat", mountpoint / "warm/039"], capture_output=True, timeout=LIMIT_S)
    assert (done.returncode, done.stderr) == (0, b"")


def cachefs(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cachefs", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)


LISTING = """
import os, sys
with os.scandir(sys.argv[1]) as entries:
    found = [next(entries).name for _ in range(5)]
    print("begun", flush=True)
    sys.stdin.readline()
    found += [entry.name for entry in entries]
print(*found)
"""


@contextmanager
def listing(directory: Path, names: list[str]) -> Iterator[None]:
    """A directory that is being read, and is in the end known to have been read whole."""
    command = [sys.executable, "-c", LISTING, str(directory)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as reader:
        assert reader.stdout is not None
        assert reader.stdout.readline() == "begun\n"
        yield
        said, _ = reader.communicate("go\n", timeout=LIMIT_S)
    assert sorted(said.split()) == names


def check(report: Report) -> None:
    assert report.errors == []
    assert {"held", "mapped", "large", "warm", "cold", "listing"} <= set(report.gaps)


@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_a_server_that_is_killed_at_any_moment(tmp_path: Path, kills: int) -> None:
    chance = random.Random(7)
    with up(tmp_path) as (mountpoint, source, process), reading(mountpoint, source) as readers:
        pid = None
        with listing(mountpoint / "cold", sorted(os.listdir(source / "cold"))):
            for number in range(kills):
                if number % 5 == 4:
                    answers(mountpoint)  # with ten in a row that never came to answer it would be over
                pid = wait_for("mount-server", mountpoint, other_than=pid)
                # Also while it is starting, or is taking over.
                time.sleep(chance.uniform(0.0, 1.5))
                os.kill(pid, signal.SIGKILL)
            answers(mountpoint)
        check(readers.stop())
        # What it was opened by is closed by another: nothing is left behind, and `up` has noticed nothing.
        assert process.process.poll() is None
        assert process.end() == 0
        assert find_mount(mountpoint) is None
        assert pid_of("mount-server", mountpoint) is None and pid_of("mount-keeper", mountpoint) is None


def test_a_keeper_that_is_killed_and_then_its_server(tmp_path: Path) -> None:
    with up(tmp_path) as (mountpoint, source, process), reading(mountpoint, source) as readers:
        for _ in range(2):
            keeper = kill("mount-keeper", mountpoint)
            keeper = wait_for("mount-keeper", mountpoint, other_than=keeper)
            until(lambda: "state=serving" in ask(keeper_socket_of(str(mountpoint)), "who"))
            server = kill("mount-server", mountpoint)
            wait_for("mount-server", mountpoint, other_than=server)
            answers(mountpoint)
        check(readers.stop())
        # Whom `up` started is gone; those who took their place end with it all the same.
        assert cachefs("umount", mountpoint).returncode == 0
        assert process.process.wait(LIMIT_S) == 0
        assert pid_of("mount-server", mountpoint) is None and pid_of("mount-keeper", mountpoint) is None


def test_a_server_that_hangs_is_replaced(tmp_path: Path, shared: Shared) -> None:
    with (
        mounted(tmp_path, shared, "--hung-after", "2s") as (mountpoint, process),
        reading(mountpoint, shared.source) as readers,
    ):
        stopped = kill("mount-server", mountpoint, signal.SIGSTOP)
        wait_for("mount-server", mountpoint, other_than=stopped)
        answers(mountpoint)
        check(readers.stop())
        assert process.end() == 0


def test_an_upgrade_under_load(tmp_path: Path) -> None:
    with up(tmp_path) as (mountpoint, source, process), reading(mountpoint, source) as readers:
        with listing(mountpoint / "cold", sorted(os.listdir(source / "cold"))):
            for _ in range(2):
                old = wait_for("mount-server", mountpoint)
                done = cachefs("mount", "--upgrade", mountpoint)
                assert done.returncode == 0, done.stderr
                new = wait_for("mount-server", mountpoint)
                assert new != old and done.stdout == f"{mountpoint}: served by process {new}\n"
        # One that does not come up changes nothing.
        failed = ask(keeper_socket_of(str(mountpoint)), "\0".join(["upgrade", "/bin/false"]))
        assert failed.startswith("failed ")
        assert wait_for("mount-server", mountpoint) == new
        report = readers.stop()
        check(report)
        assert process.end() == 0


def test_a_kernel_that_cannot_send_again(tmp_path: Path, shared: Shared) -> None:
    """It is mounted anew: what is open gets errors, what is opened later is there."""
    with mounted(tmp_path, shared, "--ignore-kernel-feature", "has-resend") as (mountpoint, process):
        with open(mountpoint / "held/0", "rb") as held:
            before = find_mount(mountpoint)
            pid = kill("mount-server", mountpoint)
            wait_for("mount-server", mountpoint, other_than=pid)
            until(lambda: find_mount(mountpoint) not in (None, before))
            answers(mountpoint)
            with pytest.raises(OSError):
                os.fstat(held.fileno()) and os.statvfs(held.fileno())
        refused = cachefs("mount", "--upgrade", mountpoint)
        assert refused.returncode == 1 and "the server that was there goes on" in refused.stderr
        answers(mountpoint)
        assert process.end() == 0


def test_a_kernel_without_passthrough(tmp_path: Path, shared: Shared) -> None:
    with (
        mounted(tmp_path, shared, "--ignore-kernel-feature", "passthrough") as (mountpoint, process),
        reading(mountpoint, shared.source) as readers,
    ):
        assert process.facts["open_mode"] == "cached"
        for _ in range(2):
            pid = kill("mount-server", mountpoint)
            wait_for("mount-server", mountpoint, other_than=pid)
            answers(mountpoint)
        check(readers.stop())


def test_without_opens(tmp_path: Path, shared: Shared) -> None:
    with (
        mounted(tmp_path, shared, "--open-mode", "no-open") as (mountpoint, _),
        reading(mountpoint, shared.source) as readers,
    ):
        pid = kill("mount-server", mountpoint)
        wait_for("mount-server", mountpoint, other_than=pid)
        answers(mountpoint)
        check(readers.stop())


def test_a_mount_that_cannot_be_saved(tmp_path: Path, shared: Shared) -> None:
    """It is taken away, and who waited for it is told."""
    able = tmp_path / "able"
    able.touch()
    with mountpoint_below(tmp_path) as mountpoint:
        mountpoint.chmod(0o750)
        server = server_command(str(mountpoint), ["--master", shared.master, "--insecure"])
        command = command_file(["/bin/sh", "-c", 'test -e "$0" && exec "$@"; exit 1', str(able), *server])
        path = str(tmp_path / "socket")
        listener = listen(path)
        assert listener is not None
        values = {"listen": listener.fileno(), "path": path, "failures": 2}
        with (
            listener,
            subprocess.Popen(
                keeper_command(str(mountpoint), values, command), pass_fds=[listener.fileno(), command]
            ) as keeper,
        ):
            os.close(command)
            until(lambda: "state=serving" in ask(path, "who"))
            able.unlink()
            pid = kill("mount-server", mountpoint)
            until(lambda: pid_of("mount-server", mountpoint) != pid)
            waiting = subprocess.run(["cat", mountpoint / "cold/00001"], capture_output=True, timeout=LIMIT_S)
            assert waiting.returncode == 1 and b"00001" in waiting.stderr
            assert keeper.wait(LIMIT_S) == 1
            assert not is_mounted(mountpoint) and not os.path.exists(path)
            assert mountpoint.stat().st_mode & 0o777 == 0o750


def test_a_keeper_by_itself(tmp_path: Path, shared: Shared) -> None:
    """Servers come and go on their own; the last one that came serves."""
    with mountpoint_below(tmp_path) as mountpoint:
        socket = tmp_path / "keeper"
        arguments = [mountpoint, "--keeper-socket", socket, "--master", shared.master, "--insecure"]
        with (
            running("mount", mountpoint, "--keep-only", "--keeper-socket", socket) as keeper,
            running("mount", *arguments) as first,
            reading(mountpoint, shared.source) as readers,
        ):
            with running("mount", *arguments) as second:
                # It has taken over, and the first is gone.
                assert first.process.wait(LIMIT_S) == 0
                answers(mountpoint)
                # Ended, it leaves the mount to the next.
                assert second.end() == 0
                assert is_mounted(mountpoint)
            with running("mount", *arguments) as third:
                answers(mountpoint)
                third.end(signal.SIGKILL)
            with running("mount", *arguments) as fourth:
                os.kill(keeper.process.pid, signal.SIGKILL)
                wait_for("mount-keeper", mountpoint, other_than=keeper.process.pid)
                until(lambda: "state=serving" in ask(str(socket), "who"))
                answers(mountpoint)
                check(readers.stop())
                assert cachefs("mount", "--upgrade", mountpoint).returncode == 1
                kill("mount-keeper", mountpoint, signal.SIGTERM)
                assert fourth.process.wait(LIMIT_S) == 0
                assert not is_mounted(mountpoint)


def test_requests_do_not_wake_the_keeper(tmp_path: Path, shared: Shared) -> None:
    with mounted(tmp_path, shared) as (mountpoint, process):

        def wakeups() -> int:
            status = Path(f"/proc/{process.process.pid}/status").read_text()
            return int(status.partition("\nvoluntary_ctxt_switches:")[2].split()[0])

        before = wakeups()
        for number in range(2000):
            assert not os.path.exists(mountpoint / f"missing{number}")
        assert wakeups() - before < 1000  # those of its clock, however long it took


def test_a_server_imports_nothing_of_the_directory_it_is_started_in(tmp_path: Path) -> None:
    (tmp_path / "cachefs.py").write_text("raise SystemExit(9)")
    command = [*server_command("/mnt", []), "--help"]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=LIMIT_S).returncode == 0


def test_mounting_again_while_the_last_files_of_the_earlier_mount_are_open(tmp_path: Path, shared: Shared) -> None:
    with mountpoint_below(tmp_path) as mountpoint:
        arguments = ["mount", mountpoint, "--master", shared.master, "--insecure"]
        with running(*arguments) as earlier, open(mountpoint / "held/0", "rb") as held:
            assert cachefs("umount", "--lazy", mountpoint).returncode == 0
            with running(*arguments) as later:
                answers(mountpoint)
                assert held.read() == (shared.source / "held/0").read_bytes()
                held.close()
                # It ends, and takes nothing away from the later one.
                assert earlier.process.wait(LIMIT_S) == 0
                facts = ask(keeper_socket_of(str(mountpoint)), "who")
                assert f"keeper={later.process.pid}" in facts
                answers(mountpoint)
                taken = cachefs("mount", mountpoint, "--master", shared.master, "--insecure")
                assert taken.returncode == 1 and "that no cachefs is mounted on" in taken.stderr
                assert later.end() == 0


def test_without_a_directory_for_sockets(tmp_path: Path, shared: Shared) -> None:
    """Only that nobody can ask for an upgrade."""
    hide = f'mount -t tmpfs -o ro none {runtime_root()} && exec "$@"'
    with mountpoint_below(tmp_path) as mountpoint:
        arguments = ["mount", mountpoint, "--master", shared.master, "--insecure"]
        log = tmp_path / "log"
        with (
            log.open("wb") as stderr,
            running(*arguments, prefix=["unshare", "-m", "sh", "-c", hide, "sh"], stderr=stderr),
        ):
            killed = kill("mount-server", mountpoint)
            wait_for("mount-server", mountpoint, other_than=killed)
        assert "nobody can ask this mount for an upgrade" in log.read_text()


def test_the_directory_below_is_nobodys(tmp_path: Path, shared: Shared) -> None:
    """Who writes there because the mount is gone gets an error, unless it is root."""
    with mountpoint_below(tmp_path) as mountpoint:
        mountpoint.chmod(0o750)
        arguments = ["mount", mountpoint, "--master", shared.master, "--insecure"]

        def below() -> int:
            """The mode of the directory, seen without what is mounted on it."""
            look = 'mount --bind "$1" "$2" && stat -c %a "$2/mnt"'
            with_root = ["unshare", "-m", "sh", "-c", look, "sh", str(tmp_path), "/mnt"]
            return int(subprocess.run(with_root, capture_output=True, check=True).stdout, 8)

        with running(*arguments) as mount:
            assert below() == 0
            assert mountpoint.stat().st_mode & 0o777 == 0o755
            kill("mount-server", mountpoint)
            answers(mountpoint)
            assert mount.end(signal.SIGINT) == 0
        assert mountpoint.stat().st_mode & 0o777 == 0o750
        with running(*arguments) as mount:
            kill_mount(mount)
            mount.process.wait()
            assert below() == 0
            assert cachefs("umount", mountpoint).returncode == 0
        # Left so, and found so by the next.
        assert mountpoint.stat().st_mode & 0o777 == 0
        with running(*arguments) as mount:
            answers(mountpoint)
            assert cachefs("umount", mountpoint).returncode == 0
            assert mount.process.wait(LIMIT_S) == 0
        assert mountpoint.stat().st_mode & 0o777 == 0o755
        # What somebody keeps there stays as it is.
        (mountpoint / "kept").touch()
        with running(*arguments, "--allow-nonempty") as mount:
            assert below() == 0o755
            assert mount.end() == 0
        (mountpoint / "kept").unlink()
