"""The settings of a mount as `cachefs up` takes them: what it says at the start, profiles, and wrong values."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cachefs.fuse import find_mount, probe
from cachefs.testing.processes import Running, child_of, mountpoint_below, running

pytestmark = pytest.mark.skipif(not probe().can_mount, reason="needs root and /dev/fuse")


@contextmanager
def up(directory: Path, *flags: str) -> Iterator[tuple[Path, Running]]:
    data = directory / "data"
    data.mkdir(parents=True, exist_ok=True)
    (data / "file").write_bytes(b"content")
    with mountpoint_below(directory) as mountpoint:
        arguments: list[str | Path] = [data.as_uri(), mountpoint]
        arguments += ["--state-dir", directory / "state", "--ufs-option", "settle=0"]
        if "--tier" not in flags:
            arguments += ["--tier", f"ssd:{directory / 'tier'}:1G"]
        with running("up", *arguments, *flags) as process:
            yield mountpoint, process


def sh(script: str, *arguments: str | Path) -> str:
    done = subprocess.run(["sh", "-c", script, "sh", *map(str, arguments)], capture_output=True, text=True, timeout=60)
    return (done.stdout + done.stderr).strip()


def read_ahead_kb(mountpoint: Path) -> int:
    info = find_mount(mountpoint)
    assert info is not None
    return int(Path(f"/sys/class/bdi/{info.device}/read_ahead_kb").read_text())


def test_every_flag_reaches_the_mount(tmp_path: Path) -> None:
    flags = ["--open-mode", "cached", "--read-ahead", "2M", "--max-read", "128K", "--max-background", "9"]
    flags += ["--threads", "3", "--attr-timeout", "250ms", "--entry-timeout", "1h", "--negative-timeout", "0"]
    flags += [
        "--uid",
        "12",
        "--gid",
        "34",
        "--umask",
        "077",
        "--no-allow-other",
        "--ignore-kernel-feature",
        "passthrough",
    ]
    with up(tmp_path, *flags) as (mountpoint, process):
        assert (process.facts["open_mode"], process.facts["why"]) == ("cached", "as asked for")
        assert read_ahead_kb(mountpoint) == 2048
        assert sh('stat -c "%u %g %A" "$1/file"; cat "$1/file"', mountpoint) == "12 34 -rw-------\ncontent"
        info = find_mount(mountpoint)
        assert info is not None
        assert "max_read=131072" in info.options and "allow_other" not in info.options
        # The children decide nothing by themselves: their command lines have all of it.
        told = sh('ps -ww -eo args | grep -F "cachefs mount-server $1 " | grep -v grep', mountpoint).splitlines()[0]
        for flag in ("--threads 3", "--max-background 9", "--attr-timeout 0.25s", "--negative-timeout 0s"):
            assert flag in told


def test_what_is_said_at_the_start(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    with mountpoint_below(tmp_path) as mountpoint:
        command = [sys.executable, "-m", "cachefs", "up", data.as_uri(), str(mountpoint)]
        command += ["--state-dir", str(tmp_path / "state"), "--tier", f"ssd:{tmp_path / 'tier'}:1G"]
        command += ["--ignore-kernel-feature", "passthrough"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert process.stdout is not None
        try:
            said = [line for _, line in zip(range(2), process.stdout, strict=False)]
        finally:
            process.terminate()
            process.wait()
            process.stdout.close()
    assert "open_mode=cached" in said[1]
    assert "why=the kernel does not offer passthrough: it is older than 6.9, or built without it" in said[1]


def test_the_profile_for_training_and_what_is_asked_for_besides(tmp_path: Path) -> None:
    with up(tmp_path, "--profile", "training", "--attr-timeout", "5s") as (mountpoint, process):
        assert process.facts["open_mode"] == "passthrough"
        assert read_ahead_kb(mountpoint) == 8192
        told = sh('ps -ww -eo args | grep -F "cachefs mount-server $1 " | grep -v grep', mountpoint).splitlines()[0]
        for flag in ("--attr-timeout 5s", "--entry-timeout 7200s", "--negative-timeout 7200s"):
            assert flag in told
        assert "Read-only" in sh('touch "$1/new"', mountpoint)


def test_the_read_ahead_is_rounded_up_to_whole_pages(tmp_path: Path) -> None:
    with up(tmp_path, "--open-mode", "cached", "--read-ahead", "4097") as (mountpoint, _):
        assert read_ahead_kb(mountpoint) == 8


def test_ready_as_json(tmp_path: Path) -> None:
    """One line, the first, and nothing else on standard output."""

    def first_line(*command: str | Path) -> tuple[subprocess.Popen[str], dict[str, Any]]:
        process = subprocess.Popen(
            [sys.executable, "-m", "cachefs", *map(str, command), "--json", "--log-level", "WARNING"],
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout is not None
        return process, json.loads(process.stdout.readline())

    started: list[subprocess.Popen[str]] = []
    data = tmp_path / "data"
    data.mkdir()
    any_port = ["--listen", "127.0.0.1:0", "--insecure"]
    (tmp_path / "other").mkdir()
    with mountpoint_below(tmp_path) as mountpoint, mountpoint_below(tmp_path / "other") as other:
        try:
            places = ["--state-dir", tmp_path / "state", "--tier", f"ssd:{tmp_path / 'tier'}:1G"]
            up, facts = first_line("up", data.as_uri(), mountpoint, *places)
            assert (facts["ready"], facts["mountpoint"]) == ("up", str(mountpoint)) and facts["open_mode"]
            up.terminate()
            assert up.communicate(timeout=60)[0] == "" and up.returncode == 0
            _, master = first_line("master", "--data-dir", tmp_path / "m", "--mount", f"/={data.as_uri()}", *any_port)
            assert master["ready"] == "master"
            reach = ["--master", master["listen"]]
            tier = ["--tier", f"ssd:{tmp_path / 'tier2'}:1G", "--socket", tmp_path / "s"]
            _, worker = first_line("worker", *reach, *tier, *any_port)
            assert worker["ready"] == "worker" and worker["listen"].startswith("127.0.0.1:")
            _, mounted = first_line("mount", other, *reach, "--insecure")
            assert (mounted["ready"], mounted["mountpoint"]) == ("mount", str(other))
        finally:
            for process in reversed(started):
                process.terminate()
                process.communicate(timeout=60)


def cached_bytes(file: Path) -> int:
    return int(os.getxattr(file, "user.cachefs.cached_bytes"))


def test_extended_attributes_are_there_with_the_flag_only(tmp_path: Path) -> None:
    with up(tmp_path / "with", "--xattr") as (mountpoint, _):
        file = mountpoint / "file"
        assert cached_bytes(file) == 0
        assert file.read_bytes() == b"content"
        assert cached_bytes(file) == len(b"content")
        assert os.getxattr(file, "user.cachefs.tier") == f"ssd:{tmp_path / 'with' / 'tier'}".encode()
    with up(tmp_path / "without") as (mountpoint, _), pytest.raises(OSError, match="not supported"):
        cached_bytes(mountpoint / "file")


@pytest.mark.parametrize("promote", ["never", "if-space", "always"])
def test_what_is_read_is_kept_as_promote_says(tmp_path: Path, promote: str) -> None:
    """Ten files for a cache that has room for five."""
    size = 700_000
    (tmp_path / "data").mkdir()
    for number in range(10):
        (tmp_path / "data" / str(number)).write_bytes(os.urandom(size))
    tier = ["--page-size", "64K", "--tier", f"ssd:{tmp_path / 'small'}:4M"]
    with up(tmp_path, "--promote", promote, "--xattr", *tier) as (mountpoint, _):
        for number in range(10):
            assert (mountpoint / str(number)).read_bytes() == (tmp_path / "data" / str(number)).read_bytes()
        kept = [number for number in range(10) if cached_bytes(mountpoint / str(number)) == size]
    if promote == "never":
        assert kept == []
    else:
        assert 3 <= len(kept) <= 5
        assert (9 in kept) == (promote == "always") and (promote == "always" or 0 in kept), kept


@pytest.mark.parametrize("mode", ["no-open", "cached"])
def test_in_no_open_mode_nobody_is_asked_for_what_the_kernel_has(tmp_path: Path, mode: str) -> None:
    """Not even a server that has stopped."""
    known = ["--attr-timeout", "1h", "--entry-timeout", "1h"]
    with up(tmp_path, "--open-mode", mode, *known) as (mountpoint, process):
        assert process.facts["open_mode"] == mode
        command = ["cat", str(mountpoint / "file")]
        for _ in range(2):
            assert subprocess.run(command, capture_output=True, timeout=30).stdout == b"content"
        pid = child_of(process, "mount")
        os.kill(pid, signal.SIGSTOP)
        try:
            with subprocess.Popen(command, stdout=subprocess.PIPE) as reader:
                if mode == "no-open":
                    assert reader.communicate(timeout=30)[0] == b"content"
                else:
                    with pytest.raises(subprocess.TimeoutExpired):
                        reader.wait(1)
                    reader.kill()
        finally:
            os.kill(pid, signal.SIGCONT)


@pytest.mark.parametrize(("timeout", "seen"), [("0", True), ("1h", False)])
def test_a_name_that_was_missing_is_missing_for_its_timeout(tmp_path: Path, timeout: str, seen: bool) -> None:
    with up(tmp_path, "--sync-interval", "0", "--negative-timeout", timeout) as (mountpoint, _):
        assert not (mountpoint / "late").exists()
        (tmp_path / "data" / "late").write_bytes(b"here")
        assert (mountpoint / "late").exists() == seen


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--open-mode", "pasthrough"], "'pasthrough' is not one of 'auto', 'passthrough', 'cached', 'no-open'"),
        # Up to what the kernel is set to, which another test changes.
        (["--max-read", "1K"], "--max-read: 1024 is not accepted; expected 4096 to "),
        (["--max-read", "1T"], " bytes; the sysctl fs.fuse.max_pages_limit sets the limit"),
        (["--max-read", "lots"], "expected a size such as"),
        (["--read-ahead", "2T"], "'2T' is not accepted; expected 0, or 4K to 1T"),
        (["--read-ahead", "1"], "'1' is not accepted; expected 0, or 4K to 1T"),
        (["--read-ahead", "4095"], "'4095' is not accepted; expected 0, or 4K to 1T"),
        (["--open-wait", "2G"], "'2G' is not accepted; expected 0 to 1G: "),
        (["--threads", "0"], "0 is not in the range 1<=x<=1024"),
        (["--max-background", "70000"], "is not in the range 1<=x<=65535"),
        (["--attr-timeout", "soon"], "expected a duration such as"),
        (["--entry-timeout", "400d"], "expected 0 to 365d"),
        (["--negative-timeout", "-1"], "expected a duration such as"),
        (["--umask", "8"], "expected an octal number from 000 to 777"),
        (["--umask", "1777"], "expected an octal number from 000 to 777"),
        (["--uid", "-2"], "is not in the range"),
        (["--gid", "nobody"], "is not a valid integer range"),
        (["--profile", "trainig"], "is not 'training'"),
        (["--promote", "sometimes"], "is not one of 'always', 'if-space', 'never'"),
        (["--driver", "libfuse"], "'libfuse' is not one of 'kernel', 'pyfuse3'"),
        (["--open-mode", "no-open", "--driver", "pyfuse3"], "'no-open' is not accepted; expected auto or cached"),
        (["--open-mode", "passthrough", "--driver", "pyfuse3"], "expected auto or cached with the driver pyfuse3"),
        (["--max-background", "9", "--driver", "pyfuse3"], "9 is not accepted; expected its default, 64, with"),
        (["--open-wait", "1M", "--driver", "pyfuse3"], "1048576 is not accepted; expected its default"),
    ],
)
def test_wrong_values_are_told_before_anything_starts(tmp_path: Path, flags: list[str], said: str) -> None:
    with mountpoint_below(tmp_path) as mountpoint:
        command = [sys.executable, "-m", "cachefs", "up", tmp_path.as_uri(), str(mountpoint), *flags]
        environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode != 0
    assert flags[0] in done.stderr and said in done.stderr, done.stderr


def test_pyfuse3_that_is_not_installed(tmp_path: Path) -> None:
    """One line says which, and what installs it."""
    broken = tmp_path / "packages" / "pyfuse3.py"
    broken.parent.mkdir()
    broken.write_text("raise ImportError('libfuse3.so.3: cannot open shared object file')")
    with mountpoint_below(tmp_path) as mountpoint:
        command = [sys.executable, "-m", "cachefs", "up", tmp_path.as_uri(), str(mountpoint), "--driver", "pyfuse3"]
        environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(broken.parent)}
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1 and line.startswith(
        "Error: --driver: 'pyfuse3' is not accepted; expected kernel, until"
    )
    for said in ("apt-get install fuse3 libfuse3-dev", "pip install 'cachefs[pyfuse3]'", "libfuse3.so.3: cannot open"):
        assert said in line
