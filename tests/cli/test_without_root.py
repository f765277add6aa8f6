"""A user who is not root: real mounts through fusermount3 by both drivers; what cannot be had, and what mends it."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cachefs.fuse import Driver, find_mount, is_mounted
from cachefs.testing.processes import Running, child_of, kill_mount, mountpoint_below, running
from cachefs.testing.users import UID, User, a_user, why_no_user

pytestmark = pytest.mark.skipif(why_no_user() is not None, reason=why_no_user() or "")

LARGE = random.Random(1).randbytes(9_000_017)
LIMIT_S = 60


@pytest.fixture
def user() -> Iterator[User]:
    with a_user() as it:
        data = it.directory / "data"
        data.mkdir()
        (data / "small").write_bytes(b"content")
        (data / "large").write_bytes(LARGE)
        data.chmod(0o755)
        yield it


@contextmanager
def mountpoint_of(user: User) -> Iterator[Path]:
    with mountpoint_below(user.directory) as mountpoint:
        os.chown(mountpoint, UID, UID)
        yield mountpoint


def arguments_of(user: User, mountpoint: Path, *flags: str) -> list[str]:
    places = ["--state-dir", str(user.directory / "state"), "--tier", f"ssd:{user.directory / 'tier'}:1G"]
    return [(user.directory / "data").as_uri(), str(mountpoint), *places, "--ufs-option", "settle=0", *flags]


@contextmanager
def up(user: User, *flags: str) -> Iterator[tuple[Path, Running]]:
    with mountpoint_of(user) as mountpoint:
        arguments = arguments_of(user, mountpoint, *flags)
        with running("up", *arguments, environment=user.environment, prefix=user.prefix) as process:
            yield mountpoint, process


def run(user: User, *command: str | Path, **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [*user.prefix, *map(str, command)],
        capture_output=True,
        timeout=LIMIT_S,
        env={**os.environ, **user.environment, **environment},
    )


def cachefs(user: User, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[bytes]:
    return run(user, sys.executable, "-m", "cachefs", *arguments, **environment)


def fails(user: User, *flags: str, prefix: tuple[str, ...] = (), **environment: str) -> str:
    """The one line that `cachefs up` ends with."""
    with mountpoint_of(user) as mountpoint:
        done = subprocess.run(
            [*prefix, *user.prefix, sys.executable, "-m", "cachefs", "up", *arguments_of(user, mountpoint, *flags)],
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            env={**os.environ, **user.environment, **environment},
        )
        assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
        assert find_mount(mountpoint) is None
    (line,) = done.stderr.splitlines()
    return line


def test_a_real_mount(user: User, driver: Driver) -> None:
    with up(user, "--driver", driver.value) as (mountpoint, process):
        assert process.facts["open_mode"] == "cached"
        why = {Driver.KERNEL: "passthrough needs root (CAP_SYS_ADMIN)", Driver.PYFUSE3: "every READ comes to us"}
        assert why[driver] in process.facts["why"]
        assert "the read-ahead stays the kernel's: only root can set it" in process.facts["notes"]
        info = find_mount(mountpoint)
        assert info is not None
        assert (info.fs_type, info.source) == ("fuse.cachefs", "cachefs:/")
        assert {"ro", "nosuid", "nodev", "default_permissions", f"user_id={UID}", "max_read=1048576"} <= info.options
        for _ in range(2):
            assert run(user, "cat", mountpoint / "small").stdout == b"content"
            assert run(user, "cat", mountpoint / "large").stdout == LARGE
        assert run(user, "ls", mountpoint).stdout.split() == [b"large", b"small"]
        assert b"Read-only" in run(user, "touch", mountpoint / "new").stderr
        assert process.end() == 0
        assert find_mount(mountpoint) is None


def test_whoever_reads_when_it_ends_gets_an_error(user: User, driver: Driver) -> None:
    """Aborting needs root; closing the device does the same."""
    with up(user, "--driver", driver.value) as (mountpoint, process):
        script = 'exec 3<"$1"; head -c 5 <&3; read go; cat "/dev/fd/3" "$1" 2>&1'
        reader = subprocess.Popen(
            [*user.prefix, "sh", "-c", script, "sh", str(mountpoint / "small")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert reader.stdout is not None
        assert reader.stdout.read(5) == b"conte"
        assert process.end() == 0
        assert find_mount(mountpoint) is None
        said, _ = reader.communicate(b"go\n", timeout=LIMIT_S)
        assert b"not connected" in said or b"No such" in said or b"aborted" in said, said


def test_unmounting_by_the_user(user: User, driver: Driver) -> None:
    with up(user, "--driver", driver.value) as (mountpoint, process):
        standing = subprocess.Popen(
            [*user.prefix, "sh", "-c", 'cd "$1" && echo && read go', "sh", str(mountpoint)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        try:
            assert standing.stdout is not None and standing.stdout.read(1) == b"\n"
            busy = cachefs(user, "umount", mountpoint)
            assert busy.returncode == 1 and b"lazy" in busy.stderr and is_mounted(mountpoint)
            dry = cachefs(user, "umount", "--all", "--dry-run")
            assert str(mountpoint).encode() in dry.stdout
        finally:
            standing.communicate(b"go\n", timeout=LIMIT_S)
        done = cachefs(user, "umount", mountpoint)
        assert (done.returncode, done.stderr) == (0, b"")
        assert find_mount(mountpoint) is None
        assert process.process.wait(LIMIT_S) == 0


def test_a_killed_server_leaves_nothing(user: User) -> None:
    with up(user) as (mountpoint, process):
        kill_mount(process)
        assert process.process.wait(LIMIT_S) != 0
        assert find_mount(mountpoint) is None


def test_a_server_that_hangs(user: User) -> None:
    """Taken out of the tree at once. To end its connection takes root, or the control file system, by its owner."""
    with up(user) as (_, process), mountpoint_below(_other(user)) as mountpoint:
        arguments = [mountpoint, "--master", process.facts["master"], "--insecure"]
        os.chown(mountpoint, UID, UID)
        with running("mount", *arguments, environment=user.environment, prefix=user.prefix) as server:
            found = find_mount(mountpoint)
            assert found is not None
            # Of a server alone, its keeper starts another.
            pids = [child_of(server, role) for role in ("mount-keeper", "mount")]
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
            try:
                reader = subprocess.Popen([*user.prefix, "stat", str(mountpoint / "small")], stderr=subprocess.PIPE)
                deadline = time.monotonic() + LIMIT_S
                while "wait_answer" not in (waits := Path(f"/proc/{reader.pid}/wchan").read_text()):
                    assert time.monotonic() < deadline and reader.poll() is None, waits
                    time.sleep(0.01)
                forced = cachefs(user, "umount", "--force", mountpoint)
                assert find_mount(mountpoint) is None
                if forced.returncode != 0:
                    assert b"root is needed, or the file system mounted on /sys/fs/fuse/connections" in forced.stderr
                    mounted = "mount -t fusectl none /sys/fs/fuse/connections"
                    script = (
                        f'{mounted} && exec "$@" sh -c "echo 1 > /sys/fs/fuse/connections/{found.connection}/abort"'
                    )
                    done = subprocess.run(
                        ["unshare", "-m", "sh", "-c", script, "sh", *user.prefix], capture_output=True, timeout=LIMIT_S
                    )
                    assert (done.returncode, done.stderr) == (0, b"")
                _, said = reader.communicate(timeout=LIMIT_S)
                assert reader.returncode == 1 and (b"abort" in said or b"not connected" in said), said
            finally:
                for pid in pids:
                    os.kill(pid, signal.SIGCONT)


def _other(user: User) -> Path:
    directory = user.directory / "other"
    directory.mkdir()
    return directory


def test_without_opens(user: User) -> None:
    with up(user, "--open-mode", "no-open") as (mountpoint, process):
        assert process.facts["open_mode"] == "no-open"
        assert run(user, "cat", mountpoint / "large").stdout == LARGE


def test_others(user: User) -> None:
    """They may use it if /etc/fuse.conf allows that; here one of a mount namespace's own."""
    with up(user) as (mountpoint, process):
        # Not even root.
        assert "Permission denied" in subprocess.run(["ls", mountpoint], capture_output=True, text=True).stderr
        assert "only this user may use the mount: /etc/fuse.conf" in process.facts["notes"]
    assert fails(user, "--allow-other") == (
        "Error: --allow-other: 'true' is not accepted; expected false for users who are not root, unless "
        "/etc/fuse.conf has the line user_allow_other"
    )
    (user.directory / "fuse.conf").write_text("# others\nuser_allow_other\n")
    as_if = ["unshare", "-m", "sh", "-c", f'mount --bind {user.directory}/fuse.conf /etc/fuse.conf && exec "$@"', "sh"]
    for flags in ((), ("--allow-other",)):
        with mountpoint_of(user) as mountpoint:
            arguments = arguments_of(user, mountpoint, *flags)
            with running("up", *arguments, environment=user.environment, prefix=(*as_if, *user.prefix)) as process:
                assert "others" not in process.facts["notes"] and "only this user" not in process.facts["notes"]
                inside = ["nsenter", "-m", "-t", str(process.process.pid), "setpriv", "--reuid", str(UID - 1)]
                read = subprocess.run([*inside, "cat", mountpoint / "small"], capture_output=True, timeout=LIMIT_S)
                assert read.stdout == b"content", read.stderr


