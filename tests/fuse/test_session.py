"""The session against a kernel that does what it likes: a socket pair whose messages are requests and answers."""

from __future__ import annotations

import errno
import logging
import os
import socket
import struct
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, closing
from dataclasses import replace
from pathlib import Path

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from cachefs.fuse import (
    AttrReply,
    DirEntry,
    EntryReply,
    KernelSession,
    OpenDirReply,
    OpenReply,
    SessionOptions,
    StatfsReply,
    abort,
    is_mounted,
    mount,
    open_device,
    probe,
    unmount,
)
from cachefs.fuse.kept import Kept
from cachefs.fusewire import (
    NO_REPLY,
    UNIQUE_RESEND,
    WRITES,
    InitFlag,
    InitOptions,
    InitRequest,
    Negotiated,
    Opcode,
    negotiate,
)
from cachefs.model import (
    Attr,
    ConfigError,
    ContentKey,
    Ino,
    Kind,
    LocalProtocolError,
    NotFoundError,
    RemoteProtocolError,
    StaleError,
    UnavailableError,
)
from cachefs.net import open_background

AGREED = negotiate(InitRequest(7, 45, 1 << 20, InitFlag((1 << 43) - 1)), InitOptions())
ROOT = Attr(Ino(1), Kind.DIRECTORY, 0, 0, 0o755, 0, 0, ContentKey(b""))
FILE = Attr(Ino(5), Kind.FILE, 1000, 0, 0o644, 0, 0, ContentKey(b""))


class Scripted:
    """Operations that fail with `error` if there is one, and wait if `waits`."""

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self.waits = False
        self.data: bytes | bytearray | memoryview = bytes(1000)
        self.running = 0
        self.released: list[tuple[int, int]] = []
        self.forgotten: list[tuple[int, int]] = []
        self.go = trio.Event()

    def _now(self) -> None:
        if self.waits:
            raise trio.WouldBlock
        if self.error is not None:
            raise self.error

    async def _later(self) -> None:
        self.running += 1
        try:
            await self.go.wait()
        finally:
            self.running -= 1
        if self.error is not None:
            raise self.error

    def lookup_nowait(self, parent: int, name: bytes) -> EntryReply:
        self._now()
        return EntryReply(5, FILE, 1, 1) if name == b"file" else EntryReply(0, None, 1, 1)

    async def lookup(self, parent: int, name: bytes) -> EntryReply:
        await self._later()
        return EntryReply(5, FILE, 1, 1)

    def getattr_nowait(self, node: int) -> AttrReply:
        self._now()
        return AttrReply(node, FILE, 1)

    async def getattr(self, node: int) -> AttrReply:
        await self._later()
        return AttrReply(node, FILE, 1)

    def open_nowait(self, node: int, flags: int) -> OpenReply:
        self._now()
        return OpenReply(9)

    async def open(self, node: int, flags: int, pid: int) -> OpenReply:
        await self._later()
        return OpenReply(9)

    def read_nowait(self, fh: int, offset: int, size: int) -> bytes | bytearray | memoryview:
        self._now()
        return self.data

    async def read(self, fh: int, offset: int, size: int) -> bytes | bytearray | memoryview:
        await self._later()
        return self.data

    def release(self, node: int, fh: int) -> None:
        self.released.append((node, fh))

    def opendir_nowait(self, node: int) -> OpenDirReply:
        self._now()
        return OpenDirReply(3, keep_cache=True)

    async def opendir(self, node: int) -> OpenDirReply:
        await self._later()
        return OpenDirReply(3)

    def readdir_nowait(self, fh: int, offset: int, limit: int) -> Sequence[DirEntry]:
        self._now()
        return [] if offset else [DirEntry(b"file", 5, Kind.FILE, 1, FILE)]

    async def readdir(self, fh: int, offset: int, limit: int) -> Sequence[DirEntry]:
        await self._later()
        return []

    def adopt_directory(self, node: int, fh: int) -> None:
        pass

    def releasedir(self, fh: int) -> None:
        pass

    def statfs(self) -> StatfsReply:
        return StatfsReply(4096, 1, 1, 1)

    def forget(self, node: int, lookups: int) -> None:
        self.forgotten.append((node, lookups))


