"""The driver on a real mount. Whoever reads is another process: one that read its own mount would wait for itself."""

from __future__ import annotations

import errno
import fcntl
import inspect
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, closing
from pathlib import Path

import pytest
import trio

from cachefs.fuse import (
    AttrReply,
    BackingRegistry,
    DirEntry,
    EntryReply,
    KernelSession,
    Mount,
    MountError,
    MountOptions,
    OpenDirReply,
    OpenReply,
    StatfsReply,
    abort,
    errno_of,
    find_mount,
    is_mounted,
    mount,
    open_device,
    probe,
    unmount,
)
from cachefs.fuse.errno import ERRNO
from cachefs.fuse.kept import Kept
from cachefs.fusewire import Opcode
from cachefs.model import Attr, CachefsError, ConfigError, ContentKey, Ino, Kind, NotFoundError, StaleError, errors
from cachefs.net import open_background

needs_mount = pytest.mark.skipif(not probe().can_mount, reason="needs root and /dev/fuse")

CONTENT = bytes(range(256)) * 2000
TTL_S = 60.0


class Files:
    """Operations on a flat directory: name -> content, with some files passed through and some that block."""

    def __init__(self, directory: Path, fd: int) -> None:
        self.fd = fd
        self.backings = BackingRegistry(fd)
        self.directory = directory
        self.nodes: dict[int, tuple[bytes, bytes]] = {}
        self.by_name: dict[bytes, int] = {}
        self.passthrough: set[int] = set()
        self.stale: set[int] = set()
        self.handles: dict[int, int] = {}
        self.backing_ids: dict[int, int] = {}
        self.blocked = trio.Event()
        self.interrupted = trio.Event()
        self.released: list[int] = []

    def add(self, name: str, content: bytes, *, passthrough: bool = False) -> int:
        node = len(self.nodes) + 2
        self.nodes[node] = (name.encode(), content)
        self.by_name[name.encode()] = node
        if passthrough:
            self.passthrough.add(node)
            (self.directory / str(node)).write_bytes(content)
        return node

    def attr(self, node: int) -> Attr:
        if node == 1:
            return Attr(Ino(1), Kind.DIRECTORY, 0, 0, 0o755, 0, 0, ContentKey(b""))
        return Attr(Ino(node), Kind.FILE, len(self.nodes[node][1]), 10**18, 0o644, 0, 0, ContentKey(b""))

    def lookup_nowait(self, parent: int, name: bytes) -> EntryReply:
        node = self.by_name.get(name)
        if node is None:
            return EntryReply(0, None, TTL_S, TTL_S)
        return EntryReply(node, self.attr(node), TTL_S, TTL_S)

    async def lookup(self, parent: int, name: bytes) -> EntryReply:
        raise AssertionError

    def getattr_nowait(self, node: int) -> AttrReply:
        return AttrReply(node, self.attr(node), TTL_S)

    async def getattr(self, node: int) -> AttrReply:
        raise AssertionError

    def open_nowait(self, node: int, flags: int) -> OpenReply:
        raise trio.WouldBlock

    async def open(self, node: int, flags: int, pid: int) -> OpenReply:
        if node in self.stale:
            raise StaleError("superseded")
        if self.nodes[node][0] == b"blocking":
            await self.block()
        handle = len(self.handles) + 100
        self.handles[handle] = node
        if node not in self.passthrough:
            return OpenReply(handle)
        if node not in self.backing_ids:
            fd = os.open(self.directory / str(node), os.O_RDONLY)
            self.backing_ids[node] = self.backings.register(fd)
            os.close(fd)
        return OpenReply(handle, self.backing_ids[node])

    def read_nowait(self, fh: int, offset: int, size: int) -> bytes:
        name, content = self.nodes[self.handles[fh]]
        if name == b"broken":
            raise OSError(errno.EIO, "disk")
        if name == b"bug":
            raise RuntimeError("a bug")
        return content[offset : offset + size]

    async def read(self, fh: int, offset: int, size: int) -> bytes:
        raise AssertionError

    async def block(self) -> None:
        self.blocked.set()
        try:
            await trio.sleep_forever()
        except trio.Cancelled:
            self.interrupted.set()
            raise

    def release(self, node: int, fh: int) -> None:
        self.released.append(fh)

    def opendir_nowait(self, node: int) -> OpenDirReply:
        return OpenDirReply(1)

    async def opendir(self, node: int) -> OpenDirReply:
        raise AssertionError

    def readdir_nowait(self, fh: int, offset: int, limit: int) -> Sequence[DirEntry]:
        wanted = [node for node in self.nodes if node > offset][:limit]
        return [DirEntry(self.nodes[node][0], node, Kind.FILE, node, self.attr(node), TTL_S, TTL_S) for node in wanted]

    async def readdir(self, fh: int, offset: int, limit: int) -> Sequence[DirEntry]:
        raise AssertionError

    def adopt_directory(self, node: int, fh: int) -> None:
        pass

    def releasedir(self, fh: int) -> None:
        pass

    def statfs(self) -> StatfsReply:
        return StatfsReply(4096, 1000, 500, 7)

    def forget(self, node: int, lookups: int) -> None:
        pass