def test_what_only_root_can_have_is_refused(user: User) -> None:
    said = fails(user, "--open-mode", "passthrough")
    assert "--open-mode: 'passthrough' is not accepted; expected auto or cached here" in said
    assert "passthrough needs root (CAP_SYS_ADMIN)" in said


def test_mounts_of_others_stay(user: User) -> None:
    with mountpoint_below(user.directory) as mountpoint:
        arguments = arguments_of(user, mountpoint)
        with running("up", *arguments) as process:
            done = cachefs(user, "umount", mountpoint)
            assert done.returncode == 1 and b"another user's" in done.stderr, done.stderr
            forced = cachefs(user, "umount", "--force", mountpoint)
            assert forced.returncode == 1
            assert is_mounted(mountpoint) and process.process.poll() is None


HIDE_DEVICE = ("unshare", "-m", "sh", "-c", 'mount -t tmpfs none /dev && exec "$@"', "sh")


def test_machines_where_nothing_can_be_mounted(user: User) -> None:
    assert "apt-get install fuse3" in fails(user, PATH="/nowhere")
    nowhere = os.environ["PATH"]
    assert "no_new_privs" in fails(user, prefix=("setpriv", "--no-new-privs"), PATH=nowhere)
    drop = ("setpriv", "--bounding-set", "-sys_admin")
    assert "--cap-add SYS_ADMIN" in fails(user, prefix=drop)
    assert "this machine has no FUSE; load the kernel module fuse" in fails(user, prefix=HIDE_DEVICE)
    Path("/dev/fuse").chmod(0o600)
    try:
        assert "chmod 666 /dev/fuse" in fails(user)
    finally:
        Path("/dev/fuse").chmod(0o666)