class Kernel:
    def __init__(self, link: trio.socket.SocketType, session: KernelSession, operations: Scripted) -> None:
        self.link = link
        self.session = session
        self.operations = operations
        self.unique = 0
        self.left = b""
        """Of the answers, after the end: one that nobody took."""

    async def send(self, opcode: int, body: bytes = b"", *, unique: int | None = None, node: int = 5) -> int:
        unique, request = self.request(opcode, body, unique, node)
        await self.link.send(request)
        return unique

    def send_nowait(self, opcode: int, body: bytes = b"", *, node: int = 5) -> int:
        """What is sent without a checkpoint in between is there together."""
        unique, request = self.request(opcode, body, None, node)
        os.write(self.link.fileno(), request)
        return unique

    def request(self, opcode: int, body: bytes, unique: int | None, node: int) -> tuple[int, bytes]:
        if unique is None:
            self.unique += 2
            unique = self.unique
        return unique, struct.pack("<IIQQIIIHH", 40 + len(body), opcode, unique, node, 0, 0, 0, 0, 0) + body

    async def answer(self) -> tuple[int, int, bytes]:
        """(errno, unique, body)"""
        with trio.fail_after(10):
            data = await self.link.recv(1 << 20)
        length, code, unique = struct.unpack_from("<IiQ", data)
        assert length == len(data)
        return -code, unique, data[16:]

    async def ask(self, opcode: int, body: bytes = b"") -> tuple[int, bytes]:
        sent = await self.send(opcode, body)
        code, unique, data = await self.answer()
        assert unique == sent
        return code, data

    async def alive(self) -> None:
        assert (await self.ask(Opcode.STATFS))[0] == 0

    async def running(self, number: int) -> None:
        with trio.fail_after(10):
            while self.operations.running != number:
                await trio.sleep(0.001)


@asynccontextmanager
async def kernel(
    agreed: Negotiated | None = AGREED, max_tasks: int = 256, kept: Kept | None = None
) -> AsyncIterator[Kernel]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        theirs.setblocking(False)
        operations = Scripted()
        options = SessionOptions(max_tasks=max_tasks)
        session = KernelSession(theirs.fileno(), operations, options, agreed=agreed, kept=kept)
        link = trio.socket.from_stdlib_socket(ours)
        async with open_background() as nursery:
            nursery.start_soon(session.serve)
            it = Kernel(link, session, operations)
            if agreed is not None:
                # The first thing a successor says.
                assert await link.recv(100) == struct.pack("<IiQ", 16, 7, 0)
            yield it
        # The session has ended; what it wrote is still there to read.
        ours.setblocking(False)
        try:
            it.left = ours.recv(1 << 20)
        except BlockingIOError:
            it.left = b""


def read(size: int = 1000, offset: int = 0) -> bytes:
    return struct.pack("<QQIIQII", 9, offset, size, 0, 0, 0, 0)


def release(fh: int) -> bytes:
    return struct.pack("<QIIQ", fh, 0, 0, 0)


def interrupt(unique: int) -> bytes:
    return struct.pack("<Q", unique)


# What the operations do not answer from memory: opcode, body.
WAITING = [
    (Opcode.LOOKUP, b"file\0"),
    (Opcode.GETATTR, bytes(16)),
    (Opcode.OPEN, bytes(8)),
    (Opcode.READ, read()),
    (Opcode.OPENDIR, bytes(8)),
    (Opcode.READDIR, read()),
    (Opcode.READDIRPLUS, read()),
]


def init_body(major: int = 7, minor: int = 45) -> bytes:
    return struct.pack("<IIIII44x", major, minor, 1 << 20, 0xFFFFFFFF, 0xFF)


