"""The sockets of a real master and a real worker against peers that send damage, and peers that do nothing.

After each: whoever means well is answered, a malformed connection has cost one line of log, and no descriptor and no
task is left.
"""

from __future__ import annotations

import array
import gc
import logging
import os
import random
import resource
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
import trio.testing

from cachefs.model import ROOT_INO, Ino, MiB
from cachefs.net import Address, UnixAddress, channel, open_peer, service
from cachefs.testing.cluster import running_cluster
from cachefs.wire import Connection, Frame, Hello, Kind, Request
from cachefs.wire import messages as m
from cachefs.wire.frames import HEADER, MAGIC, VERSION

pytestmark = pytest.mark.anyio

SOCKETS = ["master-tcp", "worker-tcp", "worker-unix"]


class Target:
    """One socket of a running cluster."""

    def __init__(self, address: Address, request: Request[Any]) -> None:
        self.address = address
        self.request = request
        """Something it answers."""
        self.encoder = Connection(asking=True)
        self.hello = self.encoder.hello(Hello("client"))

    def ask(self, request_id: int = 1) -> bytes:
        return self.encoder.head(Kind.REQUEST, request_id, self.request)

    @asynccontextmanager
    async def connection(self, receive_buffer: int = 0) -> AsyncIterator[Raw]:
        unix = isinstance(self.address, UnixAddress)
        with trio.socket.socket(socket.AF_UNIX if unix else socket.AF_INET) as sock:
            if receive_buffer:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
            await sock.connect(self.address.path if unix else (self.address.host, self.address.port))  # type: ignore[union-attr]
            yield Raw(sock)


class Raw:
    """A connection that says what it likes."""

    def __init__(self, sock: trio.socket.SocketType) -> None:
        self.sock = sock
        self._decoder = Connection(asking=True)

    async def send(self, data: bytes) -> None:
        """All of it, unless the other side hangs up meanwhile."""
        try:
            while data:
                data = data[await self.sock.send(data) :]
        except (BrokenPipeError, ConnectionResetError):
            pass

    def send_descriptors(self, data: bytes, fds: list[int]) -> None:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
        plain = socket.socket(fileno=os.dup(self.sock.fileno()))
        with plain:
            plain.sendmsg([data], ancillary)

    async def frame(self) -> Frame | None:
        """None when the other side has hung up."""
        while True:
            with self._decoder.get_buffer() as buffer, trio.fail_after(60):
                try:
                    count = await self.sock.recv_into(buffer)
                except ConnectionResetError:
                    return None
            if count == 0:
                return None
            if frames := self._decoder.buffer_updated(count):
                return frames[0]

    async def answers(self) -> list[Frame]:
        """Everything until the other side hangs up."""
        found = []
        while (frame := await self.frame()) is not None:
            found.append(frame)
        return found

    async def answer(self) -> Frame:
        """The next one that is not HELLO."""
        while (frame := await self.frame()) is not None:
            if frame.kind is not Kind.HELLO:
                return frame
        raise AssertionError("the connection was closed")


def header(kind: int, request_id: int = 1, meta: int = 0, payload: int = 0, descriptors: int = 0) -> bytes:
    return HEADER.pack(MAGIC, VERSION, kind, descriptors, request_id, meta, payload)


def request(meta: bytes, request_id: int = 1) -> bytes:
    return header(Kind.REQUEST, request_id, len(meta)) + meta


def hello(meta: bytes) -> bytes:
    return header(Kind.HELLO, 0, len(meta)) + meta


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def living_tasks() -> int:
    return trio.lowlevel.current_statistics().tasks_living


@contextmanager
def counted_warnings() -> Iterator[list[str]]:
    lines: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    handler = Collect(logging.WARNING)
    logging.getLogger("cachefs").addHandler(handler)
    try:
        yield lines
    finally:
        logging.getLogger("cachefs").removeHandler(handler)


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(60):
        while not condition():
            await trio.sleep(0.005)


