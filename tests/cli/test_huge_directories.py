"""A directory of very many objects, through all processes and a real mount: complete, bounded, and in nobody's way.

The same is done for 20,000 objects in every run, and for a million in `make test-all`, with the same bounds.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from cachefs.fuse import probe
from cachefs.model import MiB
from cachefs.testing.huge_s3 import HugeS3, name, running_huge_s3, size
from cachefs.testing.processes import Running, mountpoint_below, running

pytestmark = pytest.mark.skipif(not probe().can_mount, reason="needs root and /dev/fuse")

counts = pytest.mark.parametrize(
    "count", [pytest.param(20_000, id="20k"), pytest.param(1_000_000, id="1M", marks=pytest.mark.slow)]
)
MOST_GROWTH = {"master": 256 * MiB, "mount": 640 * MiB}
"""The mount remembers 500,000 names, of a kilobyte each; the master has caches of SQLite."""
MOST_WAL = 64 * MiB


class Scene:
    """The three processes, one by one."""

    def __init__(self, directory: Path, store: HugeS3, stack: ExitStack) -> None:
        self.directory = directory
        self.store = store
        self._stack = stack
        self._listen = "127.0.0.1:0"
        self.start_master()
        where, socket = ["--master", self._listen, "--insecure"], directory / "socket"
        tier = f"ssd:{directory / 'tier'}:1G"
        stack.enter_context(running("worker", *where, "--listen", "127.0.0.1:0", "--socket", socket, "--tier", tier))
        self.mountpoint = stack.enter_context(mountpoint_below(directory))
        self.mount = stack.enter_context(running("mount", self.mountpoint, *where, "--worker-socket", socket))

    def start_master(self) -> None:
        """On the port it had, if it ran before."""
        namespace = ["--data-dir", self.directory / "master", "--mount", f"/={self.store.url}"]
        environment = {"CACHEFS_UFS_OPTIONS": json.dumps(self.store.ufs_options)}
        master = running("master", *namespace, "--listen", self._listen, "--insecure", environment=environment)
        self.master = self._stack.enter_context(master)
        self._listen = self.master.facts["listen"]

    def cachefs(self, *arguments: str) -> str:
        command = [sys.executable, "-m", "cachefs", *arguments, "--master", self._listen]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def wal_bytes(self) -> int:
        return (self.directory / "master" / "namespace.db-wal").stat().st_size

    def peaks(self) -> dict[str, int]:
        """Bytes of memory that each process had at most."""
        return {"master": peak(self.master), "mount": peak(self.mount)}


def peak(process: Running) -> int:
    status = Path(f"/proc/{process.process.pid}/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) * 1024


@contextmanager
def scene(directory: Path, count: int) -> Iterator[Scene]:
    with running_huge_s3(count) as store, ExitStack() as stack:
        yield Scene(directory, store, stack)


class Seen:
    """Which of the names came, in one byte each."""

    def __init__(self, count: int) -> None:
        self._seen = bytearray(count)

    def add(self, entry: os.DirEntry[str]) -> None:
        number = int(entry.name[1:])
        assert entry.name == name(number) and not self._seen[number], f"{entry.name} came twice"
        self._seen[number] = 1

    @property
    def missing(self) -> int:
        return self._seen.count(0)


@counts
def test_a_huge_directory(tmp_path: Path, count: int) -> None:
    with scene(tmp_path, count) as it:
        directory = it.mountpoint / "dir"
        it.store.hold(5)
        before, most_wal = it.peaks(), 0
        seen = Seen(count)
        with os.scandir(directory) as entries, os.scandir(directory) as stopped:
            first = next(entries)
            seen.add(first)
            next(stopped)
            it.store.wait_held()
            # What came is there, long before the listing ends; so is what nobody has listed yet.
            assert os.stat(directory / first.name).st_size == size(int(first.name[1:]))
            assert os.stat(directory / name(count - 1)).st_size == size(count - 1)
            assert not (directory / "missing").exists()
            assert it.store.pages() == 5
            it.store.release()
            find = ["find", str(directory), "-type", "f", "-printf", "x"]
            with subprocess.Popen(find, stdout=subprocess.PIPE) as other:
                for number, entry in enumerate(entries):
                    seen.add(entry)
                    if number % 5000 == 0:
                        most_wal = max(most_wal, it.wal_bytes())
                        assert not (directory / f"missing-{number}").exists()
                assert other.stdout is not None
                assert sum(len(part) for part in iter(lambda: other.stdout.read(1 << 20), b"")) == count
            assert seen.missing == 0
            assert it.store.pages() == -(-count // 1000), "listed once, for all"
        growth = {role: now - before[role] for role, now in it.peaks().items()}
        print(f"growth={ {role: each // MiB for role, each in growth.items()} } MiB wal={most_wal // MiB} MiB")
        assert all(growth[role] < most for role, most in MOST_GROWTH.items()), growth
        assert most_wal < MOST_WAL


@counts
def test_a_huge_directory_is_looked_at_again(tmp_path: Path, count: int) -> None:
    with scene(tmp_path, count) as it:
        directory = it.mountpoint / "dir"
        inodes = {entry.name: entry.inode() for entry in os.scandir(directory)}
        assert len(inodes) == count
        gone, changed = [3, count // 2, count - 1], [4, count // 2 + 1]
        it.store.change(gone=gone, changed=changed)
        before = it.peaks()
        told = json.loads(it.cachefs("refresh", "/dir", "--json"))
        assert told["changed"] == len(gone) + len(changed)
        growth = {role: now - before[role] for role, now in it.peaks().items()}
        print(
            f"refresh growth={ {role: each // MiB for role, each in growth.items()} } MiB wal={it.wal_bytes() // MiB}"
        )
        assert all(growth[role] < most for role, most in MOST_GROWTH.items()), growth
        for number in gone:
            assert not (directory / name(number)).exists()
        for number in changed:
            assert (directory / name(number)).stat().st_size == size(number) + 1
        after = {entry.name: entry.inode() for entry in os.scandir(directory)}
        assert set(inodes) - set(after) == {name(number) for number in gone}
        assert {each for each, ino in after.items() if ino != inodes[each]} == {name(number) for number in changed}


@counts
def test_the_master_is_killed_while_it_lists(tmp_path: Path, count: int) -> None:
    with scene(tmp_path, count) as it:
        directory = it.mountpoint / "dir"
        it.store.hold(count // 2000)
        seen = Seen(count)
        with os.scandir(directory) as entries:
            known = {}
            for entry in entries:
                known[entry.name] = entry.inode()
                seen.add(entry)
                if len(known) == count // 4:
                    break
            it.store.wait_held()
            it.master.end(signal.SIGKILL)
            it.start_master()
            it.store.release()
            # The reader does not notice.
            for entry in entries:
                seen.add(entry)
            assert seen.missing == 0
        after = {entry.name: entry.inode() for entry in os.scandir(directory)}
        assert len(after) == len(set(after.values())) == count
        assert all(after[each] == ino for each, ino in known.items())