# ---- doctor --------------------------------------------------------------------------------------------------------


def doctor(user: User, *arguments: str, prefix: tuple[str, ...] = (), **environment: str) -> tuple[int, Any]:
    done = subprocess.run(
        [*prefix, *user.prefix, sys.executable, "-m", "cachefs", "doctor", "--json", *arguments],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        env={**os.environ, **user.environment, **environment},
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, {each["what"]: each for each in json.loads(done.stdout)["findings"]}


def test_what_doctor_says(user: User) -> None:
    code, found = doctor(user)
    assert code == 0
    assert found["privileges"]["level"] == "ok" and "fusermount3" in found["privileges"]["says"]
    assert found["other users"]["level"] == "warning" and "user_allow_other" in found["other users"]["mend"]
    assert found["read-ahead"]["level"] == "warning"
    assert found["passthrough"]["level"] == "warning" and "needs root" in found["passthrough"]["says"]
    assert "sudo" in found["passthrough"]["mend"]


@pytest.mark.parametrize(
    ("prefix", "path", "says"),
    [
        ((), "/nowhere", "apt-get install fuse3"),
        (("setpriv", "--no-new-privs"), None, "no_new_privs"),
        (("setpriv", "--bounding-set", "-sys_admin"), None, "--cap-add SYS_ADMIN"),
    ],
)
def test_what_doctor_says_where_nothing_can_be_mounted(
    user: User, prefix: tuple[str, ...], path: str | None, says: str
) -> None:
    code, found = doctor(user, prefix=prefix, PATH=path or os.environ["PATH"])
    assert code == 1
    assert found["privileges"]["level"] == "error" and says in found["privileges"]["says"]
    assert "sudo" in found["privileges"]["mend"] and "passthrough" not in found