@asynccontextmanager
async def target(which: str, directory: Path, expected_lines: int = 0) -> AsyncIterator[Target]:
    """The socket, with somebody who means well connected all the time; checks what the block left behind."""
    (directory / "data").mkdir()
    (directory / "data/file").write_bytes(b"content")
    async with running_cluster(directory, (directory / "data").as_uri()) as cluster:
        addresses: dict[str, tuple[Address, Request[Any]]] = {
            "master-tcp": (cluster.master_address, m.GetCluster()),
            "worker-tcp": (cluster.worker_address, m.GetWorkerStatus()),
            "worker-unix": (UnixAddress(cluster.worker_config.socket), m.GetWorkerStatus()),
        }
        it = Target(*addresses[which])
        async with open_peer(it.address, Hello("client")) as peer:
            await peer.call(it.request)
            # What is opened once and kept, by the master's database and the threads, is open after this.
            async with open_peer(it.address, Hello("client")) as another:
                await another.call(it.request)
            await trio.testing.wait_all_tasks_blocked()
            # What earlier tests left to the collector would go at any time.
            gc.collect()
            descriptors, tasks = open_descriptors(), living_tasks()
            with counted_warnings() as lines:
                yield it
                with trio.fail_after(60):
                    await peer.call(it.request)
                    async with open_peer(it.address, Hello("client")) as late:
                        await late.call(it.request)
                await until(lambda: open_descriptors() <= descriptors and living_tasks() <= tasks)
            assert len(lines) == expected_lines, lines


# ---- what ends a connection ----------------------------------------------------------------------------------------

Damage = Callable[[Target], bytes]
_NOISE = random.Random(7).randbytes(5000)
_HELLO_META = msgspec.msgpack.encode(Hello("client"))

ENDING: dict[str, Damage] = {
    "random bytes": lambda it: _NOISE,
    "random bytes after HELLO": lambda it: it.hello + _NOISE,
    "another protocol": lambda it: b"GET / HTTP/1.1\r\nHost: here\r\n\r\n",
    "zeros": lambda it: bytes(100),
    "another version": lambda it: HEADER.pack(MAGIC, 9, Kind.HELLO, 0, 0, 0, 0),
    "a kind there is none of": lambda it: it.hello + header(99),
    "a request before HELLO": lambda it: it.ask(),
    "HELLO twice": lambda it: it.hello + it.hello,
    "a session played twice": lambda it: (it.hello + it.ask(1) + it.ask(2)) * 2,
    "HELLO that is too long": lambda it: header(Kind.HELLO, 0, 5000),
    "HELLO of something else": lambda it: hello(b"\x93\x01\x02\x03"),
    "HELLO nested too deep": lambda it: hello(b"\x81\xa1x" + b"\x91" * 4000 + b"\x01"),
    "HELLO that is not text": lambda it: hello(b"\x81\xa4role\xa2\xff\xfe"),
    "HELLO that forges a line of log": lambda it: hello(msgspec.msgpack.encode({"role": "x\nERROR all is lost"})),
    "HELLO with a request id": lambda it: header(Kind.HELLO, 1, len(_HELLO_META)) + _HELLO_META,
    "a meta over the limit": lambda it: it.hello + header(Kind.REQUEST, meta=MiB + 1),
    "the longest meta there is": lambda it: it.hello + header(Kind.REQUEST, meta=2**32 - 1, payload=2**32 - 1),
    "a request with a payload": lambda it: it.hello + header(Kind.REQUEST, meta=1, payload=1) + b"\x80x",
    "a request with id 0": lambda it: it.hello + header(Kind.REQUEST, 0),
    "CANCEL with a meta": lambda it: it.hello + header(Kind.CANCEL, meta=1) + b"\x01",
    "an id that is in use": lambda it: it.hello + it.ask(5) + it.ask(5),
    "a reply to a server": lambda it: it.hello + header(Kind.REPLY, meta=1) + b"\xc0",
    "an item to a server": lambda it: it.hello + header(Kind.ITEM, meta=1) + b"\xc0",
    "an error to a server": lambda it: it.hello + header(Kind.ERROR, meta=1) + b"\xc0",
    "CREDIT of nothing": lambda it: it.hello + header(Kind.CREDIT, meta=1) + b"\x00",
    "CREDIT without end": lambda it: it.hello + header(Kind.CREDIT, meta=9) + b"\xcf" + b"\xff" * 8,
    "CREDIT of something else": lambda it: it.hello + header(Kind.CREDIT, meta=1) + b"\x80",
    "descriptors announced that do not come": lambda it: it.hello + header(Kind.REQUEST, descriptors=3),
    "more descriptors than there may be": lambda it: it.hello + header(Kind.REQUEST, descriptors=2**32 - 1),
}