class Scene:
    def __init__(self, mountpoint: Path, files: Files, session: KernelSession) -> None:
        self.mountpoint = mountpoint
        self.files = files
        self.session = session

    async def sh(self, script: str) -> str:
        """Output of a shell that stands in the mount."""
        command = ["sh", "-c", f"cd '{self.mountpoint}' && {script}"]
        with trio.fail_after(60):
            done = await trio.run_process(command, capture_stdout=True, capture_stderr=True, check=False)
        return (done.stdout + done.stderr).decode()


@asynccontextmanager
async def scene(tmp_path: Path) -> AsyncIterator[Scene]:
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    fd = open_device()
    try:
        files = Files(tmp_path, fd)
        session = KernelSession(fd, files)
        async with open_background() as nursery:
            mounted = await trio.to_thread.run_sync(mount, fd, mountpoint, "test")
            try:

                async def serve(task_status: trio.TaskStatus[object]) -> None:
                    await session.serve(task_status=task_status)

                await nursery.start(serve)
                yield Scene(mountpoint, files, session)
            finally:
                if is_mounted(mountpoint):
                    abort(mounted)
                    unmount(mountpoint, lazy=True)
    finally:
        os.close(fd)


@needs_mount
async def test_a_long_directory(tmp_path: Path) -> None:
    async with scene(tmp_path) as it:
        for number in range(3000):
            it.files.add(f"{number:05}-{'x' * (number % 90)}", b"x" * (number % 7))
        assert (await it.sh("ls -U | wc -l")).strip() == "3000"
        listed = (await it.sh("ls -l | tail -n +2 | awk '{print $5, $9}'")).splitlines()
        expected = sorted(f"{len(content)} {name.decode()}" for name, content in it.files.nodes.values())
        assert sorted(listed) == expected
        # Attributes came with the names.
        assert it.session.requests[Opcode.READDIRPLUS] > 0
        assert it.session.requests[Opcode.LOOKUP] + it.session.requests[Opcode.GETATTR] < 100


@needs_mount
async def test_cached_reads(tmp_path: Path) -> None:
    async with scene(tmp_path) as it:
        it.files.add("file", CONTENT)
        (tmp_path / "copy").write_bytes(CONTENT)
        for script in ("cmp file ../copy", "dd if=file bs=777 2>/dev/null | cmp - ../copy", "tail -c 5 file | wc -c"):
            assert (await it.sh(script)).strip() in ("", "5")
        assert it.session.requests[Opcode.READ] > 0
        before = it.session.requests[Opcode.READ]
        # The page cache survives the close: an inode never changes its content.
        await it.sh("cmp file ../copy")
        assert it.session.requests[Opcode.READ] == before


