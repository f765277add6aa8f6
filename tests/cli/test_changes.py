"""The mount, read by several processes while objects change underneath, on a real S3 server.

Every 4 KiB of every file state their file, version, size and offset, so a reader knows by itself whether what it got is
of one version, at the right place and complete. Allowed: the old content as a whole, the new one, or an error. Never a
mixture within one open, a wrong offset, zeros, or an end before the end.
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from cachefs.fuse import Driver, probe
from cachefs.testing.faulty_s3 import FaultyS3, running_faulty_s3
from cachefs.testing.fixtures import Bucket
from cachefs.testing.processes import Running, mountpoint_below, running
from cachefs.worker import WorkerConfig

pytestmark = pytest.mark.skipif(not probe().can_mount, reason="needs root and /dev/fuse")

PAGE = 64 * 1024
OPEN_WAIT = 3 * PAGE
"""What is larger is read in cached mode."""

# The same text runs here, to write, and in the readers, to check.
FORMAT = '''
import struct

RECORD = struct.Struct("<16sIIQQ24x")


def content(name, version, size):
    """Blocks of 4 KiB, each 64 times its own record."""
    blocks = (RECORD.pack(name.encode(), version, 0xCAC4EF5, size, at) * 64 for at in range(0, size, 4096))
    return b"".join(blocks)[:size]


def check(name, data, offset, seen):
    """None, or what is wrong with `data`, found at `offset` (a multiple of 4096). `seen`: (version, size) of this open.
    """
    for start in range(0, len(data), 4096):
        block = bytes(data[start : start + 4096])
        if len(block) < RECORD.size:
            head = None
        else:
            head = RECORD.unpack_from(block)
            if head[0].rstrip(bytes(1)) != name.encode() or head[2] != 0xCAC4EF5:
                return f"{name} at {offset + start}: not of this file: {block[:32]!r}"
            seen.add((head[1], head[3]))
            if head[4] != offset + start:
                return f"{name} at {offset + start}: bytes of offset {head[4]}, version {head[1]}"
        if len(seen) > 1:
            return f"{name} at {offset + start}: versions mixed within one open: {seen}"
        if seen:
            (version, size), = seen
            whole = RECORD.pack(name.encode(), version, 0xCAC4EF5, size, offset + start) * 64
            if block != whole[: min(4096, size - offset - start)]:
                return f"{name} at {offset + start}: {len(block)} bytes, damaged or cut, version {version} of {size}"
    return None
'''

# Reads one file after the other until the time is over; prints what it found.
READER = (
    FORMAT
    + '''
import collections, errno, json, mmap, os, random, signal, sys, time

root, names, how, seed, seconds = json.loads(sys.argv[1])
rng = random.Random(seed)
found = collections.Counter()
wrong = []
ALLOWED = {errno.ESTALE, errno.EIO, errno.ENOENT}


def read_one(name, fd):
    seen = set()
    size = os.fstat(fd).st_size
    if how == "read":
        at = 0
        while data := os.read(fd, rng.choice([4096, 16384, 65536, 1 << 20])):
            problem = check(name, data, at, seen)
            if problem:
                return problem
            at += len(data)
            if at % 4096 and at != size:
                return f"{name}: a read ended at {at} of {size}"
            if rng.random() < 0.1:
                time.sleep(0.002)
        if at != size:
            return f"{name}: ended at {at} of {size}, {seen}"
    elif how == "pread":
        for _ in range(20):
            at = 4096 * rng.randrange(max(1, -(-size // 4096)))
            wanted = rng.choice([4096, 40960, 1 << 17])
            end = min(size, at + wanted)
            while at < end:
                # Short before an error, which the next one tells; never short for good.
                data = os.pread(fd, end - at, at)
                if not data:
                    return f"{name}: nothing at {at} of {size}"
                problem = check(name, data, at, seen)
                if problem:
                    return problem
                at += len(data)
                if at % 4096 and at != end:
                    return f"{name}: a read ended at {at} of {size}"
    elif size:
        with mmap.mmap(fd, size, prot=mmap.PROT_READ) as data:
            for _ in range(20):
                at = 4096 * rng.randrange(-(-size // 4096))
                problem = check(name, data[at : at + 8192], at, seen)
                if problem:
                    return problem
    if seen and {each[1] for each in seen} != {size}:
        return f"{name}: size {size} told of {seen}"
    return None


def child(name):
    """0: fine, 1: wrong, 2: an allowed error."""
    try:
        fd = os.open(os.path.join(root, name), os.O_RDONLY)
        problem = read_one(name, fd)
    except OSError as error:
        if error.errno in ALLOWED:
            return 2
        problem = f"{name}: {error}"
    if problem:
        os.write(1, (json.dumps(problem) + "\\n").encode())
        return 1
    return 0


end = time.monotonic() + seconds
patience = end + 60
# On a busy machine nothing may have been read whole by then.
while (time.monotonic() < end or (not found["fine"] and time.monotonic() < patience)) and len(wrong) < 5:
    name = rng.choice(names)
    if how == "list":
        for entry in os.listdir(root):
            try:
                os.stat(os.path.join(root, entry))
                found["fine"] += 1
            except OSError as error:
                found[errno.errorcode[error.errno]] += 1
                if error.errno not in ALLOWED:
                    wrong.append(f"listing: {error}")
        continue
    if how == "mmap":
        # A page that cannot be had any more is a SIGBUS: in a child.
        pid = os.fork()
        if pid == 0:
            os._exit(child(name))
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        found[{0: "fine", 1: "wrong", 2: "error"}.get(status, str(status))] += 1
        if status not in (0, 2, -signal.SIGBUS):
            wrong.append(f"{name}: mmap reader ended with {status}")
        continue
    try:
        fd = os.open(os.path.join(root, name), os.O_RDONLY)
        try:
            problem = read_one(name, fd)
        finally:
            os.close(fd)
        found["fine"] += 1
        if problem:
            wrong.append(problem)
    except OSError as error:
        found[errno.errorcode[error.errno]] += 1
        if error.errno not in ALLOWED:
            wrong.append(f"{name}: {error}")
print(json.dumps([found, wrong]))
'''
)

# Does one thing per line it is told, and says what came of it.
STEPPER = (
    FORMAT
    + """