@pytest.mark.expect_warnings("one line each")
@pytest.mark.parametrize("which", SOCKETS)
@pytest.mark.parametrize("what", ENDING)
async def test_damage_ends_its_connection_alone(tmp_path: Path, which: str, what: str) -> None:
    async with target(which, tmp_path, expected_lines=1) as it, it.connection() as raw:
        await raw.send(ENDING[what](it))
        await raw.answers()


@pytest.mark.expect_warnings("one line each")
@pytest.mark.parametrize("which", SOCKETS)
@pytest.mark.parametrize("chunk", [1, 7])
async def test_damage_that_comes_bit_by_bit(tmp_path: Path, which: str, chunk: int) -> None:
    async with target(which, tmp_path, expected_lines=1) as it, it.connection() as raw:
        data = it.hello + it.ask(1) + header(Kind.REPLY)
        for start in range(0, len(data), chunk):
            await raw.send(data[start : start + chunk])
            await trio.lowlevel.checkpoint()
        kinds = [frame.kind for frame in await raw.answers()]
        # What came before the damage was answered, or lost with the connection; nothing else was.
        assert kinds in ([Kind.HELLO, Kind.REPLY], [Kind.HELLO])


# ---- what is refused, and the connection goes on -------------------------------------------------------------------

REFUSED: dict[str, bytes] = {
    "nothing": b"",
    "an unknown request": msgspec.msgpack.encode({"q": "Nonsense"}),
    "no tag": msgspec.msgpack.encode({"ino": 1}),
    "a tag that is no text": msgspec.msgpack.encode({"q": 5}),
    "the base of all requests": msgspec.msgpack.encode({"q": "_Nothing"}),
    "a list": msgspec.msgpack.encode([1, 2, 3]),
    "a number": msgspec.msgpack.encode(7),
    "a text": msgspec.msgpack.encode("Lookup"),
    "a field of another type": msgspec.msgpack.encode({"q": "Lookup", "parent": "1", "name": "file"}),
    "a field too few": msgspec.msgpack.encode({"q": "Lookup", "parent": 1}),
    "a number below all": msgspec.msgpack.encode({"q": "Lookup", "parent": -1, "name": "file"}),
    "a number no database holds": msgspec.msgpack.encode({"q": "Lookup", "parent": 2**63, "name": "file"}),
    "a key that is none": msgspec.msgpack.encode({"q": "Locate", "key": b"short", "block_index": 0}),
    "a read of more than there may be": msgspec.msgpack.encode(
        {"q": "Fetch", "ino": 2, "block_index": 0, "offset": 0, "length": 2**40, "held": 0}
    ),
    "something behind it": msgspec.msgpack.encode({"q": "GetCluster"}) + b"\x00",
    "lists nested too deep": b"\x82\xa1q\xaaGetCluster\xa1x" + b"\x91" * 1_000_000 + b"\x01",
    "maps nested too deep": b"\x82\xa1q\xaaGetCluster\xa1x" + b"\x81\xa1a" * 300_000 + b"\x01",
    "a list that says it is huge": b"\x82\xa1q\xacReportBlocks\xa5added\xdd\xff\xff\xff\xff",
    "a map that says it is huge": b"\xdf\xff\xff\xff\xff",
    "a text that says it is huge": b"\x82\xa1q\xa6Lookup\xa4name\xdb\xff\xff\xff\xff",
    "a text that is none": b"\x83\xa1q\xa6Lookup\xa6parent\x01\xa4name\xa2\xff\xfe",
    "a time out of range": b"\x82\xa1q\xa6Lookup\xa6parent\xc7\x0c\xff" + b"\xff" * 12,
    "a byte that means nothing": b"\xc1",
}


@pytest.mark.parametrize("which", SOCKETS)
@pytest.mark.parametrize("what", REFUSED)
async def test_a_request_that_is_none_is_refused_alone(tmp_path: Path, which: str, what: str) -> None:
    async with target(which, tmp_path) as it, it.connection() as raw:
        await raw.send(it.hello + request(REFUSED[what], 1) + it.ask(2))
        answers = {frame.request_id: frame.kind for frame in (await raw.answer(), await raw.answer())}
        assert answers == {1: Kind.ERROR, 2: Kind.REPLY}