@needs_mount
async def test_passed_through_files_are_read_without_us(tmp_path: Path) -> None:
    async with scene(tmp_path) as it:
        assert it.session.agreed is not None
        if not it.session.agreed.passthrough:
            pytest.skip("this kernel offers no passthrough")
        node = it.files.add("file", CONTENT, passthrough=True)
        (tmp_path / "copy").write_bytes(CONTENT)
        assert await it.sh("cmp file ../copy") == ""
        script = "python3 -c 'import mmap; f = open(\"file\"); print(len(bytes(mmap.mmap(f.fileno(), 0, prot=1))))'"
        assert (await it.sh(script)).strip() == str(len(CONTENT))
        # The name may go: the kernel holds the file.
        os.unlink(tmp_path / str(node))
        assert await it.sh("cmp file ../copy") == ""
        assert it.session.requests[Opcode.READ] == 0 and it.session.requests[Opcode.OPEN] >= 3


@needs_mount
async def test_every_write_is_refused(tmp_path: Path) -> None:
    async with scene(tmp_path) as it:
        it.files.add("file", b"x")
        for script in ("echo >file", "echo >>file", "echo >new", "rm file", "mkdir d", "chmod 0 file", "mv file g"):
            assert "Read-only file system" in await it.sh(script), script


@needs_mount
@pytest.mark.expect_warnings("the errors are injected")
async def test_errors_reach_the_caller_and_end_nothing(tmp_path: Path) -> None:
    async with scene(tmp_path) as it:
        it.files.add("broken", b"x" * 10)
        it.files.add("bug", b"x" * 10)
        it.files.add("file", b"fine")
        assert "Input/output error" in await it.sh("cat broken")
        assert "Input/output error" in await it.sh("cat bug")
        assert "No such file" in await it.sh("cat missing")
        assert await it.sh("cat file") == "fine"


@needs_mount
async def test_an_interrupted_open_frees_its_task(tmp_path: Path) -> None:
    """(Reads in cached mode are the page cache's: the kernel sends no INTERRUPT for them.)"""
    async with scene(tmp_path) as it:
        it.files.add("blocking", b"x" * 10)
        it.files.add("file", b"fine")
        # Not SIGINT: what runs in the background of a shell has it ignored, and so have its children.
        for number in (signal.SIGKILL, signal.SIGTERM):
            it.files.blocked, it.files.interrupted = trio.Event(), trio.Event()
            command = ["dd", f"if={it.mountpoint / 'blocking'}"]
            reader = await trio.lowlevel.open_process(command, stderr=subprocess.DEVNULL)
            try:
                with trio.fail_after(20):
                    await it.files.blocked.wait()
                    reader.send_signal(number)
                    await it.files.interrupted.wait()
                    await reader.wait()
            finally:
                reader.kill()
        # Others were served meanwhile, and are now.
        assert await it.sh("cat file") == "fine"


@needs_mount
async def test_a_stale_node_is_looked_up_again(tmp_path: Path) -> None:
    async with scene(tmp_path) as it:
        old = it.files.add("file", b"old")
        assert await it.sh("cat file") == "old"
        it.files.stale.add(old)
        it.files.add("file", b"new")
        # The kernel still believes that the name means the old node; the application never learns of it.
        assert await it.sh("cat file") == "new"


@needs_mount
async def test_statfs_and_extended_attributes(tmp_path: Path) -> None:
    async with scene(tmp_path) as it:
        it.files.add("file", b"x")
        assert (await it.sh("stat -f -c '%s %b %f' .")).split() == ["4096", "1000", "500"]
        for _ in range(3):
            await it.sh("ls -l")
        # Told once that there are none, the kernel asks no more.
        asked = it.session.requests
        assert asked[Opcode.GETXATTR] <= 1 and asked[Opcode.LISTXATTR] <= 1 and asked[Opcode.FLUSH] == 0


@needs_mount
async def test_handles_are_released(tmp_path: Path) -> None:
    async with scene(tmp_path) as it:
        it.files.add("file", b"x")
        await it.sh("cat file; cat file; cat file")
        with trio.fail_after(10):
            while sorted(it.files.released) != sorted(it.files.handles):
                await trio.sleep(0.01)


