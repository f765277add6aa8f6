"""Directories larger than what any process may hold of them: real processes, a real mount, keys that are made up.

Each test runs with 20,000 names, and with a million under the marker `slow`; the bounds are the same.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from array import array
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

import pytest
import trio

from cachefs.fuse import probe
from cachefs.model import Attr, Ino, MiB
from cachefs.net import Hello, Peer, open_peer, parse_address
from cachefs.testing.huge_s3 import DIRECTORY, HugeS3, content_of, name_of, running_huge_s3
from cachefs.testing.ports import hold_port, port_of
from cachefs.testing.processes import Running, child_of, mountpoint_below, running
from cachefs.wire.messages import ListDir, Lookup, Refresh, RefreshReply, ResolvePath

pytestmark = pytest.mark.skipif(not probe().can_mount, reason="needs root and /dev/fuse")

PAGE = 1000
HELD = 5
"""The first page that is not answered."""
LIMIT_S = 600.0
MOST_GROWTH = {"master": 64 * MiB, "mount": 32 * MiB}
"""Of the peak of the resident memory, by everything that is done to the directory."""
MOST_WAL = 16 * MiB
MAX_NAMES = 10_000
"""The mount remembers fewer than the directory has: what it remembers is a setting, and no part of the bounds."""

# Prints "paused COUNT" once it has so many, and goes on at a line; then how many names came, and how many came again.
# Inode numbers are kept, by the number in the name, in the file it is told.
READER = """
import array, os, sys
root, size, pause, inodes = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
found = array.array("Q", bytes(8 * size))
count = twice = 0
with os.scandir(root) as entries:
    for entry in entries:
        twice += found[int(entry.name)] != 0
        found[int(entry.name)] = entry.inode()
        count += 1
        if count == pause:
            print("paused", count, flush=True)
            sys.stdin.readline()
with open(inodes, "wb") as file:
    found.tofile(file)