@pytest.mark.parametrize("which", SOCKETS)
async def test_what_is_about_nothing_is_ignored(tmp_path: Path, which: str) -> None:
    async with target(which, tmp_path) as it, it.connection() as raw:
        credit = header(Kind.CREDIT, 77, 1) + b"\x01"
        await raw.send(it.hello + header(Kind.CANCEL, 2**64 - 1) * 1000 + credit * 1000 + it.ask(5))
        # Its CANCEL comes when it may be done already, or not.
        await raw.send(header(Kind.CANCEL, 5) * 2 + it.ask(6))
        while (await raw.answer()).request_id != 6:
            pass


async def test_numbers_that_were_never_given_out(tmp_path: Path) -> None:
    async with target("master-tcp", tmp_path) as it, open_peer(it.address, Hello("client")) as peer:
        for ino in (Ino(0), Ino(12345), Ino(2**63 - 1)):
            for ask in (m.GetAttr(ino), m.Lookup(ino, "x"), m.Resolve(ino), m.ReportChanged(ino)):
                with pytest.raises(Exception, match="does not exist"):
                    await peer.call(ask)
        for name in ("", ".", "..", "a/b", "\0", "x" * 100_000, "\n"):
            assert (await peer.call(m.Lookup(ROOT_INO, name))).message.attr is None


# ---- half a frame --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", SOCKETS)
async def test_half_a_frame_and_gone(tmp_path: Path, which: str) -> None:
    async with target(which, tmp_path) as it:
        whole = it.hello + it.ask()
        for length in range(len(whole)):
            async with it.connection() as raw:
                await raw.send(whole[:length])


