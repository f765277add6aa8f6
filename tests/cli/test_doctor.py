"""`cachefs doctor` and `cachefs umount`, on machines that lack one thing or another: the real commands, deprived."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cachefs.fuse import all_mounts, find_mount, is_dead, is_mounted, is_over, open_mount, probe
from cachefs.testing.disks import overlay
from cachefs.testing.fixtures import Bucket
from cachefs.testing.processes import Running, child_of, kill_mount, mountpoint_below, running

pytestmark = pytest.mark.skipif(not probe().can_mount, reason="needs root and /dev/fuse")

CACHEFS = [sys.executable, "-m", "cachefs"]


def cachefs(*arguments: str | Path, prefix: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [*prefix, *CACHEFS, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def doctor(*arguments: str | Path, prefix: tuple[str, ...] = ()) -> tuple[int, list[dict[str, Any]]]:
    done = cachefs("doctor", "--json", *arguments, prefix=prefix)
    assert "Traceback" not in done.stderr, done.stderr
    facts = json.loads(done.stdout)
    assert (facts["status"] == "error") == (done.returncode == 1)
    return done.returncode, facts["findings"]


def one(findings: list[dict[str, Any]], what: str) -> dict[str, Any]:
    (found,) = [finding for finding in findings if finding["what"] == what]
    return found


def test_a_machine_that_can_do_everything(tmp_path: Path) -> None:
    before = all_mounts()
    code, findings = doctor("--tier", f"ssd:{tmp_path / 'tier'}:1G")
    assert code == 0
    for what in ("kernel", "/dev/fuse", "privileges", "passthrough", "READ size"):
        assert one(findings, what)["level"] == "ok", what
    # How much there is just now, others who are tested here have a part in.
    assert " free for " in one(findings, "space")["says"] and " available" in one(findings, "memory")["says"]
    assert f"works for a cache in {tmp_path / 'tier'}" in one(findings, "passthrough")["says"]
    assert all_mounts() == before and not (tmp_path / "tier").exists()
    said = cachefs("doctor").stdout
    assert "passthrough" in said and "what mends it" in said


def test_without_root() -> None:
    drop = ("setpriv", "--inh-caps", "-sys_admin", "--bounding-set", "-sys_admin")
    code, findings = doctor(prefix=drop)
    assert code == 1
    assert one(findings, "privileges")["level"] == "error" and "root" in one(findings, "privileges")["mend"]


def test_without_the_device() -> None:
    hide = ("unshare", "-m", "sh", "-c", 'mount -t tmpfs none /dev && exec "$@"', "sh")
    code, findings = doctor(prefix=hide)
    assert code == 1
    found = one(findings, "/dev/fuse")
    assert found["level"] == "error" and "No such file" in found["says"] and found["mend"]


def test_a_kernel_without_passthrough_is_worth_a_warning() -> None:
    code, findings = doctor("--ignore-kernel-feature", "passthrough")
    assert code == 0
    found = one(findings, "passthrough")
    assert found["level"] == "warning" and "does not offer passthrough" in found["says"] and found["mend"]


def test_a_cache_where_passthrough_is_impossible(tmp_path: Path) -> None:
    with overlay(tmp_path / "stacked") as merged:
        _, findings = doctor("--tier", f"ssd:{merged / 'tier'}:1G")
        found = one(findings, "passthrough")
        assert found["level"] == "warning" and "stacked" in found["says"] and "--tier" in found["mend"]


def test_limits(tmp_path: Path) -> None:
    _, findings = doctor(prefix=("prlimit", "--nofile=100:100"))
    found = one(findings, "open files")
    assert found["level"] == "warning" and "100 open files" in found["says"] and "ulimit" in found["mend"]
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1M", "tmpfs", str(tmp_path)], check=True)
    try:
        _, findings = doctor("--tier", f"ssd:{tmp_path / 'tier'}:1G")
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
    found = one(findings, "space")
    assert found["level"] == "warning" and "1.0 MiB free" in found["says"] and "--tier" in found["mend"]


def test_under_stores(tmp_path: Path, s3_bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3_bucket.environment.items():
        monkeypatch.setenv(name, value)
    assert one(doctor(s3_bucket.url)[1], "under-store")["says"].endswith("is empty")
    s3_bucket.put({"some/key": b"x"})
    assert "'some'" in one(doctor(s3_bucket.url)[1], "under-store")["says"]
    wrong = f"{tmp_path.as_uri()}/missing", "gopher://x", "s3://a-bucket-that-is-not-there"
    for url in wrong:
        code, findings = doctor(url)
        found = one(findings, "under-store")
        assert code == 1 and found["level"] == "error" and url in found["says"] and found["mend"], url


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[mount]\nthreads = 0\n", "threads in [mount]: '0' is not accepted; expected 1 to 1024"),
        ("[worker]\ntier = ['hdd:/x:1G']\n", "tier in [worker]"),
        ("[mount]\nread-ahead = '2T'\n", "read-ahead in [mount]: '2T' is not accepted"),
        ("[mont]\n", "section"),
        ("[mount\n", "a TOML file"),
    ],
)
def test_what_is_wrong_in_the_settings_is_a_finding(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "c.toml"
    file.write_text(text)
    code, findings = doctor("--config", file)
    found = one(findings, "settings")
    assert code == 1 and found["level"] == "error" and said in found["says"] and found["mend"]
    # The rest is looked at all the same, and text tells what is in brackets.
    assert one(findings, "kernel")["level"] == "ok"
    done = cachefs("doctor", "--config", file)
    assert done.returncode == 1 and one(findings, "settings")["says"] in done.stdout


def test_the_settings_are_those_of_up(tmp_path: Path, s3_bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "c.toml"
    options = "".join(f"{name} = {json.dumps(value)}\n" for name, value in s3_bucket.options.items())
    file.write_text(f"[worker]\ntier = ['ssd:{tmp_path}/one:1G']\n[ufs.options]\n{options}")
    code, findings = doctor(s3_bucket.url, "--config", file)
    assert code == 0, findings
    assert one(findings, "settings")["says"] == f"{file}: can be used"
    assert one(findings, "under-store")["level"] == "ok"
    assert one(findings, "space")["says"].endswith(f"{tmp_path}/one")
    monkeypatch.setenv("CACHEFS_TIER", f"ssd:{tmp_path}/two:1G")
    assert one(doctor("--config", file)[1], "space")["says"].endswith(f"{tmp_path}/two")
    monkeypatch.setenv("CACHEFS_UFS_OPTIONS", "{")
    code, findings = doctor(s3_bucket.url)
    assert code == 1 and "CACHEFS_UFS_OPTIONS" in one(findings, "under-store")["says"]


def test_what_would_mend_it_is_shown_for_what_is_well_enough_too(tmp_path: Path) -> None:
    broken = tmp_path / "packages" / "pyfuse3.py"
    broken.parent.mkdir()
    broken.write_text("raise ImportError('no [such] library')")
    command = [*CACHEFS, "doctor"]
    environment = {**os.environ, "PYTHONPATH": str(broken.parent)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    (line,) = [each for each in done.stdout.splitlines() if "pyfuse3" in each]
    assert "no [such] library" in line and "pip install 'cachefs[pyfuse3]'" in line


@contextmanager
def up(directory: Path, name: str = "data") -> Iterator[tuple[Path, Running]]:
    data = directory / name
    data.mkdir(parents=True)
    (data / "file").write_bytes(b"content")
    with mountpoint_below(directory) as mountpoint:
        arguments = [data.as_uri(), mountpoint, "--state-dir", directory / "state", "--ufs-option", "settle=0"]
        with running("up", *arguments, "--tier", f"ssd:{directory / 'tier'}:1G") as process:
            yield mountpoint, process


def wait_dead(mountpoint: Path) -> None:
    """The second of two killed processes may take a while to let go of it."""
    found = find_mount(mountpoint)
    assert found is not None
    deadline = time.monotonic() + 60
    while not is_dead(found):
        assert time.monotonic() < deadline


@contextmanager
def dead(directory: Path) -> Iterator[Path]:
    """A mountpoint whose server was killed, and a process that stands in it."""
    with up(directory) as (_, process), mountpoint_below(directory / "other") as mountpoint:
        arguments = [mountpoint, "--master", process.facts["master"], "--insecure"]
        with running("mount", *arguments) as server:
            standing = subprocess.Popen(["sleep", "600"], cwd=mountpoint)
            kill_mount(server)
            server.process.wait()
            wait_dead(mountpoint)
            try:
                yield mountpoint
            finally:
                standing.kill()
                standing.wait()


def test_dead_mounts_are_found_and_cleared(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with dead(tmp_path) as mountpoint:
        _, findings = doctor()
        (found,) = [each for each in findings if str(mountpoint) in each["says"]]
        assert found["level"] == "warning" and found["mend"] == f"cachefs umount {mountpoint}"
        living = [each for each in findings if str(tmp_path / "mnt") in each["says"]]
        assert {each["what"] for each in living} == {"mount", "cachefs up"}
        assert {each["level"] for each in living} == {"ok"}
        assert cachefs("umount", "--dead", "--dry-run").stdout.split() == [str(mountpoint)]
        assert is_mounted(mountpoint)
        assert json.loads(cachefs("umount", "--dead", "--json").stdout) == [
            {"mountpoint": str(mountpoint), "error": None}
        ]
        assert find_mount(mountpoint) is None and is_mounted(tmp_path / "mnt")


def test_nothing_starts_on_a_dead_mount(tmp_path: Path) -> None:
    """And it stays as it is: somebody may want to know why."""
    (tmp_path / "other").mkdir()
    with dead(tmp_path) as mountpoint:
        before = find_mount(mountpoint)
        by_up = cachefs("up", (tmp_path / "data").as_uri(), mountpoint, "--state-dir", tmp_path / "state2")
        assert by_up.returncode == 1 and "MOUNTPOINT: " in by_up.stderr and "cachefs umount" in by_up.stderr
        by_mount = cachefs("mount", mountpoint, "--master", _master(tmp_path), "--insecure", "--log-level", "WARNING")
        (line,) = by_mount.stderr.splitlines()
        assert by_mount.returncode == 1 and line.startswith("Error: MOUNTPOINT: ") and "dead cachefs mount" in line
        assert find_mount(mountpoint) == before


def test_a_dead_mount_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with dead(tmp_path) as mountpoint:
        done = cachefs("umount", mountpoint)
        assert (done.returncode, done.stderr) == (0, "")
        assert find_mount(mountpoint) is None


def test_a_mount_in_use_and_what_is_none(tmp_path: Path) -> None:
    with up(tmp_path) as (mountpoint, process):
        standing = subprocess.Popen(["sleep", "600"], cwd=mountpoint)
        try:
            busy = cachefs("umount", mountpoint)
            assert busy.returncode == 1 and "lazy" in busy.stderr and is_mounted(mountpoint)
            none = cachefs("umount", tmp_path)
            assert none.returncode == 1 and "a directory that a cachefs is mounted on" in none.stderr
            assert cachefs("umount").returncode == 2
            for other in (mountpoint, "--dead"):
                both = cachefs("umount", "--all", other)
                assert both.returncode == 2 and "--all takes no" in both.stderr and is_mounted(mountpoint)
            assert cachefs("umount", "--lazy", mountpoint).returncode == 0
            assert find_mount(mountpoint) is None
        finally:
            standing.kill()
            standing.wait()
        # Nobody uses it any more: the processes end by themselves.
        assert process.process.wait(timeout=60) == 0


def test_all_is_asked_for_and_told(tmp_path: Path) -> None:
    """In a mount namespace of its own: the mounts of others stay."""
    apart = ("unshare", "-m")
    with up(tmp_path) as (mountpoint, process):
        unasked = cachefs("umount", "--all", prefix=apart)
        assert unasked.returncode == 1 and "--yes" in unasked.stderr and "no terminal" in unasked.stderr
        assert f"{mountpoint}\n" in cachefs("umount", "--all", "--dry-run", prefix=apart).stdout
        done = cachefs("umount", "--all", "--yes", "--lazy", prefix=apart)
        assert done.returncode == 0 and f"{mountpoint}: unmounted\n" in done.stdout
        assert is_mounted(mountpoint)
        assert cachefs("umount", mountpoint).stdout == f"{mountpoint}: unmounted\n"
        assert process.process.wait(timeout=60) == 0


def test_a_server_that_hangs(tmp_path: Path) -> None:
    with up(tmp_path) as (mountpoint, _), mountpoint_below(tmp_path / "data") as other:
        arguments = [other, "--master", _master(tmp_path), "--insecure", "--allow-nonempty"]
        with running("mount", *arguments) as server:
            # Of a server alone, its keeper starts another.
            pids = [child_of(server, role) for role in ("mount-keeper", "mount")]
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
            try:
                reader = subprocess.Popen(["stat", str(other / "file")], stderr=subprocess.PIPE, text=True)
                assert cachefs("umount", "--force", other).returncode == 0
                assert find_mount(other) is None
                _, said = reader.communicate(timeout=60)
                assert "file" in said or reader.returncode == 0
            finally:
                for pid in pids:
                    os.kill(pid, signal.SIGCONT)
        assert is_mounted(mountpoint)


def test_a_keeper_of_an_earlier_version_has_its_mount_taken_away(tmp_path: Path) -> None:
    """It says by a word that its connection lives, and hands no device on; a package may be upgraded under it."""
    with mountpoint_below(tmp_path) as mountpoint:
        fd, mounted = open_mount(mountpoint, "test")
        try:
            end = ("umount", "--connection", str(mounted.connection))
            assert cachefs(*end, mountpoint).returncode == 0  # over, as that keeper knows: this is another's
            assert cachefs("umount", "--force", "--connection", "1048575", mountpoint).returncode == 0
            assert is_mounted(mountpoint) and not is_over(fd)
            assert cachefs(*end, "--force", mountpoint).returncode == 0
            assert find_mount(mountpoint) is None and is_over(fd)
        finally:
            os.close(fd)


def _master(directory: Path) -> str:
    from cachefs.cli.instances import running as instances

    (mine,) = [each for each in instances() if each.state_dir == str(directory / "state")]
    return mine.master