print(count, twice, flush=True)
"""


class Reader:
    """A process that lists the directory."""

    def __init__(self, process: trio.Process, inodes: Path) -> None:
        self._process = process
        self._inodes = inodes
        self._said = b""

    async def line(self) -> str:
        """What it says next."""
        assert self._process.stdout is not None
        with trio.fail_after(LIMIT_S):
            while b"\n" not in self._said:
                more = await self._process.stdout.receive_some()
                assert more, "the reader failed"
                self._said += more
        line, _, self._said = self._said.partition(b"\n")
        return line.decode()

    async def go_on(self) -> None:
        assert self._process.stdin is not None
        await self._process.stdin.send_all(b"\n")

    async def inodes(self) -> array[int]:
        """Of each number, 0 for those without a name. Every name came once."""
        count, twice = (int(number) for number in (await self.line()).split())
        found = array("Q", self._inodes.read_bytes())
        assert twice == 0 and count == sum(1 for ino in found if ino)
        return found


class Scene:
    def __init__(self, directory: Path, store: HugeS3, count: int) -> None:
        self.store = store
        self.count = count
        self._directory = directory
        self._stack = ExitStack()
        # Nobody else gets it while the master is started again.
        self._listen = f"127.0.0.1:{port_of(self._stack.enter_context(hold_port()))}"
        self.processes: dict[str, Running] = {}
        self._readers = 0

    def start(self) -> None:
        self.start_master()
        tier = f"ssd:{self._directory / 'tier'}:1G"
        socket = self._directory / "socket"
        where = ["--master", self._listen, "--insecure"]
        self._run("worker", "--listen", "127.0.0.1:0", "--socket", socket, "--tier", tier, *where)
        mountpoint = self._stack.enter_context(mountpoint_below(self._directory))
        self._run("mount", mountpoint, "--worker-socket", socket, "--metadata-cache-entries", str(MAX_NAMES), *where)
        self.root = mountpoint / DIRECTORY

    def start_master(self) -> None:
        """Where it was, if it ran before."""
        arguments = ["--data-dir", str(self._directory / "master"), "--listen", self._listen, "--insecure"]
        self._run("master", "--mount", f"/={self.store.url}", "--sync-interval", "1h", *arguments)

    def _run(self, role: str, *arguments: str | Path) -> None:
        environment = self.store.environment if role == "master" else None
        self.processes[role] = self._stack.enter_context(running(role, *arguments, environment=environment))

    def kill_master(self) -> None:
        self.processes["master"].end(signal.SIGKILL)

    def close(self) -> None:
        self._stack.close()

    @asynccontextmanager
    async def master(self) -> AsyncIterator[Peer]:
        async with open_peer(parse_address(self._listen), Hello("client")) as peer:
            yield peer

    @asynccontextmanager
    async def reader(self, pause: int = 0) -> AsyncIterator[Reader]:
        """A listing through the mount, by another process."""
        self._readers += 1
        inodes = self._directory / f"inodes-{self._readers}"
        arguments = [str(self.root), str(self.count + PAGE), str(pause), str(inodes)]
        process = await trio.lowlevel.open_process(
            [sys.executable, "-c", READER, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        try:
            yield Reader(process, inodes)
        finally:
            process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()

    def peaks(self) -> dict[str, int]:
        """Resident memory at its highest, bytes."""
        found = {}
        for role in MOST_GROWTH:
            status = Path(f"/proc/{child_of(self.processes[role], role)}/status").read_text()
            (line,) = [line for line in status.splitlines() if line.startswith("VmHWM:")]
            found[role] = int(line.split()[1]) * 1024
        return found

    def wal_bytes(self) -> int:
        """The file is as long as it ever had to be since the master began."""
        return (self._directory / "master/namespace.db-wal").stat().st_size

    def assert_bounded(self, before: dict[str, int], what: str) -> None:
        now = self.peaks()
        growth = {role: now[role] - before[role] for role in now}
        print(f"{what}: growth { ({role: each // MiB for role, each in growth.items()}) } MiB, wal {self.wal_bytes()}")
        assert all(growth[role] <= most for role, most in MOST_GROWTH.items()), growth
        assert self.wal_bytes() <= MOST_WAL


@pytest.fixture(params=[20_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def scene(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Scene]:
    with running_huge_s3(request.param) as store:
        it = Scene(tmp_path, store, request.param)
        try:
            it.start()
            yield it
        finally:
            store.release()
            it.close()


@pytest.mark.slow
@pytest.mark.parametrize("limit", [100_000, 1_000_000])
def test_a_mount_remembers_as_many_names_as_the_flag_says_and_no_more(tmp_path: Path, limit: int) -> None:
    count = 1_000_000
    with running_huge_s3(count) as store, mountpoint_below(tmp_path) as mountpoint:
        arguments = [store.url, mountpoint, "--state-dir", tmp_path / "state", "--tier", f"ssd:{tmp_path / 'tier'}:1G"]
        flag = ["--metadata-cache-entries", str(limit)]
        with running("up", *arguments, *flag, environment=store.environment) as up:
            pid = child_of(up, "mount")
            assert os.listdir(mountpoint) == [DIRECTORY]
            before = memory_of(pid)
            for _ in range(2):
                listed = subprocess.run(["ls", "-U", mountpoint / DIRECTORY], capture_output=True, check=True).stdout
                assert listed.count(b"\n") == count
                growth = memory_of(pid) - before
                print(f"{limit}: growth {growth / limit:.0f} bytes for each")
                # What a listing takes that is under way is not in proportion to anything.
                assert growth <= 350 * limit + MOST_LISTING
                assert growth >= 200 * limit, "they are not remembered"


MOST_LISTING = 16 * MiB


def memory_of(pid: int) -> int:
    """Resident, bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith("VmRSS:")]
    return int(line.split()[1]) * 1024


def all_there(inodes: array[int], first: int, end: int) -> bool:
    return all(inodes[first:end]) and not any(inodes[:first]) and not any(inodes[end:])


class Looks:
    """Look-ups of names that are known, one after the other, while something else goes on."""

    def __init__(self, master: Peer, directory: Ino, names: range) -> None:
        self._master = master
        self._directory = directory
        self._names = names
        self.answered = 0

    async def one(self, number: int) -> Attr | None:
        with trio.fail_after(LIMIT_S):
            return (await self._master.call(Lookup(self._directory, name_of(number)))).message.attr

    async def go_on(self) -> None:
        while True:
            number = self._names[self.answered % len(self._names)]
            attr = await self.one(number)
            assert attr is not None and attr.size_bytes == len(content_of(number))
            self.answered += 1
            await trio.sleep(0.01)


async def refreshed(it: Scene, master: Peer, looks: Looks) -> RefreshReply:
    """Look at the directory again; names are answered meanwhile."""
    before, reply = looks.answered, None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(looks.go_on)
        with trio.fail_after(LIMIT_S):
            reply = (await master.call(Refresh(f"/{DIRECTORY}"))).message
        nursery.cancel_scope.cancel()
    assert looks.answered > before
    return reply