import errno, json, mmap, os, sys

files = {}


def step(what, name, *arguments):
    if what == "open":
        files[name] = (os.open(arguments[0], os.O_RDONLY), set())
        return os.fstat(files[name][0]).st_size
    fd, seen = files[name]
    if what == "close":
        os.close(files.pop(name)[0])
        return None
    offset, length = arguments
    data = os.pread(fd, length, offset)
    problem = check(name, data, offset, seen)
    return problem or [sorted(seen)[0][0] if seen else None, len(data)]


for line in sys.stdin:
    try:
        answer = step(*json.loads(line))
    except OSError as error:
        answer = errno.errorcode[error.errno]
    print(json.dumps(answer), flush=True)
"""
)

format_: dict[str, Any] = {}
exec(FORMAT, format_)


def content(name: str, version: int, size: int) -> bytes:
    made: bytes = format_["content"](name, version, size)
    return made


@contextmanager
def up(bucket: Bucket, directory: Path, *flags: str, faulty: FaultyS3 | None = None) -> Iterator[tuple[Path, Running]]:
    options = {**bucket.options, **({"endpoint_url": faulty.endpoint} if faulty else {})}
    with mountpoint_below(directory) as mountpoint:
        arguments = [bucket.url, mountpoint, "--state-dir", directory / "state", *flags]
        tier = ["--tier", f"ssd:{directory / 'tier'}:1G", "--page-size", "64K", "--read-ahead", "128K"]
        environment = {"CACHEFS_UFS_OPTIONS": json.dumps(options)}
        with running("up", *arguments, *tier, environment=environment) as process:
            yield mountpoint, process


class Stepper:
    """A reader in a process of its own that does what it is told, one thing after the other."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._process = subprocess.Popen(
            [sys.executable, "-c", STEPPER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __call__(self, what: str, name: str, *arguments: object) -> Any:
        if what == "open":
            arguments = (str(self._root / name),)
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps([what, name, *arguments]) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def end(self) -> None:
        self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
        self._process.wait()


@contextmanager
def stepper(root: Path) -> Iterator[Stepper]:
    it = Stepper(root)
    try:
        yield it
    finally:
        it.end()


def put_one(bucket: Bucket, name: str, body: bytes) -> None:
    """By the client that is there: to make one takes longer than to put a hundred objects."""
    bucket.client.put_object(Bucket=bucket.name, Key=bucket.prefix + name, Body=body)


@contextmanager
def server(bucket: Bucket, *, if_match: bool) -> Iterator[FaultyS3 | None]:
    if if_match:
        yield None
        return
    with running_faulty_s3(bucket.server.endpoint) as faulty:
        faulty.ignores_if_match = (bucket.server.key, bucket.server.secret)
        yield faulty


@pytest.mark.parametrize("if_match", [True, False])
def test_a_change_at_every_moment_of_a_read(s3_bucket: Bucket, tmp_path: Path, if_match: bool) -> None:
    sizes = {"same": 20 * PAGE, "longer": 20 * PAGE, "shorter": 20 * PAGE, "gone": 20 * PAGE}
    s3_bucket.put({name: content(name, 1, size) for name, size in sizes.items()})
    s3_bucket.put({f"small-{name}": content(f"small-{name}", 1, 2 * PAGE) for name in sizes})
    changed: dict[str, int | None] = {"same": 20 * PAGE, "longer": 30 * PAGE, "shorter": 3 * PAGE, "gone": None}

    def change() -> None:
        for name, size in changed.items():
            if size is None:
                s3_bucket.delete(name, f"small-{name}")
            else:
                put_one(s3_bucket, name, content(name, 2, size))
                put_one(s3_bucket, f"small-{name}", content(f"small-{name}", 2, size // 10))

    with (
        server(s3_bucket, if_match=if_match) as faulty,
        up(s3_bucket, tmp_path, "--sync-interval", "1h", "--open-wait", str(OPEN_WAIT), faulty=faulty) as (root, _),
        stepper(root) as step,
        stepper(root) as other,
    ):
        for name in sizes:
            assert step("open", name) == 20 * PAGE
            # Between open and read, between two pages, and of what was read already.
            assert step("pread", name, 0, 4096) == [1, 4096]
            assert other("open", name) == 20 * PAGE
            assert step("open", f"small-{name}") == 2 * PAGE
        change()
        for name, size in changed.items():
            assert step("pread", name, 0, 4096) == [1, 4096], name
            assert step("pread", name, 15 * PAGE, 4096) in ("ESTALE", "EIO"), name
            assert other("pread", name, 15 * PAGE, 4096) in ("ESTALE", "EIO"), name
            # Small files are local since their open.
            small = f"small-{name}"
            assert step("pread", small, PAGE, 4096) == [1, 4096], name
            # Opened again by anybody, it is what there is now.
            assert other("close", name) is None
            if size is None:
                assert other("open", name) == "ENOENT"
            else:
                assert other("open", name) == size, name
                assert other("pread", name, size - 4096, 4096) == [2, 4096], name
                assert other("pread", name, 0, 4096) == [2, 4096], name
            # And who had the old one open goes on with it.
            assert step("pread", name, 0, 4096) == [1, 4096], name


SMALL = [f"small{number}" for number in range(6)]
LARGE = [f"large{number}" for number in range(4)]


@pytest.mark.parametrize(
    ("sync_interval", "if_match", "seed", "driver"),
    [
        ("0", True, 1, Driver.KERNEL),
        ("1s", False, 2, Driver.KERNEL),
        ("1h", True, 3, Driver.KERNEL),
        ("0", True, 1, Driver.PYFUSE3),
        ("1h", False, 4, Driver.PYFUSE3),
    ],
    indirect=["driver"],
)
def test_readers_while_objects_change(
    s3_bucket: Bucket, tmp_path: Path, sync_interval: str, if_match: bool, seed: int, driver: Driver
) -> None:
    rng = random.Random(seed)
    versions = dict.fromkeys([*SMALL, *LARGE], 0)

    def size_of(name: str) -> int:
        pages = rng.choice([1, 2, 3]) if name in SMALL else rng.choice([8, 12, 16])
        return pages * PAGE - rng.choice([0, 4096, 777])

    def put(name: str, size: int) -> None:
        versions[name] += 1
        put_one(s3_bucket, name, content(name, versions[name], size))

    sizes = {name: size_of(name) for name in versions}
    for name, size in sizes.items():
        put(name, size)
    seconds = 1.5
    with ExitStack() as stack:
        faulty = stack.enter_context(server(s3_bucket, if_match=if_match))
        flags = ["--sync-interval", sync_interval, "--driver", driver.value]
        flags += ["--open-wait", str(OPEN_WAIT)] if driver is Driver.KERNEL else []
        root, _ = stack.enter_context(up(s3_bucket, tmp_path, *flags, faulty=faulty))
        readers = []
        for how in ("read", "pread", "mmap", "list"):
            arguments = json.dumps([str(root), [*SMALL, *LARGE], how, seed, seconds])
            readers.append(
                (how, subprocess.Popen([sys.executable, "-c", READER, arguments], stdout=subprocess.PIPE, text=True))
            )
        changes = 0
        end = time.monotonic() + seconds
        while time.monotonic() < end or changes <= 10:
            name = rng.choice([*SMALL, *LARGE])
            what = rng.choice(["same size", "other size", "other size", "shorter", "delete"])
            if what == "delete":
                s3_bucket.delete(name)
            else:
                if what == "other size":
                    sizes[name] = size_of(name)
                elif what == "shorter":
                    sizes[name] = max(4096, sizes[name] // 2)
                put(name, sizes[name])
            changes += 1
            time.sleep(rng.choice([0.0, 0.01, 0.05]))
        outputs = {how: reader.communicate(timeout=120)[0] for how, reader in readers}
    for how, output in outputs.items():
        *problems, last = output.splitlines()
        found, wrong = json.loads(last)
        assert not problems and not wrong, f"seed {seed}, {changes} changes, {how}: {problems} {wrong}"
        assert found.get("fine", 0) > 0, f"seed {seed}, {changes} changes, {how}: {found}"


def test_the_check_sees_what_it_must() -> None:
    old, new = content("name", 1, 3 * 4096 + 100), content("name", 2, 3 * 4096 + 100)
    check = format_["check"]
    assert check("name", old, 0, set()) is None
    assert check("name", old[4096:], 4096, set()) is None
    assert "mixed" in check("name", old[:8192] + new[8192:], 0, set())
    assert "offset 4096" in check("name", old[4096:8192], 0, set())
    assert "not of this file" in check("name", old[:4096] + bytes(4096) + old[8192:], 0, set())
    assert "not of this file" in check("name", content("other", 1, 4096), 0, set())
    assert "damaged" in check("name", old[:5000] + b"!" + old[5001:], 0, set())
    assert "cut" in check("name", old[:-50], 0, set())
    assert "mixed" in check("name", content("name", 1, 4096), 0, {(1, 8192)})


def test_killed_readers_of_a_stalled_store_free_what_they_hold(s3_bucket: Bucket, tmp_path: Path) -> None:
    """As many as the worker fetches for at once, all waiting in open(2). They die at once, and the next one is served
    though the store goes on stalling those."""
    slots = WorkerConfig.demand_slots
    s3_bucket.put({f"cold/{number}": content("cold", 1, PAGE) for number in range(slots)})
    s3_bucket.put({"warm": content("warm", 1, PAGE), "other": content("other", 1, PAGE)})
    with running_faulty_s3(s3_bucket.server.endpoint) as faulty:
        # Ended by the kill, not by a time-out of the socket.
        slow = ["--ufs-option", "read_timeout=600", "--ufs-option", "deadline=600"]
        with up(s3_bucket, tmp_path, *slow, faulty=faulty) as (root, process):
            assert subprocess.run(["cat", root / "warm"], capture_output=True).stdout == content("warm", 1, PAGE)
            assert subprocess.run(["ls", root / "cold"], capture_output=True).stdout
            faulty.inject("stall", part="cold/", times=1000)
            readers = [
                subprocess.Popen(["cat", root / "cold" / str(number)], stdout=subprocess.DEVNULL)
                for number in range(slots)
            ]
            deadline = time.monotonic() + 60
            while (
                sum(method == "GET" and "cold/" in path and "list-type" not in path for method, path in faulty.requests)
                < slots
            ):
                assert time.monotonic() < deadline
                time.sleep(0.02)
            for reader in readers:
                reader.kill()
            for reader in readers:
                assert reader.wait(30) == -signal.SIGKILL
            done = subprocess.run(["cat", root / "other"], capture_output=True, timeout=60)
            assert done.stdout == content("other", 1, PAGE)
            # Nothing is left of them: the same files are read once the store answers.
            faulty.release()
            for number in (0, slots - 1):
                done = subprocess.run(["cat", root / "cold" / str(number)], capture_output=True, timeout=60)
                assert done.stdout == content("cold", 1, PAGE)
            assert process.end() == 0
