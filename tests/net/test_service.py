"""Services and peers over real sockets: answers, streams, descriptors, cancellation, loss, and peers that misbehave."""

from __future__ import annotations

import gc
import os
import socket
import stat
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing

from cachefs.model import (
    CachefsError,
    ConfigError,
    LogLimiter,
    MiB,
    NotFoundError,
    RemoteProtocolError,
    TransportError,
)
from cachefs.net import (
    Address,
    Answer,
    FileSlice,
    Hello,
    Service,
    Session,
    TcpAddress,
    UnixAddress,
    open_background,
    open_peer,
    open_pool,
    parse_address,
    serve,
    service,
)
from cachefs.net.peer import connect
from cachefs.wire import STREAM_WINDOW, Connection, Kind, Request, StreamRequest
from cachefs.wire.frames import HEADER, MAGIC, VERSION


class Echo(Request[str], frozen=True):
    text: str


class Fail(Request[str], frozen=True):
    how: str


class EchoAtOnce(Request[str], frozen=True):
    text: str


class FailAtOnce(Request[str], frozen=True):
    how: str


class Wait(Request[str], frozen=True):
    pass


class Large(Request[int], frozen=True):
    size: int


class Slice(Request[str], frozen=True):
    offset: int
    length: int


class Descriptor(Request[str], frozen=True):
    pass


class Count(StreamRequest[int], frozen=True):
    until: int
    fail: bool = False


class Handlers:
    """A service that shows what happens inside."""

    def __init__(self, directory: Path) -> None:
        self.file = directory / "file"
        self.file.write_bytes(bytes(range(256)) * 4096)
        self.waiting = trio.Event()
        self.cancelled = trio.Event()
        self.release = trio.Event()
        self.sent = 0
        self.large_answers = 0
        self.stream_closed = trio.Event()
        self.sessions: list[Session] = []
        self.service = Service()
        for request, handler in (
            (Echo, self.echo),
            (Fail, self.fail),
            (Wait, self.wait),
            (Large, self.large),
            (Slice, self.slice),
            (Descriptor, self.descriptor),
        ):
            self.service.on(request, handler)  # type: ignore[arg-type]
        self.service.on_at_once(EchoAtOnce, lambda request, session: request.text * 2)
        self.service.on_at_once(FailAtOnce, self.fail_at_once)
        self.service.on_stream(Count, self.count)

    async def echo(self, request: Echo, session: Session) -> str:
        self.sessions.append(session)
        return request.text

    async def fail(self, request: Fail, session: Session) -> str:
        if request.how == "known":
            raise NotFoundError("it is not there")
        raise RuntimeError("secret")

    def fail_at_once(self, request: FailAtOnce, session: Session) -> str:
        if request.how == "known":
            raise NotFoundError("it is not there")
        raise RuntimeError("secret")

    async def wait(self, request: Wait, session: Session) -> str:
        self.waiting.set()
        try:
            await self.release.wait()
        except trio.Cancelled:
            self.cancelled.set()
            raise
        return "released"

    async def large(self, request: Large, session: Session) -> Answer[int]:
        self.large_answers += 1
        return Answer(request.size, bytes(request.size))

    async def slice(self, request: Slice, session: Session) -> Answer[str]:
        fd = os.open(self.file, os.O_RDONLY)
        return Answer("slice", FileSlice(fd, request.offset, request.length), (), close_fds=True)

    async def descriptor(self, request: Descriptor, session: Session) -> Answer[str]:
        return Answer("here", b"payload", (os.open(self.file, os.O_RDONLY),), close_fds=True)

    async def count(self, request: Count, session: Session) -> AsyncGenerator[int, None]:
        try:
            for number in range(request.until):
                self.sent += 1
                yield number
            if request.fail:
                raise NotFoundError("half way")
        finally:
            self.stream_closed.set()


@asynccontextmanager
async def serving(handlers: Handlers, address: Address) -> AsyncIterator[Address]:
    async with open_background() as nursery:

        async def run(task_status: trio.TaskStatus[list[Address]]) -> None:
            await serve(handlers.service, [address], hello=Hello("server", name="s"), task_status=task_status)

        (bound,) = await nursery.start(run)
        yield bound