async def test_init_and_what_follows() -> None:
    async with kernel(agreed=None) as it:
        assert (await it.ask(Opcode.INIT, init_body(major=8))) == (0, struct.pack("<II", 7, 40))
        code, data = await it.ask(Opcode.INIT, init_body())
        assert (code, len(data)) == (0, 64)
        assert it.session.agreed is not None
        assert it.session.agreed.passthrough
        await it.alive()


@pytest.mark.expect_warnings("the peer is wrong")
async def test_no_request_before_init_and_no_second_init() -> None:
    async with kernel(agreed=None) as it:
        assert (await it.ask(Opcode.GETATTR, bytes(16)))[0] == errno.EIO
        await it.ask(Opcode.INIT, init_body())
        assert (await it.ask(Opcode.INIT, init_body()))[0] == errno.EIO
        await it.alive()


async def test_a_kernel_that_is_too_old_ends_the_session() -> None:
    with pytest.raises(ExceptionGroup) as caught:
        async with kernel(agreed=None) as it:
            assert (await it.ask(Opcode.INIT, init_body(minor=9)))[0] == errno.EPROTO
            await trio.sleep_forever()
    # The group is of the nursery that the session runs in.
    assert caught.group_contains(RemoteProtocolError, match=r"7\.9", depth=1)


async def test_a_successor_needs_a_kernel_that_can_send_again() -> None:
    agreed = replace(AGREED, flags=AGREED.flags & ~int(InitFlag.HAS_RESEND))
    with pytest.raises(LocalProtocolError, match="send again"):
        await KernelSession(-1, Scripted(), agreed=agreed).serve()


@pytest.mark.parametrize("opcode", sorted(WRITES))
async def test_every_write_is_refused(opcode: Opcode) -> None:
    async with kernel() as it:
        assert await it.ask(opcode, bytes(100)) == (errno.EROFS, b"")


@pytest.mark.parametrize("flags", [os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_TRUNC, os.O_WRONLY | os.O_APPEND])
async def test_every_open_for_writing_is_refused(flags: int) -> None:
    async with kernel() as it:
        assert await it.ask(Opcode.OPEN, struct.pack("<II", flags, 0)) == (errno.EROFS, b"")
        assert it.operations.released == []


@pytest.mark.parametrize(
    "opcode",
    [
        *(Opcode.GETXATTR, Opcode.LISTXATTR, Opcode.FLUSH, Opcode.ACCESS, Opcode.FSYNC, Opcode.LSEEK, Opcode.STATX),
        *(Opcode.IOCTL, Opcode.POLL, 4095),
    ],
)
async def test_what_the_kernel_can_do_without(opcode: int) -> None:
    async with kernel() as it:
        assert await it.ask(opcode, bytes(24)) == (errno.ENOSYS, b"")


async def test_open_flags() -> None:
    async with kernel() as it:
        assert await it.ask(Opcode.OPEN, bytes(8)) == (0, struct.pack("<QIi", 9, 0x22, 0))  # NOFLUSH, KEEP_CACHE
        assert await it.ask(Opcode.OPENDIR, bytes(8)) == (0, struct.pack("<QIi", 3, 0x0A, 0))  # CACHE_DIR, KEEP_CACHE


async def test_who_opens_is_answered_before_what_was_closed() -> None:
    async with kernel() as it:
        closed = [it.send_nowait(Opcode.RELEASE, release(node), node=node) for node in (5, 6, 7)]
        opened = it.send_nowait(Opcode.OPEN, bytes(8), node=8)
        assert [(await it.answer())[1] for _ in range(4)] == [opened, *closed]
        assert it.operations.released == [(5, 5), (6, 6), (7, 7)]