@needs_mount
async def test_unmounting_ends_the_session(tmp_path: Path) -> None:
    async with scene(tmp_path) as it:
        await trio.to_thread.run_sync(unmount, it.mountpoint)
        assert find_mount(it.mountpoint) is None
        with pytest.raises(MountError, match="nothing is mounted"):
            unmount(it.mountpoint)


@needs_mount
def test_mountpoints_that_will_not_do(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    full = tmp_path / "full"
    (full / "entry").mkdir(parents=True)
    fd = open_device()
    try:
        for wrong, why in ((tmp_path / "missing", "existing"), (file, "a directory"), (full, "empty")):
            with pytest.raises(ConfigError, match=why):
                mount(fd, wrong, "test")
    finally:
        os.close(fd)
    with pytest.raises(ConfigError, match="max_read"):
        MountOptions(max_read=1)


def test_every_error_has_an_errno() -> None:
    classes = {each for _, each in inspect.getmembers(errors, inspect.isclass) if issubclass(each, CachefsError)}
    assert set(ERRNO) == classes
    assert errno_of(NotFoundError()) == errno.ENOENT and errno_of(OSError(errno.ENOSPC, "x")) == errno.ENOSPC
    assert errno_of(RuntimeError()) is None


@needs_mount
@pytest.mark.parametrize("how", [abort, lambda mounted: unmount(mounted.mountpoint)])
async def test_a_mount_that_is_taken_away_before_it_began(tmp_path: Path, how: Callable[[Mount], object]) -> None:
    fd = open_device()
    try:
        mounted = mount(fd, tmp_path, "test")
        try:
            how(mounted)
            with trio.fail_after(20), pytest.raises(MountError, match="before it was ready"):
                await KernelSession(fd, Files(tmp_path, fd)).serve()
        finally:
            if is_mounted(tmp_path):
                unmount(tmp_path, lazy=True)
    finally:
        os.close(fd)


@needs_mount
async def test_a_successor_of_a_mount_that_has_ended_returns(tmp_path: Path) -> None:
    async with scene(tmp_path) as it:
        info = find_mount(it.mountpoint)
        assert info is not None
        own = os.dup(it.files.fd)
        try:
            abort(info)
            with trio.fail_after(20):
                await KernelSession(own, it.files, agreed=it.session.agreed).serve()
        finally:
            os.close(own)


@needs_mount
async def test_the_next_server_releases_what_nobody_uses(tmp_path: Path) -> None:
    """Killed between registering a file and recording that: the lock on it tells whether the kernel still holds it."""
    async with scene(tmp_path) as it:
        if it.session.agreed is None or not it.session.agreed.passthrough:
            pytest.skip("this kernel offers no passthrough")
        connection = it.files.fd
        attr = Attr(Ino(5), Kind.FILE, 1, 0, 0o644, 0, 0, ContentKey(b"k" * 16))

        def is_held(name: str) -> bool:
            with open(tmp_path / name, "rb") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    return True
            return False

        def register(registry: BackingRegistry, name: str) -> int:
            (tmp_path / name).write_bytes(b"x")
            with open(tmp_path / name, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH)
                return registry.register(file.fileno())

        memfd = os.memfd_create("test")
        try:
            for last in ("noted", "not even noted"):
                with closing(Kept(memfd)) as killed:
                    registry = BackingRegistry(connection, killed)
                    backing_id = register(registry, "used")
                    killed.add_node(5, attr, backing_id)
                    killed.add_handle(1, 5, 2)
                    register(registry if last == "noted" else BackingRegistry(connection), "leaked")
                    assert is_held("used") and is_held("leaked")
                with closing(Kept(memfd)) as state:
                    registry = BackingRegistry(connection, state)
                    found = state.load()
                    for unused in found.unused_ids:
                        registry.release(unused)
                    state.settle()
                    assert is_held("used") and not is_held("leaked")
                    assert [each.backing_id for each in found.nodes] == [backing_id]
                    registry.release(backing_id)
                    state.clear()
        finally:
            os.close(memfd)
