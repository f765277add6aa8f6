"""What only a real kernel shows: who gets interrupted, what is asked again of a successor, what is not asked at all."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import trio

from cachefs.fuse import (
    ROOT_NODE,
    AttrReply,
    BackingRegistry,
    DirEntry,
    Driver,
    EntryReply,
    KernelSession,
    MountOptions,
    OpenDirReply,
    OpenReply,
    SessionOptions,
    StatfsReply,
    abort,
    find_mount,
    mount,
    open_device,
    probe,
    unmount,
)
from cachefs.fusewire import InitOptions, Negotiated, Opcode, RequestHeader, error_reply, parse_header
from cachefs.model import Attr, ContentKey, Ino, Kind, LocalProtocolError, MiB
from cachefs.net import open_background

if TYPE_CHECKING:
    from cachefs.fuse.pyfuse3_driver import Pyfuse3Session

pytestmark = pytest.mark.skipif(not probe().can_mount, reason="needs root and /dev/fuse")

LIMIT_S = 60.0

only_pyfuse3 = pytest.mark.parametrize("driver", [Driver.PYFUSE3], indirect=True, ids=["pyfuse3"])


class Directory:
    """A flat local directory: node n is the (n-2)th name. A test can make opens and reads wait for `go`."""

    def __init__(self, path: Path, backings: BackingRegistry | None = None) -> None:
        self.path = path
        self.names = sorted(os.listdir(path))
        self.nodes = {name.encode(): number + 2 for number, name in enumerate(self.names)}
        self.backings = backings
        self.backing_ids: dict[int, int] = {}
        self.opens: dict[int, int] = {}
        self.holds_opens = False
        self.holds_reads = False
        self.keeps_listings = False
        self.go = trio.Event()
        self.waiting = 0
        self.cancelled = 0

    def attr(self, node: int) -> Attr:
        if node == ROOT_NODE:
            return Attr(Ino(1), Kind.DIRECTORY, 0, 0, 0o755, 0, 0, ContentKey(b""))
        size_bytes = (self.path / self.names[node - 2]).stat().st_size
        return Attr(Ino(node), Kind.FILE, size_bytes, 0, 0o644, 0, 0, ContentKey(b""))

    async def wait(self) -> None:
        self.waiting += 1
        try:
            await self.go.wait()
        except trio.Cancelled:
            self.cancelled += 1
            raise
        finally:
            self.waiting -= 1

    def lookup_nowait(self, parent: int, name: bytes) -> EntryReply:
        node = self.nodes.get(name)
        return EntryReply(0, None, 60, 60) if node is None else EntryReply(node, self.attr(node), 60, 60)

    async def lookup(self, parent: int, name: bytes) -> EntryReply:
        return self.lookup_nowait(parent, name)

    def getattr_nowait(self, node: int) -> AttrReply:
        return AttrReply(node, self.attr(node), 60)

    async def getattr(self, node: int) -> AttrReply:
        return self.getattr_nowait(node)

    def open_nowait(self, node: int, flags: int) -> OpenReply:
        if self.holds_opens and not self.go.is_set():
            raise trio.WouldBlock
        self.opens[node] = self.opens.get(node, 0) + 1
        if self.backings is None:
            return OpenReply(node)
        if node not in self.backing_ids:
            fd = os.open(self.path / self.names[node - 2], os.O_RDONLY)
            try:
                self.backing_ids[node] = self.backings.register(fd)
            finally:
                os.close(fd)
        return OpenReply(node, self.backing_ids[node])

    async def open(self, node: int, flags: int, pid: int) -> OpenReply:
        await self.wait()
        return self.open_nowait(node, flags)

    def read_nowait(self, fh: int, offset: int, size: int) -> bytes:
        if self.holds_reads and not self.go.is_set():
            raise trio.WouldBlock
        with open(self.path / self.names[fh - 2], "rb") as file:
            return os.pread(file.fileno(), size, offset)

    async def read(self, fh: int, offset: int, size: int) -> bytes:
        await self.wait()
        return self.read_nowait(fh, offset, size)

    def release(self, node: int, fh: int) -> None:
        if not self.opens.get(node):
            return
        self.opens[node] -= 1
        if not self.opens[node] and self.backings is not None:
            backing_id = self.backing_ids.pop(node)
            self.backings.release(backing_id)
            self.backings.release(backing_id)  # idempotent

    def opendir_nowait(self, node: int) -> OpenDirReply:
        return OpenDirReply(1, keep_cache=self.keeps_listings)

    async def opendir(self, node: int) -> OpenDirReply:
        return self.opendir_nowait(node)

    def readdir_nowait(self, fh: int, offset: int, limit: int) -> Sequence[DirEntry]:
        return [
            DirEntry(name.encode(), offset + at + 2, Kind.FILE, offset + at + 1, self.attr(offset + at + 2), 60, 60)
            for at, name in enumerate(self.names[offset : offset + limit])
        ]

    async def readdir(self, fh: int, offset: int, limit: int) -> Sequence[DirEntry]:
        return self.readdir_nowait(fh, offset, limit)

    def adopt_directory(self, node: int, fh: int) -> None:
        pass

    def releasedir(self, fh: int) -> None:
        pass

    def statfs(self) -> StatfsReply:
        return StatfsReply(4096, 0, 0, 0)

    def forget(self, node: int, lookups: int) -> None:
        pass


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(LIMIT_S):
        while not condition():
            await trio.sleep(0.002)


class Mounted:
    """A mount whose server can be replaced."""

    def __init__(self, fd: int, mountpoint: Path, nursery: trio.Nursery) -> None:
        self.fd = fd
        self.mountpoint = mountpoint
        self.session: KernelSession | Pyfuse3Session
        self._nursery = nursery
        self._scope = trio.CancelScope()

    async def serve(
        self, files: Directory, init: InitOptions | None = None, agreed: Negotiated | None = None
    ) -> Negotiated:
        """The earlier server, if there is one, is gone first."""
        options = SessionOptions(init or InitOptions())
        negotiated: Negotiated = await self._serve(KernelSession(self.fd, files, options, agreed=agreed))
        return negotiated

    async def serve_by(self, driver: Driver, files: Directory, options: SessionOptions | None = None) -> None:
        if driver is Driver.PYFUSE3:
            # Not where there is no pyfuse3.
            from cachefs.fuse.pyfuse3_driver import Pyfuse3Session

            await self._serve(Pyfuse3Session(self.fd, files, options))
        else:
            await self._serve(KernelSession(self.fd, files, options))

    async def _serve(self, session: KernelSession | Pyfuse3Session) -> Any:
        self._scope.cancel()
        self._scope = scope = trio.CancelScope()
        self.session = session

        async def run(task_status: trio.TaskStatus[Any]) -> None:
            with scope:
                await session.serve(task_status=task_status)

        with trio.fail_after(LIMIT_S):
            return await self._nursery.start(run)

    def stop(self) -> None:
        self._scope.cancel()

    async def read(self, *arguments: str) -> bytes:
        """Output of a program that runs in the mount."""
        with trio.fail_after(LIMIT_S):
            done = await trio.run_process(
                ["env", "-C", self.mountpoint, *arguments], capture_stdout=True, stderr=subprocess.DEVNULL
            )
        return done.stdout

    async def start(self, *arguments: str | Path) -> trio.Process:
        return await trio.lowlevel.open_process(
            arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL
        )


OpenMount = Callable[[], AbstractAsyncContextManager[Mounted]]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.mkdir()
    return path


@pytest.fixture
async def mounted(tmp_path: Path) -> AsyncIterator[OpenMount]:
    """Call it for a mount; whatever happens in the test, nothing is left behind."""
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()

    @asynccontextmanager
    async def open_mount() -> AsyncIterator[Mounted]:
        fd = open_device()
        try:
            async with open_background() as nursery:
                on = mount(fd, mountpoint, "test", MountOptions())
                try:
                    yield Mounted(fd, mountpoint, nursery)
                finally:
                    abort(on)
        finally:
            os.close(fd)

    yield open_mount
    while find_mount(mountpoint) is not None:
        unmount(mountpoint, lazy=True)  # aborted, so that nobody has to answer


async def test_ten_thousand_names(source: Path, mounted: OpenMount, driver: Driver) -> None:
    class Names(Directory):
        def attr(self, node: int) -> Attr:
            return super().attr(ROOT_NODE) if node == ROOT_NODE else one

    (source / "one").touch()
    files = Names(source)
    one = Directory.attr(files, 2)
    files.names = [f"{'n' * (number % 50)}-{number}" for number in range(10_000)]
    files.nodes = {name.encode(): number + 2 for number, name in enumerate(files.names)}
    async with mounted() as it:
        await it.serve_by(driver, files)
        assert (await it.read("ls", "-U")).decode().split() == files.names
        # All at once, at different speeds.
        listings: list[list[str]] = []
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(list_into, it, listings)
        assert listings == [sorted(files.names)] * 3


async def list_into(it: Mounted, listings: list[list[str]]) -> None:
    listings.append(sorted((await it.read("ls", "-l")).decode().split()[10::9]))


async def test_a_listing_that_is_kept(source: Path, mounted: OpenMount) -> None:
    for number in range(100):
        (source / str(number)).touch()
    async with mounted() as it:
        files = Directory(source)
        files.keeps_listings = True
        await it.serve(files)
        first = await it.read("ls", "-U")
        asked = it.session.requests[Opcode.READDIR] + it.session.requests[Opcode.READDIRPLUS]
        assert asked > 0
        assert await it.read("ls", "-U") == first
        assert it.session.requests[Opcode.READDIR] + it.session.requests[Opcode.READDIRPLUS] == asked


async def test_large_reads(source: Path, mounted: OpenMount, driver: Driver) -> None:
    """READs of 1 MiB, a tail that is no multiple of a page, and the read-ahead that both need."""
    content = os.urandom(5 * MiB + 12345)
    (source / "file").write_bytes(content)
    async with mounted() as it:
        await it.serve_by(driver, Directory(source))
        assert await it.read("cat", "file") == content
        assert it.session.requests[Opcode.READ] < 40


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
async def test_killed_while_an_open_waits(source: Path, mounted: OpenMount, number: int) -> None:
    (source / "file").write_bytes(b"data")
    async with mounted() as it:
        files = Directory(source)
        files.holds_opens = True
        await it.serve(files)
        reader = await it.start("cat", it.mountpoint / "file")
        await until(lambda: files.waiting == 1)
        reader.send_signal(number)
        await until(lambda: files.cancelled == 1)
        with trio.fail_after(LIMIT_S):
            assert await reader.wait() == -number
        files.go.set()
        assert await it.read("cat", "file") == b"data"


async def test_every_request_is_timed_until_it_is_answered(source: Path, mounted: OpenMount, driver: Driver) -> None:
    (source / "file").write_bytes(b"data")
    async with mounted() as it:
        files = Directory(source)
        files.holds_opens = True
        await it.serve_by(driver, files)
        observed: list[tuple[int, float]] = []
        it.session.observe = lambda opcode, seconds: observed.append((opcode, seconds))
        reader = await it.start("cat", it.mountpoint / "file")
        await until(lambda: files.waiting == 1)
        began = time.perf_counter()
        assert Opcode.OPEN not in dict(observed)
        files.go.set()
        with trio.fail_after(LIMIT_S):
            assert await reader.wait() == 0
        assert dict(observed)[Opcode.OPEN] > 0
        assert all(seconds >= 0 for _, seconds in observed)
        assert sum(seconds for opcode, seconds in observed if opcode == Opcode.READ) <= time.perf_counter() - began
        for opcode in (Opcode.LOOKUP, Opcode.OPEN, Opcode.READ):
            assert [each for each, _ in observed].count(opcode) == it.session.requests[opcode] > 0


async def test_killed_while_a_direct_read_waits(source: Path, mounted: OpenMount) -> None:
    (source / "file").write_bytes(b"d" * 4096)
    async with mounted() as it:
        files = Directory(source)
        files.holds_reads = True
        await it.serve(files)
        reader = await it.start("dd", f"if={it.mountpoint}/file", "iflag=direct", "bs=4096")
        await until(lambda: files.waiting == 1)
        reader.send_signal(signal.SIGKILL)
        await until(lambda: files.cancelled == 1)
        with trio.fail_after(LIMIT_S):
            assert await reader.wait() == -signal.SIGKILL


async def test_killed_while_a_cached_read_waits(source: Path, mounted: OpenMount, driver: Driver) -> None:
    """The kernel sends no INTERRUPT: the read is the page cache's. The reader dies at once all the same, and the read
    that nobody waits for ends by itself, and then the handle."""
    (source / "file").write_bytes(b"d" * 100_000)
    async with mounted() as it:
        files = Directory(source)
        files.holds_reads = True
        await it.serve_by(driver, files)
        reader = await it.start("cat", it.mountpoint / "file")
        await until(lambda: files.waiting >= 1)
        reader.send_signal(signal.SIGKILL)
        with trio.fail_after(LIMIT_S):
            assert await reader.wait() == -signal.SIGKILL
        assert files.opens[2] == 1
        files.go.set()
        await until(lambda: files.opens[2] == 0)
        assert await it.read("cat", "file") == b"d" * 100_000


async def test_many_readers_of_many_files(source: Path, mounted: OpenMount, driver: Driver) -> None:
    """Names, attributes, contents and their ends, all at once, and every handle released."""
    for number in range(60):
        (source / f"{number:02}").write_bytes(os.urandom(number * 3000))
    async with mounted() as it:
        files = Directory(source)
        await it.serve_by(driver, files)
        expected = await it.read("sh", "-c", f"cd {source} && sha256sum *")
        found: list[bytes] = []

        async def read(script: str) -> None:
            found.append(await it.read("sh", "-c", script))

        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(read, "sha256sum *")
        assert found == [expected] * 4
        assert await it.read("stat", "-c", "%n %s %A %u %g %h %b %Y", "00", "59") == (
            b"00 0 -rw-r--r-- 0 0 1 0 0\n" + f"59 {59 * 3000} -rw-r--r-- 0 0 1 {-(-59 * 3000 // 512)} 0\n".encode()
        )
        assert await it.read("sh", "-c", "cat nothing; cat 01/x; echo > 02; exit 0") == b""
        assert (await it.read("df", ".")).split()[-5:-1] == [b"0", b"0", b"0", b"-"]
        await until(lambda: not any(files.opens.values()))


@only_pyfuse3
async def test_killed_while_an_open_waits_for_libfuse(source: Path, mounted: OpenMount, driver: Driver) -> None:
    """No interrupt comes through pyfuse3: the process is gone when the answer comes, and not before, whatever it is."""
    (source / "file").write_bytes(b"data")
    async with mounted() as it:
        files = Directory(source)
        files.holds_opens = True
        await it.serve_by(driver, files)
        reader = await it.start("cat", it.mountpoint / "file")
        await until(lambda: files.waiting == 1)
        reader.send_signal(signal.SIGKILL)
        assert await it.read("ls", "-U") == b"file\n"
        assert reader.poll() is None
        files.go.set()
        with trio.fail_after(LIMIT_S):
            assert await reader.wait() == -signal.SIGKILL
        await until(lambda: files.opens[2] == 0)


async def test_a_request_that_is_gone_before_it_is_read_ends_nothing(
    source: Path, mounted: OpenMount, driver: Driver
) -> None:
    """The kernel withdraws what a killed process asked, if nobody has read it: between the wake-up and the read too."""
    (source / "file").write_bytes(b"data")
    async with mounted() as it:
        files = Directory(source)
        files.holds_opens = True
        await it.serve_by(driver, files)
        waiting = await it.start("cat", it.mountpoint / "file")
        await until(lambda: files.waiting == 1)
        stolen: list[RequestHeader] = []

        class Thief(trio.abc.Instrument):
            """Reads the device right before the driver does, and answers for it."""

            def before_task_step(self, task: trio.lowlevel.Task) -> None:
                if not stolen and ("pyfuse-" in task.name or task.name.endswith("run")):
                    with contextlib.suppress(BlockingIOError):
                        stolen.append(parse_header(os.read(it.fd, 1 << 21)))
                        os.write(it.fd, error_reply(stolen[-1].unique, errno.EXDEV))

        thief = Thief()
        trio.lowlevel.add_instrument(thief)
        try:
            with pytest.raises(subprocess.CalledProcessError):
                await it.read("ls", "nothing")
        finally:
            trio.lowlevel.remove_instrument(thief)
        assert len(stolen) == 1
        # What was in progress goes on, and then what comes later is served.
        assert files.waiting == 1 and files.cancelled == 0
        files.go.set()
        with trio.fail_after(LIMIT_S):
            assert await waiting.wait() == 0
        assert await it.read("cat", "file") == b"data"


@only_pyfuse3
async def test_a_session_that_ends_answers_what_waits(source: Path, mounted: OpenMount, driver: Driver) -> None:
    """The kernel driver leaves it to a successor: see test_a_successor_answers_what_was_left."""
    (source / "file").write_bytes(b"data")
    async with mounted() as it:
        files = Directory(source)
        files.holds_opens = True
        await it.serve_by(driver, files)
        reader = await it.start("cat", it.mountpoint / "file")
        await until(lambda: files.waiting == 1)
        it.stop()
        with trio.fail_after(LIMIT_S):
            assert await reader.wait() == 1
        assert files.cancelled == 1


@only_pyfuse3
async def test_one_mount_at_a_time_in_a_process(source: Path, mounted: OpenMount, driver: Driver) -> None:
    from cachefs.fuse.pyfuse3_driver import Pyfuse3Session

    async with mounted() as it:
        await it.serve_by(driver, Directory(source))
        with pytest.raises(LocalProtocolError, match="one mount at a time"):
            await Pyfuse3Session(it.fd, Directory(source)).serve()
        assert await it.read("ls") == b""


async def test_a_successor_answers_what_was_left(source: Path, mounted: OpenMount) -> None:
    content = os.urandom(300_000)
    (source / "file").write_bytes(content)
    async with mounted() as it:
        first = Directory(source)
        first.holds_reads = True
        agreed = await it.serve(first)
        if not agreed.resend:
            pytest.skip("this kernel cannot send requests again")
        reader = await it.start("cmp", it.mountpoint / "file", source / "file")
        await until(lambda: first.waiting >= 1)
        await it.serve(Directory(source), agreed=Negotiated.load(agreed.save()))
        await until(lambda: first.waiting == 0)
        with trio.fail_after(LIMIT_S):
            assert await reader.wait() == 0
        assert it.session.requests[Opcode.INIT] == 0
        assert await it.read("cat", "file") == content


async def test_passthrough_again_and_again(source: Path, mounted: OpenMount) -> None:
    """Each round a new backing id, given back by the release."""
    (source / "file").write_bytes(b"data")
    async with mounted() as it:
        files = Directory(source, BackingRegistry(it.fd))
        agreed = await it.serve(files)
        if not agreed.passthrough:
            pytest.skip("this kernel offers no passthrough")
        for _ in range(3):
            assert await it.read("cat", "file") == b"data"
            await until(lambda: not files.backing_ids)
        assert it.session.requests[Opcode.READ] == 0
        assert it.session.requests[Opcode.FLUSH] == 0


async def test_without_opens(source: Path, mounted: OpenMount) -> None:
    (source / "file").write_bytes(b"data")
    async with mounted() as it:
        agreed = await it.serve(Directory(source), InitOptions(passthrough=False, no_open=True))
        assert agreed.no_open
        for _ in range(3):
            assert await it.read("cat", "file") == b"data"
        assert it.session.requests[Opcode.OPEN] == 1
        assert it.session.requests[Opcode.READ] == 1
        assert it.session.requests[Opcode.RELEASE] == 0