async def test_what_was_closed_is_closed_before_it_is_opened_again() -> None:
    async with kernel() as it:
        for _ in range(20):
            others = it.send_nowait(Opcode.RELEASE, release(1), node=6)
            closed = it.send_nowait(Opcode.RELEASE, release(9))
            opened = it.send_nowait(Opcode.OPEN, bytes(8))
            assert [(await it.answer())[1] for _ in range(3)] == [others, closed, opened]


async def test_a_file_that_is_closed_last_is_closed_soon() -> None:
    async with kernel() as it:
        assert await it.ask(Opcode.RELEASE, release(9)) == (0, b"")
        assert it.operations.released == [(5, 9)]


async def test_forgets_are_passed_on_and_not_answered() -> None:
    async with kernel() as it:
        await it.send(Opcode.FORGET, struct.pack("<Q", 2))
        await it.send(Opcode.BATCH_FORGET, struct.pack("<IIQQQQ", 2, 0, 6, 1, 7, 4))
        await it.alive()
        assert it.operations.forgotten == [(5, 2), (6, 1), (7, 4)]


# ---- reads ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
async def test_a_read_is_answered_with_what_the_operations_gave(kind: type) -> None:
    async with kernel() as it:
        it.operations.data = kind(b"x" * 1000)
        assert await it.ask(Opcode.READ, read()) == (0, b"x" * 1000)


async def test_a_read_over_the_end_is_short() -> None:
    async with kernel() as it:
        it.operations.data = b"x" * 100
        assert await it.ask(Opcode.READ, read(4096, offset=900)) == (0, b"x" * 100)
        it.operations.data = b""
        assert await it.ask(Opcode.READ, read(4096, offset=4096)) == (0, b"")


@pytest.mark.parametrize("length", [0, 99, 101, 5000])
@pytest.mark.expect_warnings("the operations break their promise")
async def test_a_wrong_length_is_an_error_and_never_the_end_of_the_file(length: int) -> None:
    async with kernel() as it:
        it.operations.data = bytes(length)
        assert await it.ask(Opcode.READ, read(4096, offset=900)) == (errno.EIO, b"")


# ---- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize(
    ("error", "code"),
    [
        (NotFoundError("x"), errno.ENOENT),
        (StaleError("x"), errno.ESTALE),
        (UnavailableError("x"), errno.EIO),
        (OSError(errno.ENOSPC, "x"), errno.ENOSPC),
        (ExceptionGroup("of a nursery", [NotFoundError("x")]), errno.ENOENT),
        (ZeroDivisionError("bug"), errno.EIO),
        (ExceptionGroup("bugs", [KeyError(), ValueError()]), errno.EIO),
    ],
)
@pytest.mark.expect_warnings("injected")
async def test_errors_are_answered(error: Exception, code: int, waits: bool) -> None:
    async with kernel() as it:
        it.operations.error = error
        it.operations.waits = waits
        it.operations.go.set()
        for opcode, body in WAITING:
            assert await it.ask(opcode, body) == (code, b""), opcode
        await it.alive()


@pytest.mark.expect_warnings("injected")
async def test_a_bug_is_logged_with_one_traceback(caplog: pytest.LogCaptureFixture) -> None:
    async with kernel() as it:
        it.operations.error = ZeroDivisionError("bug")
        with caplog.at_level(logging.ERROR):
            for _ in range(3):
                assert (await it.ask(Opcode.GETATTR, bytes(16)))[0] == errno.EIO
    assert len(caplog.records) == 3
    assert [record.exc_info is not None for record in caplog.records] == [True, False, False]
    assert all("GETATTR" in record.getMessage() for record in caplog.records)


