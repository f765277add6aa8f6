"""The first bad days a person meets, by the real command: one line says what is wrong, soon, and nothing is left."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from cachefs.cli.instances import runtime_root
from cachefs.fuse import find_mount, probe
from cachefs.meta import open_meta_store
from cachefs.testing.fixtures import Bucket
from cachefs.testing.processes import mountpoint_below, running

pytestmark = pytest.mark.skipif(not probe().can_mount, reason="needs root and /dev/fuse")

SOON_S = 45.0
"""A person waits 15 s at most on an idle machine; this one may be busy, with four of them at once. What is not given up
takes minutes, or for ever.
"""
HANGS_S = 90.0


class Attempt:
    """A `cachefs up` that must fail."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.data = directory / "data"
        self.data.mkdir()
        (self.data / "file").write_bytes(b"content")
        self.mountpoint = directory / "mnt"
        self.mountpoint.mkdir()
        self.url = self.data.as_uri()
        self.tier = f"ssd:{directory / 'tier'}:100M"
        self.state = directory / "state"
        self.options: dict[str, str] = {}
        self.flags: tuple[str, ...] = ()
        self.prefix: tuple[str, ...] = ()

    def fails(self, *expected: str) -> str:
        """Start, and check that it ends with one line of error that has these texts, and leaves nothing."""
        arguments = [self.url, str(self.mountpoint), "--state-dir", str(self.state), "--tier", self.tier, *self.flags]
        mounted_before = find_mount(self.mountpoint)
        began_s = time.monotonic()
        process = subprocess.Popen(
            [*self.prefix, sys.executable, "-m", "cachefs", "up", *arguments, "--log-level", "WARNING"],
            env={**os.environ, "CACHEFS_UFS_OPTIONS": json.dumps(self.options)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        output, errors = process.communicate(timeout=HANGS_S)
        took_s = time.monotonic() - began_s
        assert process.returncode == 1, output + errors
        lines = errors.splitlines()
        assert len(lines) == 1 and lines[0].startswith("Error: "), errors
        for text in expected:
            assert text in lines[0]
        assert "Traceback" not in output
        assert took_s < SOON_S, f"{took_s:.1f} s: {lines[0]}"
        assert find_mount(self.mountpoint) == mounted_before
        parents = subprocess.run(["ps", "-eo", "ppid,sess,args"], capture_output=True, text=True).stdout
        assert not [line for line in parents.splitlines() if str(self.state) in line and "-m cachefs" in line]
        assert not list(Path(runtime_root()).rglob(f"*{process.pid}*"))
        return lines[0]


@pytest.fixture
def attempt(tmp_path: Path) -> Attempt:
    return Attempt(tmp_path)


# ---- the under-store -----------------------------------------------------------------------------------------------


@contextmanager
def black_hole() -> Iterator[str]:
    """An endpoint that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=100) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_no_such_bucket(attempt: Attempt, s3_bucket: Bucket) -> None:
    attempt.url = "s3://no-such-bucket/prefix"
    attempt.options = s3_bucket.options
    attempt.fails("no-such-bucket", "no such bucket", s3_bucket.server.endpoint)


@pytest.mark.parametrize("wrong", [{"secret": "wrong"}, {"key": "nobody", "secret": "wrong"}])
def test_wrong_credentials(attempt: Attempt, s3_bucket: Bucket, wrong: dict[str, str]) -> None:
    attempt.url = s3_bucket.url
    attempt.options = {**s3_bucket.options, **wrong}
    line = attempt.fails(s3_bucket.name, "access denied", s3_bucket.server.endpoint)
    assert "wrong" not in line


@contextmanager
def refusing() -> Iterator[str]:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"


@contextmanager
def speaking_something_else() -> Iterator[str]:
    def speak() -> None:
        with suppress(OSError):
            while True:
                with listener.accept()[0] as connection:
                    connection.sendall(b"SSH-2.0-OpenSSH_9\r\n")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        speaker = threading.Thread(target=speak)
        speaker.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            speaker.join()


def test_endpoints_that_are_of_no_use(tmp_path: Path) -> None:
    """Side by side: each waits for eight seconds, in case it is only slow."""
    with black_hole() as silent, refusing() as closed, speaking_something_else() as other:
        cases = {
            silent: "no answer within 8 s",
            closed: "connect",
            other: "",
            "http://nowhere.invalid": "connect",
        }

        def try_it(number: int, endpoint: str, expected: str) -> None:
            attempt = Attempt(_made(tmp_path / str(number)))
            attempt.url = "s3://bucket"
            attempt.options = {"endpoint_url": endpoint, "key": "key", "secret": "secret"}
            attempt.fails(f"{endpoint}/bucket", expected)

        with ThreadPoolExecutor() as pool:
            tries = [pool.submit(try_it, number, *case) for number, case in enumerate(cases.items())]
            for each in tries:
                each.result()


def test_a_directory_that_does_not_exist(attempt: Attempt) -> None:
    attempt.url = (attempt.directory / "nowhere").as_uri()
    attempt.fails("nowhere", "No such file")


@pytest.mark.parametrize(("url", "accepted"), [("gopher://host/x", "s3, s3a"), ("bucket", "s3://BUCKET")])
def test_a_url_that_is_none(attempt: Attempt, url: str, accepted: str) -> None:
    attempt.url = url
    attempt.fails("URL", url, accepted)


# ---- the mountpoint ------------------------------------------------------------------------------------------------


def test_a_mountpoint_that_does_not_exist(attempt: Attempt) -> None:
    attempt.mountpoint = attempt.directory / "nowhere"
    attempt.fails("MOUNTPOINT", str(attempt.mountpoint), "existing directory")
    assert not attempt.mountpoint.exists()


def test_a_mountpoint_that_is_a_file(attempt: Attempt) -> None:
    attempt.mountpoint = attempt.data / "file"
    attempt.fails("MOUNTPOINT", str(attempt.mountpoint), "existing directory")


def test_a_mountpoint_with_something_in_it(attempt: Attempt) -> None:
    (attempt.mountpoint / "precious").touch()
    attempt.fails("MOUNTPOINT", str(attempt.mountpoint), "empty directory", "--allow-nonempty")
    assert os.listdir(attempt.mountpoint) == ["precious"]


def test_a_mountpoint_that_is_mounted_already_and_a_tier_that_is_in_use(attempt: Attempt) -> None:
    """And what runs goes on."""
    with mountpoint_below(_made(attempt.directory / "other")) as mounted:
        arguments = [attempt.url, mounted, "--state-dir", attempt.directory / "state2", "--tier", attempt.tier]
        with running("up", *arguments):
            attempt.fails("tier", "owned by another worker that is running")
            attempt.mountpoint = mounted
            attempt.fails("MOUNTPOINT", "no cachefs is mounted on")
            read = subprocess.run(["cat", mounted / "file"], capture_output=True, timeout=60)
            assert read.stdout == b"content"


@pytest.mark.parametrize(("path", "said"), [("/nowhere", "no such file"), ("/file", "ot a directory")])
def test_a_path_that_cannot_be_mounted(attempt: Attempt, path: str, said: str) -> None:
    """Only the third process can know."""
    attempt.flags = ("--path", path)
    attempt.fails(path, said)


def test_a_mountpoint_that_another_file_system_is_mounted_on(attempt: Attempt) -> None:
    """Is a directory like any other, and is there again afterwards."""
    subprocess.run(["mount", "-t", "tmpfs", "none", attempt.mountpoint], check=True)
    try:
        under = find_mount(attempt.mountpoint)
        with running("up", attempt.url, attempt.mountpoint, "--state-dir", attempt.state, "--tier", attempt.tier):
            read = subprocess.run(["cat", attempt.mountpoint / "file"], capture_output=True, timeout=60)
            assert read.stdout == b"content"
        assert find_mount(attempt.mountpoint) == under
        (attempt.mountpoint / "precious").touch()
        attempt.fails("MOUNTPOINT", str(attempt.mountpoint), "empty directory")
    finally:
        subprocess.run(["umount", attempt.mountpoint], check=True)


@pytest.mark.parametrize("case", ["the same", "by a link", "in the store", "hides the store"])
def test_a_mountpoint_and_a_store_that_overlap(attempt: Attempt, case: str) -> None:
    """Everything would hang: the master waits for the mount, and the mount for the master."""
    empty = _made(attempt.data / "empty")
    attempt.mountpoint = attempt.data
    if case == "by a link":
        attempt.mountpoint = attempt.directory / "link"
        attempt.mountpoint.symlink_to(attempt.data)
    elif case == "in the store":
        attempt.mountpoint = empty
    elif case == "hides the store":
        attempt.url = empty.as_uri()
    how = {"in the store": "lies in", "hides the store": "would hide"}.get(case, "is")
    for flags in ((), ("--allow-nonempty",)):
        attempt.flags = flags
        attempt.fails("MOUNTPOINT", "apart from URL", f"it {how} ", "would wait for the mount itself")
    assert not attempt.state.exists()


def test_an_empty_store_as_the_mountpoint(attempt: Attempt) -> None:
    attempt.url = attempt.mountpoint.as_uri()
    attempt.fails("MOUNTPOINT", "apart from URL", "it is ")


@pytest.mark.parametrize("what", ["tier", "state"])
@pytest.mark.parametrize("below", [True, False])
def test_a_mountpoint_that_overlaps_with_what_is_kept(attempt: Attempt, what: str, below: bool) -> None:
    attempt.flags = ("--allow-nonempty",)
    place = attempt.mountpoint / "kept" if below else attempt.directory / "kept"
    if not below:
        attempt.mountpoint = _made(_made(place) / "inside")
    if what == "tier":
        attempt.tier = f"ssd:{place}:100M"
    else:
        attempt.state = place
    attempt.fails("MOUNTPOINT", "apart from --", "it would hide " if below else "it lies in ", str(place))
    assert not os.listdir(attempt.mountpoint)


def test_a_mount_over_the_tier_of_its_worker(attempt: Attempt) -> None:
    with mountpoint_below(_made(attempt.directory / "other")) as mounted:
        arguments = [attempt.url, mounted, "--state-dir", attempt.state, "--tier", attempt.tier]
        with running("up", *arguments) as up:
            tier = attempt.directory / "tier"
            for mountpoint in (attempt.directory, tier, _made(tier / "inside")):
                command = ["mount", mountpoint, "--master", up.facts["master"], "--insecure", "--allow-nonempty"]
                done = subprocess.run(
                    [sys.executable, "-m", "cachefs", *command], capture_output=True, text=True, timeout=HANGS_S
                )
                assert done.returncode == 1 and "apart from the worker's tier" in done.stderr, done.stderr
                assert "Traceback" not in done.stderr and find_mount(mountpoint) is None
            read = subprocess.run(["cat", mounted / "file"], capture_output=True, timeout=60)
            assert read.stdout == b"content"


def _made(directory: Path) -> Path:
    directory.mkdir()
    return directory


# ---- the machine ---------------------------------------------------------------------------------------------------
# Without root: see test_without_root.py. A kernel without passthrough is none of these: see test_tunables.py.


def test_a_machine_without_the_device(attempt: Attempt) -> None:
    attempt.prefix = ("unshare", "-m", "sh", "-c", 'mount -t tmpfs none /dev && exec "$@"', "sh")
    attempt.fails("/dev/fuse", "this machine has no FUSE; load the kernel module fuse")


def test_root_that_may_not_mount(attempt: Attempt) -> None:
    """As in a container that was not given the capability: fusermount3 could not have it either."""
    attempt.prefix = ("setpriv", "--inh-caps", "-sys_admin", "--bounding-set", "-sys_admin")
    attempt.fails("user", "mounting needs root (CAP_SYS_ADMIN)")


def test_a_kernel_without_passthrough_that_must_have_it(attempt: Attempt) -> None:
    attempt.flags = ("--ignore-kernel-feature", "passthrough", "--open-mode", "passthrough")
    attempt.fails("--open-mode: 'passthrough'", "auto or cached here", "the kernel does not offer passthrough")


# ---- the tier ------------------------------------------------------------------------------------------------------


def test_a_tier_whose_parent_is_a_file(attempt: Attempt) -> None:
    attempt.tier = f"ssd:{attempt.data / 'file' / 'tier'}:100M"
    attempt.fails("tier", str(attempt.data / "file"), "Not a directory")


def test_a_tier_that_is_a_file(attempt: Attempt) -> None:
    attempt.tier = f"ssd:{attempt.data / 'file'}:100M"
    attempt.fails("tier", str(attempt.data / "file"))
    assert (attempt.data / "file").read_bytes() == b"content"


def test_a_tier_where_nothing_can_be_made(attempt: Attempt) -> None:
    attempt.tier = "ssd:/proc/cachefs/tier:100M"
    attempt.fails("tier /proc/cachefs/tier")


@pytest.mark.parametrize("what", ["tier", "state"])
def test_a_read_only_file_system(attempt: Attempt, what: str) -> None:
    read_only = attempt.directory / "ro"
    read_only.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "none", read_only], check=True)
    try:
        if what == "tier":
            attempt.tier = f"ssd:{read_only / 'tier'}:100M"
        else:
            attempt.state = read_only / "state"
        attempt.fails(str(read_only), "Read-only file system")
    finally:
        subprocess.run(["umount", read_only], check=True)


def test_a_tier_of_another_cluster(attempt: Attempt) -> None:
    tier = _made(attempt.directory / "tier")
    content = json.dumps({"format": 1, "cluster_id": "theirs", "boot_id": "x"})
    (tier / "tier.json").write_text(content)
    attempt.fails(str(tier), "belongs to cluster 'theirs'")
    assert os.listdir(tier) == ["tier.json"] and (tier / "tier.json").read_text() == content


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "damaged"),
        (b'{"for', "damaged"),
        (b"\xff\xfe" * 100, "damaged"),
        (b'{"format": 99, "cluster_id": "cachefs", "boot_id": "x"}', "format 99"),
    ],
)
def test_a_tier_file_that_is_damaged_or_newer(attempt: Attempt, content: bytes, expected: str) -> None:
    tier = _made(attempt.directory / "tier")
    (tier / "tier.json").write_bytes(content)
    attempt.fails(str(tier / "tier.json"), expected)
    assert os.listdir(tier) == ["tier.json"] and (tier / "tier.json").read_bytes() == content


@pytest.mark.parametrize(
    "tier",
    [
        *("hdd:/x:1G", "SSD:/x:1G", ":/x:1G", "ssd", "ssd:/x", "ssd:x:1G", "ssd::1G", "/x:1G", ""),
        *("ssd:/x:0", "ssd:/x:-1G", "ssd:/x:lots", "ssd:/x:"),
    ],
)
def test_a_tier_that_is_none(attempt: Attempt, tier: str) -> None:
    arguments = [attempt.url, str(attempt.mountpoint), "--state-dir", str(attempt.state), "--tier", tier]
    done = subprocess.run(
        [sys.executable, "-m", "cachefs", "up", *arguments], capture_output=True, text=True, timeout=HANGS_S
    )
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("Error: ")
    assert "'--tier'" in done.stderr and repr(tier) in done.stderr and "KIND:PATH:CAPACITY" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_tier_that_could_not_hold_anything(attempt: Attempt) -> None:
    attempt.tier = f"ssd:{attempt.directory / 'tier'}:1M"
    attempt.fails("--tier", f"{attempt.directory / 'tier'}", "at least 32.0 MiB")


def test_a_mem_tier_on_a_disk(attempt: Attempt) -> None:
    if os.statvfs(attempt.directory).f_fsid == os.statvfs("/dev/shm").f_fsid:
        pytest.skip("temporary files are on tmpfs")
    attempt.tier = f"mem:{attempt.directory / 'tier'}:100M"
    attempt.fails("--tier", "tmpfs")


def test_a_namespace_that_another_master_uses(attempt: Attempt) -> None:
    data_dir = attempt.state / "master"
    flags = ["--listen", "127.0.0.1:0", "--mount", f"/={attempt.url}", "--insecure"]
    # Under another name, so that this master is not taken for something that was left behind.
    other = _made(attempt.directory / "link") / "state"
    other.symlink_to(attempt.state)
    with running("master", "--data-dir", data_dir, *flags):
        attempt.state = other
        attempt.fails("--data-dir", "no running master uses")


# ---- the namespace -------------------------------------------------------------------------------------------------


def _garbage(path: Path) -> None:
    path.write_bytes(os.urandom(20_000))


def _truncated(path: Path) -> None:
    with open_meta_store(str(path.parent)):
        pass
    os.truncate(path, path.stat().st_size // 2)


def _foreign(path: Path) -> None:
    database = sqlite3.connect(path)
    database.execute("CREATE TABLE photos (name TEXT)")
    database.commit()
    database.close()


def _newer(path: Path) -> None:
    with open_meta_store(str(path.parent)):
        pass
    database = sqlite3.connect(path)
    database.execute("PRAGMA user_version = 99")
    database.commit()
    database.close()


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (_garbage, "not a database"),
        (_truncated, "malformed"),
        (_foreign, "something else"),
        (_newer, "schema 99"),
        (Path.mkdir, "unable to open"),
    ],
)
def test_a_namespace_that_is_none(attempt: Attempt, make: Callable[[Path], None], expected: str) -> None:
    path = attempt.state / "master" / "namespace.db"
    path.parent.mkdir(parents=True)
    make(path)
    before = _digest(path)
    attempt.fails(str(path), expected)
    assert _digest(path) == before and set(os.listdir(path.parent)) <= {path.name}


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