@pytest.mark.parametrize("which", SOCKETS)
@pytest.mark.parametrize("length", [0, 10, 30])
async def test_silence_before_hello_has_a_deadline(
    tmp_path: Path, which: str, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with target(which, tmp_path) as it:
        with monkeypatch.context() as patch:
            # For this one alone: whoever means well may be slow.
            patch.setattr(service, "HELLO_TIMEOUT_S", 0.3)
            async with it.connection() as raw:
                await raw.send(it.hello[:length])
                await raw.answers()


@pytest.mark.parametrize("which", SOCKETS)
async def test_silence_in_the_middle_holds_nobody_up(tmp_path: Path, which: str) -> None:
    async with target(which, tmp_path) as it, trio.open_nursery() as nursery:

        async def keep_silent(task_status: trio.TaskStatus[None]) -> None:
            async with it.connection() as raw:
                await raw.send(it.hello + header(Kind.REQUEST, meta=MiB) + bytes(1000))
                task_status.started()
                await trio.sleep_forever()

        for _ in range(50):
            await nursery.start(keep_silent)
        async with open_peer(it.address, Hello("client")) as peer:
            await peer.call(it.request)
        nursery.cancel_scope.cancel()


# ---- descriptors nobody wants --------------------------------------------------------------------------------------


@pytest.mark.expect_warnings("one line each")
@pytest.mark.parametrize("count", [1, 8, 9, 250])
@pytest.mark.parametrize("announced", [0, 1, 8])
@pytest.mark.parametrize("greeted", [False, True])
async def test_descriptors_nobody_wants_are_closed(tmp_path: Path, count: int, announced: int, greeted: bool) -> None:
    async with target("worker-unix", tmp_path, expected_lines=1) as it:
        with (tmp_path / "some").open("wb") as some:
            async with it.connection() as raw:
                if greeted:
                    await raw.send(it.hello)
                    meta = msgspec.msgpack.encode(it.request)
                    damage = header(Kind.REQUEST, 1, len(meta), descriptors=announced) + meta
                else:
                    damage = header(Kind.HELLO, 0, len(_HELLO_META), descriptors=announced) + _HELLO_META
                raw.send_descriptors(damage, [some.fileno()] * count)
                assert [frame.kind for frame in await raw.answers()] in ([], [Kind.HELLO])


async def test_descriptors_in_a_frame_that_never_ends(tmp_path: Path) -> None:
    async with target("worker-unix", tmp_path) as it, it.connection() as raw:
        await raw.send(it.hello)
        with (tmp_path / "some").open("wb") as some:
            raw.send_descriptors(header(Kind.REQUEST)[:10], [some.fileno()] * 8)


# ---- many, and those that do not read ------------------------------------------------------------------------------


@pytest.mark.parametrize("which", SOCKETS)
async def test_a_thousand_that_say_nothing(tmp_path: Path, which: str) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 4096:
        pytest.skip("both ends of a thousand connections need 2000 descriptors")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    hung_up = 0
    try:
        async with target(which, tmp_path) as it, trio.open_nursery() as nursery:
            before = open_descriptors()

            async def keep_silent(task_status: trio.TaskStatus[None]) -> None:
                nonlocal hung_up
                async with it.connection() as raw:
                    task_status.started()
                    assert [frame.kind for frame in await raw.answers()] in ([], [Kind.HELLO])
                    hung_up += 1

            for number in range(1000):
                await nursery.start(keep_silent)
                if number % 250 == 249:
                    async with open_peer(it.address, Hello("client")) as peer:
                        await peer.call(it.request)
                        assert open_descriptors() - before <= 1000 + service.MAX_UNGREETED + 10
            await until(lambda: hung_up >= 1000 - service.MAX_UNGREETED)
            nursery.cancel_scope.cancel()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def fill(raw: Raw, frames: Callable[[int], bytes], limit: int) -> int:
    """Send until the other side takes no more; returns how many bytes it took, about `limit` at most."""
    sent, number = 0, 0
    waiting = b""
    while sent < limit:
        while len(waiting) < 1 << 16:
            number += 1
            waiting += frames(number)
        with trio.move_on_after(0.5) as scope:
            try:
                count = await raw.sock.send(waiting)
            except OSError:
                break
            sent += count
            waiting = waiting[count:]
        if scope.cancelled_caught:
            break
    return sent


@pytest.mark.parametrize("which", SOCKETS)
@pytest.mark.parametrize("wrong", [False, True])
async def test_whoever_does_not_read_answers_is_not_read(tmp_path: Path, which: str, wrong: bool) -> None:
    """Answers and refusals alike: what waits for it is bounded, and others do not notice."""
    async with target(which, tmp_path) as it, it.connection(receive_buffer=4096) as raw:
        await raw.send(it.hello)
        limit = 64 * MiB
        nonsense = msgspec.msgpack.encode({"q": "Nonsense", "x": bytes(1000)})
        sent = await fill(raw, lambda number: request(nonsense, number) if wrong else it.ask(number), limit)
        assert sent < limit
        async with open_peer(it.address, Hello("client")) as peer:
            for _ in range(20):
                await peer.call(it.request)


@pytest.mark.expect_warnings("one line for a peer that is given up")
@pytest.mark.parametrize("which", SOCKETS)
async def test_whoever_never_reads_is_given_up(tmp_path: Path, which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "STALL_TIMEOUT_S", 0.3)
    async with target(which, tmp_path, expected_lines=1) as it, it.connection(receive_buffer=4096) as raw:
        await raw.send(it.hello)
        await fill(raw, it.ask, 64 * MiB)
        # It hangs up, though we still do not read.
        with trio.fail_after(60), pytest.raises(OSError):
            while True:
                await raw.sock.send(it.ask(10**9))
                # It may have had room yet, if this machine stood still.
                await fill(raw, it.ask, 64 * MiB)


@pytest.mark.parametrize("wrong", [False, True])
async def test_a_service_ends_though_somebody_does_not_read(tmp_path: Path, wrong: bool) -> None:
    (tmp_path / "data").mkdir()
    with trio.fail_after(60):
        async with running_cluster(tmp_path, (tmp_path / "data").as_uri()) as cluster:
            it = Target(cluster.master_address, m.GetCluster())
            async with it.connection(receive_buffer=4096) as raw:
                await raw.send(it.hello)
                nonsense = msgspec.msgpack.encode({"q": "Nonsense", "x": bytes(1000)})
                await fill(raw, lambda number: request(nonsense, number) if wrong else it.ask(number), 64 * MiB)
                await cluster.stop("master")