@pytest.mark.expect_warnings("injected")
@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("error", [UnavailableError("the store is away"), ZeroDivisionError("bug"), OSError(5, "disk")])
async def test_a_storm_of_errors_is_a_few_lines(
    error: Exception, waits: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async with kernel() as it:
        it.operations.error = error
        it.operations.waits = waits
        it.operations.go.set()
        for _ in range(300):
            assert (await it.ask(Opcode.READ, read()))[0] == errno.EIO
        assert len(caplog.records) == 10
        # Another kind has its own lines.
        assert (await it.ask(Opcode.GETATTR, bytes(16)))[0] == errno.EIO
        assert len(caplog.records) == 11 and "GETATTR" in caplog.text


# ---- waiting and interrupts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("opcode", "body"), WAITING)
async def test_an_interrupt_cancels(opcode: Opcode, body: bytes) -> None:
    async with kernel() as it:
        it.operations.waits = True
        sent = await it.send(opcode, body)
        await it.running(1)
        await it.alive()
        await it.send(Opcode.INTERRUPT, interrupt(sent))
        assert await it.answer() == (errno.EINTR, sent, b"")
        assert it.operations.running == 0
        # It comes once more, too late.
        await it.send(Opcode.INTERRUPT, interrupt(sent))
        await it.alive()


async def test_an_interrupt_right_behind_the_request() -> None:
    """Both are read before the request's task has begun."""
    async with kernel() as it:
        it.operations.waits = True
        request = struct.pack("<IIQQIIIHH", 48, Opcode.OPEN, 100, 5, 0, 0, 0, 0, 0) + bytes(8)
        late = struct.pack("<IIQQIIIHH", 48, Opcode.INTERRUPT, 101, 0, 0, 0, 0, 0, 0) + interrupt(100)
        # Without a checkpoint in between.
        os.write(it.link.fileno(), request)
        os.write(it.link.fileno(), late)
        assert await it.answer() == (errno.EINTR, 100, b"")
        await it.alive()


async def test_an_interrupt_of_nothing() -> None:
    async with kernel() as it:
        await it.send(Opcode.INTERRUPT, interrupt(12345))
        await it.alive()


async def test_tasks_are_bounded_and_the_queue_is_served() -> None:
    async with kernel(max_tasks=2) as it:
        it.operations.waits = True
        sent = [await it.send(Opcode.GETATTR, bytes(16)) for _ in range(6)]
        await it.running(2)
        await it.alive()
        # One in the queue, and one that runs: its place goes to the next.
        await it.send(Opcode.INTERRUPT, interrupt(sent[3]))
        assert await it.answer() == (errno.EINTR, sent[3], b"")
        await it.send(Opcode.INTERRUPT, interrupt(sent[0]))
        assert await it.answer() == (errno.EINTR, sent[0], b"")
        await it.running(2)
        it.operations.go.set()
        answers = [await it.answer() for _ in range(4)]
        assert sorted(unique for _, unique, _ in answers) == [sent[1], sent[2], sent[4], sent[5]]
        assert {code for code, _, _ in answers} == {0}


async def test_what_was_sent_again_is_answered_as_it_came() -> None:
    async with kernel() as it:
        it.operations.waits = True
        await it.send(Opcode.GETATTR, bytes(16), unique=UNIQUE_RESEND | 8)
        await it.running(1)
        await it.send(Opcode.INTERRUPT, interrupt(8))
        assert await it.answer() == (errno.EINTR, UNIQUE_RESEND | 8, b"")


async def test_an_open_that_a_killed_server_had_nearly_answered_is_open_once() -> None:
    """It had recorded a handle, and never told the kernel of it."""
    memfd = os.memfd_create("test")
    try:
        with closing(Kept(memfd)) as killed:
            killed.add_node(5, FILE, None)
            killed.add_handle(77, 5, 8)
            killed.add_handle(78, 5, 10)  # this one was given: its OPEN does not come again
        with closing(Kept(memfd)) as kept:
            kept.load()
            async with kernel(kept=kept) as it:
                await it.send(Opcode.OPEN, bytes(8), unique=UNIQUE_RESEND | 8)
                code, unique, _ = await it.answer()
                assert (code, unique) == (0, UNIQUE_RESEND | 8)
                assert it.operations.released == [(5, 77)]
                # Recorded before the answer, under the number that a successor would see.
                assert kept.load().nodes[0].handles == {77, 78, 9}
                assert kept.handle_never_given(UNIQUE_RESEND | 8) == 9
    finally:
        os.close(memfd)


async def test_a_server_that_makes_way_answers_what_it_has_read() -> None:
    async with kernel() as it:
        it.operations.waits = True
        sent = await it.send(Opcode.GETATTR, bytes(16))
        await it.running(1)
        it.session.drain()
        await trio.testing.wait_all_tasks_blocked()
        await it.send(Opcode.GETATTR, bytes(16))  # for its successor
        it.operations.go.set()
        assert (await it.answer())[1] == sent
        await trio.testing.wait_all_tasks_blocked()
        assert it.operations.running == 0
    assert it.left == b""


async def test_what_takes_too_long_is_left_to_a_successor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cachefs.fuse.kernel._DRAIN_LIMIT_S", 0.05)
    async with kernel() as it:
        it.operations.waits = True
        await it.send(Opcode.GETATTR, bytes(16))
        await it.running(1)
        it.session.drain()
        with trio.fail_after(10):
            while it.operations.running:
                await trio.sleep(0.01)
    assert it.left == b""


async def test_cancelled_requests_stay_unanswered_for_a_successor() -> None:
    async with kernel() as it:
        it.operations.waits = True
        await it.send(Opcode.GETATTR, bytes(16))
        await it.running(1)
    assert it.operations.running == 0
    assert it.left == b""


# ---- short and strange requests ------------------------------------------------------------------------------------

BODIES = {
    Opcode.LOOKUP: b"file\0",
    Opcode.OPEN: bytes(8),
    Opcode.READ: read(),
    Opcode.RELEASE: bytes(24),
    Opcode.OPENDIR: bytes(8),
    Opcode.READDIR: read(),
    Opcode.READDIRPLUS: read(),
    Opcode.RELEASEDIR: bytes(24),
}
# Bytes of them that are looked at; what follows may be missing.
NEEDED = {Opcode.LOOKUP: 5, Opcode.OPEN: 8, Opcode.OPENDIR: 0, Opcode.RELEASE: 8, Opcode.RELEASEDIR: 8}


@pytest.mark.parametrize("opcode", sorted(BODIES))
@pytest.mark.expect_warnings("logged")
async def test_a_request_cut_anywhere_is_answered_once(opcode: Opcode) -> None:
    body, needed = BODIES[opcode], NEEDED.get(opcode, 24)
    async with kernel() as it:
        codes = [(await it.ask(opcode, body[:length]))[0] for length in range(len(body) + 1)]
        assert codes == [errno.EIO if length < needed else 0 for length in range(len(body) + 1)]
        await it.alive()


@pytest.mark.parametrize("opcode", sorted(NO_REPLY))
@pytest.mark.expect_warnings("logged")
async def test_a_cut_request_that_nobody_waits_for_is_not_answered(opcode: Opcode) -> None:
    async with kernel() as it:
        for length in range(24):
            await it.send(opcode, b"\xff" * length)
        await it.alive()


@pytest.mark.parametrize("name", [b"", b"\0", b"file", b"x" * 4000, b"\xff" * 300])
@pytest.mark.expect_warnings("logged")
async def test_a_name_without_an_end(name: bytes) -> None:
    async with kernel() as it:
        assert await it.ask(Opcode.LOOKUP, name) == (errno.EIO, b"")
        await it.alive()


@pytest.mark.parametrize("name", [b"\xff\xfe", b"x" * 4000, b"a/b", b"..", b"\n"])
async def test_a_name_of_anything(name: bytes) -> None:
    async with kernel() as it:
        code, body = await it.ask(Opcode.LOOKUP, name + b"\0")
        assert (code, body[:8]) == (0, bytes(8))


@pytest.mark.parametrize("data", [b"\0", bytes(39), struct.pack("<I", 48) + bytes(36), b"\xff" * 40])
@pytest.mark.expect_warnings("logged")
async def test_what_has_no_header_is_dropped(data: bytes, caplog: pytest.LogCaptureFixture) -> None:
    async with kernel() as it:
        for _ in range(100):
            await it.link.send(data)
        await it.alive()
        assert len(caplog.records) == 10


class Leaving(Scripted):
    """Operations during which the mount goes away."""

    def __init__(self, during: str, leave: Callable[[], object]) -> None:
        super().__init__()
        self.during = during
        self.leave = leave
        self.left = False

    def getattr_nowait(self, node: int) -> AttrReply:
        return AttrReply(node, ROOT if node == 1 else FILE, 1)

    def lookup_nowait(self, parent: int, name: bytes) -> EntryReply:
        self._leave("lookup")
        return super().lookup_nowait(parent, name)

    def open_nowait(self, node: int, flags: int) -> OpenReply:
        self._leave("open")
        return super().open_nowait(node, flags)

    def read_nowait(self, fh: int, offset: int, size: int) -> bytes | bytearray | memoryview:
        self._leave("read")
        return super().read_nowait(fh, offset, size)

    def _leave(self, during: str) -> None:
        if during == self.during:
            self.left = True
            self.leave()


@pytest.mark.skipif(not probe().can_mount, reason="needs root and /dev/fuse")
@pytest.mark.parametrize("during", ["lookup", "open", "read"])
@pytest.mark.parametrize("fails", [False, True])
async def test_an_answer_after_the_mount_is_gone(tmp_path: Path, during: str, fails: bool) -> None:
    """By the real device: the kernel wants neither answer nor error any more, and what was given is taken back."""
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    fd = open_device()
    try:
        mounted = await trio.to_thread.run_sync(mount, fd, mountpoint, "test")

        def leave() -> None:
            abort(mounted)
            unmount(mountpoint, lazy=True)
            if fails:
                raise NotFoundError("gone")

        operations = Leaving(during, leave)
        try:
            with trio.fail_after(20):
                async with trio.open_nursery() as nursery:
                    # Returns by itself: the connection is gone.
                    nursery.start_soon(KernelSession(fd, operations).serve)
                    command = ["cat", str(mountpoint / "file")]
                    reader = await trio.run_process(command, check=False, capture_stdout=True, capture_stderr=True)
            assert reader.returncode == 1 and operations.left
            if not fails:
                assert operations.forgotten == ([(5, 1)] if during == "lookup" else [])
                assert operations.released == ([(5, 9)] if during == "open" else [])
        finally:
            if is_mounted(mountpoint):
                abort(mounted)
                unmount(mountpoint, lazy=True)
    finally:
        os.close(fd)


# ---- garbage -------------------------------------------------------------------------------------------------------


@pytest.mark.expect_warnings("garbage is logged")
@settings(deadline=None)
@given(
    st.lists(
        st.tuples(
            st.one_of(st.sampled_from(sorted(Opcode)), st.integers(0, 2**32 - 1)),
            st.integers(0, 2**64 - 1),
            st.binary(max_size=100),
        ),
        max_size=20,
    ),
    st.binary(max_size=60),
    st.booleans(),
)
def test_garbage_is_answered_once_each_and_the_session_lives(
    requests: list[tuple[int, int, bytes]], noise: bytes, waits: bool
) -> None:
    async def main() -> None:
        async with kernel() as it:
            it.operations.waits = waits
            it.operations.go.set()
            for opcode, unique, body in requests:
                await it.send(opcode, body, unique=unique)
                if opcode not in NO_REPLY:
                    assert (await it.answer())[1] == unique
            if noise:
                await it.link.send(noise)
            await it.alive()

    logging.getLogger("cachefs").setLevel(logging.CRITICAL)
    try:
        trio.run(main)
    finally:
        logging.getLogger("cachefs").setLevel(logging.NOTSET)


def test_options_out_of_range() -> None:
    with pytest.raises(ConfigError, match="max_tasks"):
        SessionOptions(max_tasks=0)