async def listed_until(it: Scene, holds: Callable[[array[int]], bool]) -> array[int]:
    """A listing through the mount, which is told what changed a moment after who asked for it has the answer."""
    with trio.fail_after(LIMIT_S):
        while True:
            async with it.reader() as reader:
                found = await reader.inodes()
            if holds(found):
                return found


async def test_a_huge_directory_is_listed_followed_and_refreshed_in_bounded_memory(scene: Scene) -> None:
    count, store = scene.count, scene.store
    store.hold(HELD)
    async with scene.master() as master:
        directory = (await master.call(ResolvePath(f"/{DIRECTORY}"))).message.attr.ino
        assert (await trio.run_process(["stat", "-c", "%F", str(scene.root)], capture_stdout=True)).stdout
        before = scene.peaks()
        looks = Looks(master, directory, range(0, HELD * PAGE, 7))
        async with scene.reader(HELD * PAGE) as first, scene.reader() as second, scene.reader(count // 2) as slow:
            # The first names come while the store still owes the others, and names are looked up.
            assert await first.line() == f"paused {HELD * PAGE}"
            await trio.to_thread.run_sync(store.wait_held)
            assert store.pages() <= HELD
            known = [await looks.one(number) for number in (0, HELD * PAGE - 1)]
            assert all(attr is not None for attr in known)
            store.release()
            await first.go_on()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(looks.go_on)
                inodes = await first.inodes()
                assert all_there(inodes, 0, count)
                assert await second.inodes() == inodes
                nursery.cancel_scope.cancel()
            assert looks.answered > 0
            # One that stopped half-way costs nothing, and goes on where it was.
            assert await slow.line() == f"paused {count // 2}"
            scene.assert_bounded(before, "listed")
            await slow.go_on()
            assert await slow.inodes() == inodes
        # Another has it from what is known.
        pages = store.pages()
        async with scene.reader() as again:
            assert await again.inodes() == inodes
        assert store.pages() == pages
        # Few changes among many names.
        looks = Looks(master, directory, range(count // 2 + 20, count, 7))
        store.change(removed=(100, 110), changed=(200, 205), added=3)
        assert (await refreshed(scene, master, looks)).changed == 18
        known = set(inodes)

        def is_changed(now: array[int]) -> bool:
            changed = now[200:205]
            return not any(now[100:110]) and all(changed) and not set(changed) & known and all_there(now[count:], 0, 3)

        now = await listed_until(scene, is_changed)
        kept = [number for number in range(count) if not 100 <= number < 110 and not 200 <= number < 205]
        assert all(now[number] == inodes[number] for number in kept)
        scene.assert_bounded(before, "refreshed")
        # Half of it goes at once.
        store.change(removed=(0, count // 2))
        await refreshed(scene, master, looks)
        await listed_until(scene, lambda now: all_there(now, count // 2, count))
        scene.assert_bounded(before, "half removed")


async def test_a_master_killed_in_the_middle_of_a_listing_loses_and_doubles_nothing(scene: Scene) -> None:
    count, store = scene.count, scene.store
    held = count // PAGE // 2
    store.hold(held)
    async with scene.reader(held * PAGE) as follower:
        assert await follower.line() == f"paused {held * PAGE}"
        await trio.to_thread.run_sync(store.wait_held)
        async with scene.master() as master:
            directory = (await master.call(ResolvePath(f"/{DIRECTORY}"))).message.attr.ino
            before = await numbers_in(master, directory, held * PAGE)
        assert all_there(before, 0, held * PAGE)
        scene.kill_master()
        scene.start_master()
        # Again, at some moment at which it writes.
        pages = store.pages()
        await follower.go_on()
        with trio.fail_after(LIMIT_S):
            while store.pages() < pages + 3:
                await trio.sleep(0.001)
        scene.kill_master()
        scene.start_master()
        store.release()
        followed = await follower.inodes()
    assert all_there(followed, 0, count)
    assert followed[: held * PAGE] == before[: held * PAGE]
    assert len(set(followed[:count])) == count
    async with scene.master() as master:
        assert await numbers_in(master, directory, count) == followed


async def numbers_in(master: Peer, directory: Ino, count: int) -> array[int]:
    """As `Reader.inodes`, of the first `count` names, from the master itself."""
    found = array("Q", bytes(8 * (count + PAGE)))
    came = 0
    with trio.fail_after(LIMIT_S):
        async with master.stream(ListDir(directory)) as chunks:
            async for chunk in chunks:
                for entry in chunk.entries:
                    assert not found[int(entry.name)]
                    found[int(entry.name)] = entry.attr.ino
                came += len(chunk.entries)
                if came >= count:
                    break
    return found