@pytest.fixture(params=["unix", "tcp"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> Address:
    return UnixAddress(str(tmp_path / "s")) if request.param == "unix" else TcpAddress("127.0.0.1", 0)


@pytest.fixture
def unix(tmp_path: Path) -> UnixAddress:
    return UnixAddress(str(tmp_path / "s"))


@pytest.fixture
async def handlers(tmp_path: Path) -> Handlers:
    return Handlers(tmp_path)


def descriptors() -> int:
    # What earlier tests left to the collector would go at any time.
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


async def test_calls_are_answered_side_by_side(handlers: Handlers, address: Address) -> None:
    async with serving(handlers, address) as bound, open_peer(bound, Hello("client")) as peer:
        assert peer.hello == Hello("server", name="s")
        async with trio.open_nursery() as nursery:
            waited: list[str] = []

            async def wait() -> None:
                waited.append((await peer.call(Wait())).message)

            nursery.start_soon(wait)
            await handlers.waiting.wait()
            answers = [(await peer.call(Echo(str(number)))).message for number in range(50)]
            assert answers == [str(number) for number in range(50)] and waited == []
            assert (await peer.call(EchoAtOnce("answer"))).message == "answer" * 2 and waited == []
            handlers.release.set()
        assert waited == ["released"]


async def test_large_payloads_and_file_slices(handlers: Handlers, address: Address) -> None:
    async with serving(handlers, address) as bound, open_peer(bound, Hello("client")) as peer:
        answer = await peer.call(Large(9 * MiB))
        assert isinstance(answer.payload, memoryview) and len(answer.payload) == 9 * MiB
        answer2 = await peer.call(Slice(300, 500_000))
        assert isinstance(answer2.payload, memoryview)
        assert bytes(answer2.payload) == handlers.file.read_bytes()[300:500_300]


@pytest.mark.parametrize("fail", [Fail, FailAtOnce])
async def test_errors_arrive_as_they_were_raised(
    handlers: Handlers, address: Address, fail: type[Fail] | type[FailAtOnce]
) -> None:
    async with serving(handlers, address) as bound, open_peer(bound, Hello("client")) as peer:
        with pytest.raises(NotFoundError, match="it is not there"):
            await peer.call(fail("known"))
        assert (await peer.call(Echo("still there"))).message == "still there"


@pytest.mark.expect_warnings("a bug in a handler is logged with its traceback")
@pytest.mark.parametrize("fail", [Fail, FailAtOnce])
async def test_a_bug_in_a_handler_is_its_own_request_s(
    handlers: Handlers, address: Address, fail: type[Fail] | type[FailAtOnce]
) -> None:
    async with serving(handlers, address) as bound, open_peer(bound, Hello("client")) as peer:
        with pytest.raises(CachefsError, match="internal error"):
            await peer.call(fail("unknown"))
        assert (await peer.call(Echo("still there"))).message == "still there"


async def test_what_is_sent_over_tcp_is_acknowledged_within_half_a_minute_or_the_connection_is_lost(
    handlers: Handlers,
) -> None:
    async with serving(handlers, TcpAddress("127.0.0.1", 0)) as bound:
        sock = await connect(bound)
        with sock:
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 30_000
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 30


async def test_every_request_that_is_answered_is_observed(handlers: Handlers, address: Address) -> None:
    observed: list[tuple[str, bool]] = []

    def observe(name: str, seconds: float, ok: bool) -> None:
        assert seconds > 0
        observed.append((name, ok))

    handlers.service.observe = observe
    async with serving(handlers, address) as bound, open_peer(bound, Hello("client")) as peer:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(peer.call, Wait())
            await handlers.waiting.wait()
            nursery.cancel_scope.cancel()
        await handlers.cancelled.wait()
        for request in (Echo("x"), EchoAtOnce("x")):
            await peer.call(request)
        for request in (Fail("known"), FailAtOnce("known")):
            with pytest.raises(NotFoundError):
                await peer.call(request)
        async with peer.stream(Count(3)) as items:
            assert [item async for item in items] == [0, 1, 2]
        await trio.testing.wait_all_tasks_blocked()
    assert sorted(observed) == [
        *(("Count", True), ("Echo", True), ("EchoAtOnce", True), ("Fail", False), ("FailAtOnce", False)),
    ]


async def test_an_unknown_request_is_an_error_of_its_own(handlers: Handlers, address: Address) -> None:
    class Unknown(Request[str], frozen=True):
        pass

    async with serving(handlers, address) as bound, open_peer(bound, Hello("client")) as peer:
        with pytest.raises(CachefsError, match="refused"):
            await peer.call(Unknown())
        assert (await peer.call(Echo("still there"))).message == "still there"


async def test_descriptors_are_passed_and_none_is_left(handlers: Handlers, unix: UnixAddress) -> None:
    async with serving(handlers, unix) as bound, open_peer(bound, Hello("client")) as peer:
        await peer.call(Echo("warm up"))
        before = descriptors()
        answer = await peer.call(Descriptor())
        (fd,) = answer.fds
        assert os.pread(fd, 4, 1) == bytes([1, 2, 3, 4]) and not os.get_inheritable(fd)
        os.close(fd)
        # An answer to somebody who has gone: its descriptor is closed by us.
        with trio.CancelScope() as scope:
            scope.cancel()
            await peer.call(Descriptor())
        await peer.call(Echo("behind it"))
        assert descriptors() == before


async def test_cancelling_a_call_cancels_its_handler(handlers: Handlers, address: Address) -> None:
    async with serving(handlers, address) as bound, open_peer(bound, Hello("client")) as peer:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(peer.call, Wait())
            await handlers.waiting.wait()
            nursery.cancel_scope.cancel()
        await handlers.cancelled.wait()
        assert (await peer.call(Echo("still there"))).message == "still there"


async def test_losing_the_client_cancels_its_handlers(handlers: Handlers, address: Address) -> None:
    async with serving(handlers, address) as bound:
        async with open_peer(bound, Hello("client")) as peer, trio.open_nursery() as nursery:
            nursery.start_soon(peer.call, Wait())
            await handlers.waiting.wait()
            nursery.cancel_scope.cancel()
        await handlers.cancelled.wait()


async def test_losing_the_server_fails_what_is_waited_for(handlers: Handlers, address: Address) -> None:
    async with open_background() as outer:
        stop = trio.CancelScope()
        started: list[Address] = []

        async def run(task_status: trio.TaskStatus[None]) -> None:
            with stop:
                async with serving(handlers, address) as bound:
                    started.append(bound)
                    task_status.started()
                    await trio.sleep_forever()

        await outer.start(run)
        async with open_peer(started[0], Hello("client")) as peer, trio.open_nursery() as nursery:
            errors: list[BaseException] = []

            async def wait() -> None:
                try:
                    await peer.call(Wait())
                except TransportError as error:
                    errors.append(error)

            nursery.start_soon(wait)
            await handlers.waiting.wait()
            stop.cancel()
            await peer.closed.wait()
        assert len(errors) == 1
        with pytest.raises(TransportError):
            await peer.call(Echo("too late"))


async def test_streams_come_in_order_and_wait_for_their_reader(handlers: Handlers, address: Address) -> None:
    async with (
        serving(handlers, address) as bound,
        open_peer(bound, Hello("client")) as peer,
        peer.stream(Count(1000)) as items,
    ):
        assert await anext(items) == 0
        # Other calls pass by a stream that nobody reads, and it does not run ahead.
        for _ in range(20):
            await peer.call(Echo("by"))
        assert handlers.sent <= STREAM_WINDOW + 3
        assert [item async for item in items] == list(range(1, 1000))


async def test_leaving_a_stream_ends_it_over_there(handlers: Handlers, address: Address) -> None:
    async with serving(handlers, address) as bound, open_peer(bound, Hello("client")) as peer:
        async with peer.stream(Count(10**9)) as items:
            await anext(items)
        await handlers.stream_closed.wait()
        assert (await peer.call(Echo("still there"))).message == "still there"


async def test_a_stream_that_fails_half_way_says_so(handlers: Handlers, address: Address) -> None:
    async with serving(handlers, address) as bound, open_peer(bound, Hello("client")) as peer:
        seen = []
        with pytest.raises(NotFoundError, match="half way"):
            async with peer.stream(Count(10, fail=True)) as items:
                async for item in items:
                    seen.append(item)
        assert seen == list(range(10))


def raw_connection(address: Address) -> socket.socket:
    if isinstance(address, UnixAddress):
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(address.path)
    else:
        sock = socket.create_connection((address.host, address.port))
    return sock


@pytest.mark.expect_warnings("one line for a malformed frame")
@pytest.mark.parametrize(
    "garbage", [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", HEADER.pack(MAGIC, VERSION, 1, 0, 0, 1 << 31, 0), b"\0" * 100]
)
async def test_garbage_harms_nobody_else(handlers: Handlers, address: Address, garbage: bytes) -> None:
    async with serving(handlers, address) as bound, open_peer(bound, Hello("client")) as peer:
        with raw_connection(bound) as sock:
            sock.sendall(garbage)
            sock.setblocking(False)
            received = b"x"
            while received:
                await trio.lowlevel.wait_readable(sock)
                try:
                    received = sock.recv(4096)
                except ConnectionResetError:
                    break
        assert (await peer.call(Echo("still there"))).message == "still there"


async def test_a_client_that_never_reads_holds_nobody_up(handlers: Handlers, address: Address) -> None:
    async with serving(handlers, address) as bound, open_peer(bound, Hello("client")) as peer:
        with raw_connection(bound) as greedy:
            asking = Connection(asking=True)
            greedy.sendall(asking.hello(Hello("greedy")))
            for number in range(1, 20):
                greedy.sendall(asking.head(Kind.REQUEST, number, Large(8 * MiB)))
            for _ in range(20):
                # Its socket is full; ours is another one.
                assert (await peer.call(Echo("passes"))).message == "passes"
        assert (await peer.call(Echo("passes"))).message == "passes"


async def test_answers_nobody_reads_are_few(handlers: Handlers, address: Address) -> None:
    """Requests wait while answers do, and go on when those are read."""
    async with serving(handlers, address) as bound:
        with raw_connection(bound) as slow:
            asking = Connection(asking=True)
            slow.sendall(asking.hello(Hello("slow")))
            slow.sendall(b"".join(asking.head(Kind.REQUEST, number, Large(8 * MiB)) for number in range(1, 101)))
            async with open_peer(bound, Hello("client")) as peer:
                for _ in range(20):
                    await peer.call(Echo("passes"))
            # 32 MiB, and those that had begun before the first of them could not be sent.
            assert 1 <= handlers.large_answers <= 30
            slow.setblocking(False)
            left = 100
            while left:
                with trio.fail_after(60):
                    await trio.lowlevel.wait_readable(slow)
                with asking.get_buffer() as buffer:
                    count = slow.recv_into(buffer)
                left -= sum(frame.kind is Kind.REPLY for frame in asking.buffer_updated(count))
            assert handlers.large_answers == 100


@pytest.mark.expect_warnings("repeated failures")
async def test_a_storm_of_failures_is_a_few_lines(
    handlers: Handlers, unix: UnixAddress, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Within one period, however long it takes.
    monkeypatch.setattr(service, "LogLimiter", partial(LogLimiter, clock=lambda: 0.0))
    async with serving(handlers, unix) as bound, open_peer(bound, Hello("client")) as peer:
        for _ in range(200):
            with pytest.raises(CachefsError, match="internal error"):
                await peer.call(Fail("unknown"))
        for _ in range(50):
            with raw_connection(bound) as sock:
                sock.sendall(b"x" * 100)
                sock.setblocking(False)
                await trio.lowlevel.wait_readable(sock)
    messages = [record.getMessage() for record in caplog.records]
    assert sum("request failed request=Fail" in message for message in messages) == 10
    assert sum("not a cachefs peer" in message for message in messages) == 10


async def second_frame(sock: socket.socket) -> None:
    """Read HELLO and the first request."""
    answering = Connection(asking=False)
    frames = 0
    while frames < 2:
        await trio.lowlevel.wait_readable(sock)
        with answering.get_buffer() as buffer:
            count = sock.recv_into(buffer)
        frames += len(answering.buffer_updated(count))


@pytest.mark.expect_warnings("the server breaks the rules")
@pytest.mark.parametrize(
    "damage",
    [
        b"\0" * 100,
        HEADER.pack(MAGIC, VERSION, Kind.REQUEST, 0, 1, 0, 0),
        HEADER.pack(MAGIC, VERSION, Kind.REPLY, 0, 1, 1 << 31, 0),
        HEADER.pack(MAGIC, VERSION, Kind.REPLY, 0, 1, 0, 1 << 31),
        HEADER.pack(MAGIC, VERSION, Kind.REPLY, 5, 1, 0, 0),
        HEADER.pack(MAGIC, VERSION, Kind.REPLY, 0, 1, 100, 0) + b"half",
        b"",
    ],
)
async def test_damage_from_a_server_fails_its_calls(damage: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        before = descriptors()
        listener.setblocking(False)
        address = TcpAddress("127.0.0.1", listener.getsockname()[1])

        async def answer() -> None:
            await trio.lowlevel.wait_readable(listener)
            with listener.accept()[0] as sock:
                sock.sendall(Connection(asking=False).hello(Hello("server")))
                await second_frame(sock)
                sock.sendall(damage)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(answer)
            with trio.fail_after(60), pytest.raises(TransportError):
                async with open_peer(address, Hello("client")) as peer:
                    await peer.call(Echo("x"))
        assert descriptors() == before


@pytest.mark.parametrize("meta", [b"", b"\xc1", b"\x80", b"\x91" * 100_000 + b"\xc0", b"\xdb\xff\xff\xff\xff"])
@pytest.mark.parametrize("kind", [Kind.REPLY, Kind.ERROR, Kind.ITEM])
async def test_an_answer_that_is_none_is_an_error_of_its_call(kind: Kind, meta: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        address = TcpAddress("127.0.0.1", listener.getsockname()[1])

        async def answer() -> None:
            await trio.lowlevel.wait_readable(listener)
            with listener.accept()[0] as sock:
                sock.sendall(Connection(asking=False).hello(Hello("server")))
                await second_frame(sock)
                sock.sendall(HEADER.pack(MAGIC, VERSION, kind, 0, 1, len(meta), 0) + meta)
                await trio.lowlevel.wait_readable(sock)
                sock.recv(1000)
                sock.sendall(HEADER.pack(MAGIC, VERSION, Kind.REPLY, 0, 2, 5, 0) + b"\xa4fine")
                await trio.sleep_forever()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(answer)
            async with open_peer(address, Hello("client")) as peer:
                with trio.fail_after(60), pytest.raises(RemoteProtocolError):
                    await peer.call(Echo("x"))
                assert (await peer.call(Echo("y"))).message == "fine"
            nursery.cancel_scope.cancel()


async def test_a_pool_connects_when_needed_and_again_after_a_loss(handlers: Handlers, unix: UnixAddress) -> None:
    async with open_pool(unix, Hello("client")) as pool:
        with pytest.raises(TransportError):
            await pool.call(Echo("nobody listens"))
        for _ in range(2):
            async with serving(handlers, unix):
                while True:
                    try:
                        assert (await pool.call(Echo("hello"))).message == "hello"
                        break
                    except TransportError:
                        await trio.sleep(0.01)  # its pause between connects that fail


async def test_a_unix_socket_is_its_owner_s_alone_and_goes_away(handlers: Handlers, unix: UnixAddress) -> None:
    async with serving(handlers, unix), open_peer(unix, Hello("client")) as peer:
        assert stat.S_IMODE(os.stat(unix.path).st_mode) == 0o600
        await peer.call(Echo("x"))
        assert handlers.sessions[0].credentials == (os.getpid(), os.geteuid(), os.getegid())
    assert not os.path.exists(unix.path)


async def test_a_stale_socket_is_replaced_and_a_living_one_is_not(handlers: Handlers, unix: UnixAddress) -> None:
    with socket.socket(socket.AF_UNIX) as left_behind:
        left_behind.bind(unix.path)
    async with serving(handlers, unix):
        with pytest.raises(ConfigError, match="nobody listens"):
            await serve(handlers.service, [unix], hello=Hello("second"))
        async with open_peer(unix, Hello("client")) as peer:
            assert (await peer.call(Echo("x"))).message == "x"


async def test_a_server_that_says_nothing(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = TcpAddress("127.0.0.1", silent.getsockname()[1])
        with pytest.raises(TransportError, match="no answer"):
            async with open_peer(address, Hello("client"), timeout_s=0.05):
                pass


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("localhost:80", TcpAddress("localhost", 80)),
        ("[::1]:0", TcpAddress("::1", 0)),
        ("/run/x", UnixAddress("/run/x")),
        ("unix:/run/x", UnixAddress("/run/x")),
    ],
)
def test_addresses(text: str, expected: Address) -> None:
    assert parse_address(text) == expected
    assert parse_address(str(expected)) == expected


@pytest.mark.parametrize("text", ["", "host", ":80", "host:", "host:x", "host:70000", "unix:relative", "/" + "x" * 108])
def test_wrong_addresses(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_address(text)
