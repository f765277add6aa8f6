"""The asking side: one live connection, and a pool that keeps one."""

from __future__ import annotations

import itertools
import logging
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, nullcontext, suppress
from typing import Any, TypeVar

import outcome
import trio

from cachefs.model import AuthenticationError, CachefsError, HandshakeError, RemoteProtocolError, TransportError
from cachefs.net.addresses import Address, TcpAddress
from cachefs.net.background import open_background
from cachefs.net.channel import Answer, Channel, close_all
from cachefs.net.security import Security
from cachefs.net.tls import TlsChannel
from cachefs.wire import (
    STREAM_WINDOW,
    Connection,
    Frame,
    Hello,
    Kind,
    Limits,
    ReplyDecoders,
    Request,
    StreamRequest,
    decode_error,
    from_wire,
)

logger = logging.getLogger(__name__)

R = TypeVar("R")

MAX_CALLS = 512
"""Requests in progress on one connection; more wait for their turn. Servers accept more than that."""
_UNACKNOWLEDGED_MS = 30_000
"""How long what was sent may go without an acknowledgement before the connection is lost."""
_decoders = ReplyDecoders()


class _Call:
    """A request whose answer is awaited."""

    def __init__(self, request_class: type[Any]) -> None:
        self.request_class = request_class
        self.done = trio.Event()
        self.result: outcome.Outcome[Answer[Any]] | None = None

    def take(self, frame: Frame) -> bool:
        """True when no more frames belong to it."""
        self.result = outcome.capture(self._decode, frame)
        self.done.set()
        return True

    def _decode(self, frame: Frame) -> Answer[Any]:
        try:
            if frame.kind is Kind.ERROR:
                raise from_wire(decode_error(frame.meta))
            if frame.kind is not Kind.REPLY:
                raise RemoteProtocolError(f"{frame.kind.name} in answer to a call")
            return Answer(_decoders.decode(self.request_class, frame.meta), frame.payload, frame.descriptors)
        except BaseException:
            close_all(frame.descriptors)
            raise

    def fail(self, error: CachefsError) -> None:
        self.result = outcome.Error(error)
        self.done.set()

    def abandon(self) -> None:
        """Nobody will take the result."""
        if isinstance(self.result, outcome.Value):
            close_all(self.result.value.fds)


class _Stream:
    """A stream request whose items are awaited."""

    def __init__(self, request_class: type[Any]) -> None:
        self._request_class = request_class
        # One more than the window, for the end; more than that breaks the rules.
        self.send, self.receive = trio.open_memory_channel[outcome.Outcome[Any]](STREAM_WINDOW + 1)

    def take(self, frame: Frame) -> bool:
        close_all(frame.descriptors)
        if frame.kind is Kind.REPLY:
            self.send.close()
            return True
        item = outcome.capture(self._decode, frame)
        try:
            self.send.send_nowait(item)
        except trio.WouldBlock:
            raise RemoteProtocolError("more items than the receiver asked for") from None
        if isinstance(item, outcome.Error):
            self.send.close()
            return True
        return False

    def _decode(self, frame: Frame) -> Any:
        if frame.kind is Kind.ERROR:
            raise from_wire(decode_error(frame.meta))
        return _decoders.decode(self._request_class, frame.meta)

    def fail(self, error: CachefsError) -> None:
        with suppress(trio.WouldBlock, trio.ClosedResourceError):
            self.send.send_nowait(outcome.Error(error))
        self.send.close()

    def abandon(self) -> None:
        pass


class Peer:
    """One live connection to a service. Made by `open_peer`."""

    def __init__(self, channel: Channel, address: Address, hello: Hello, nursery: trio.Nursery) -> None:
        self.address = address
        self.hello = hello
        """What the service said of itself."""
        self.closed = trio.Event()
        """Set when the connection is of no use any more."""
        self._channel = channel
        self._nursery = nursery
        self._ids = itertools.count(1)
        self._waiting: dict[int, _Call | _Stream] = {}
        self._turns = trio.CapacityLimiter(MAX_CALLS)
        self._error: CachefsError = TransportError(f"{address}: connection closed")

    @property
    def arrivals(self) -> int:
        """Grows with whatever comes from the other side."""
        return self._channel.arrivals

    async def call(self, request: Request[R], *, out_of_turn: bool = False) -> Answer[R]:
        """Ask and wait for the answer; its descriptors are the caller's to close. `out_of_turn`: however many are under
        way.

        Raises the error the service raised, and TransportError when the connection is lost before the answer: the
        request may have been carried out then. Cancelling tells the service that the answer is not wanted.
        """
        call = _Call(type(request))
        async with nullcontext() if out_of_turn else self._turn(), self._asked(request, call):
            await call.done.wait()
            # Taken before anything that could be cancelled, so that no descriptor is left behind.
            assert call.result is not None
            result, call.result = call.result, None
        answer: Answer[R] = result.unwrap()
        return answer

    @asynccontextmanager
    async def stream(self, request: StreamRequest[R]) -> AsyncGenerator[AsyncIterator[R], None]:
        """Ask, and iterate over the answers as they come; the service is at most a few items ahead.

        The iterator raises as `call`. Leaving the block before the end tells the service to stop.
        """
        stream = _Stream(type(request))
        async with self._turn(), self._asked(request, stream) as request_id:

            async def items() -> AsyncGenerator[R, None]:
                async for item in stream.receive:
                    value: R = item.unwrap()
                    yield value
                    if request_id in self._waiting:
                        await self._channel.send(self._channel.connection.head(Kind.CREDIT, request_id, 1))

            iterator = items()
            try:
                yield iterator
            finally:
                await iterator.aclose()

    @asynccontextmanager
    async def _turn(self) -> AsyncGenerator[None, None]:
        token = object()
        try:
            self._turns.acquire_on_behalf_of_nowait(token)
        except trio.WouldBlock:
            await self._turns.acquire_on_behalf_of(token)
        try:
            yield
        finally:
            self._turns.release_on_behalf_of(token)

    @asynccontextmanager
    async def _asked(
        self, request: Request[Any] | StreamRequest[Any], call: _Call | _Stream
    ) -> AsyncGenerator[int, None]:
        """Sends the request; on leaving the block without an answer, sends CANCEL."""
        if self.closed.is_set():
            raise self._error
        request_id = next(self._ids)
        head = self._channel.connection.head(Kind.REQUEST, request_id, request)
        self._waiting[request_id] = call
        try:
            await self._channel.send(head)
            yield request_id
        finally:
            if self._waiting.pop(request_id, None) is not None and not self.closed.is_set():
                self._nursery.start_soon(self._send_cancel, request_id)
            call.abandon()

    async def _send_cancel(self, request_id: int) -> None:
        with suppress(TransportError):
            await self._channel.send(self._channel.connection.head(Kind.CANCEL, request_id))

    def end(self) -> None:
        """Close the connection; what is under way is lost."""
        self._nursery.cancel_scope.cancel()

    async def _receive(self) -> None:
        """Deliver what arrives until the connection ends."""
        try:
            while (frame := await self._channel.receive()) is not None:
                call = self._waiting.get(frame.request_id)
                if call is None:
                    # Its asker has gone.
                    close_all(frame.descriptors)
                elif call.take(frame):
                    del self._waiting[frame.request_id]
            self._error = TransportError(f"{self.address}: the other side closed the connection")
        except RemoteProtocolError as error:
            logger.warning("connection closed address=%s error=%s", self.address, error)
            self._error = TransportError(f"{self.address}: {error}")
        except TransportError as error:
            self._error = TransportError(f"{self.address}: {error}")
        finally:
            self.closed.set()
            self._channel.close()
            waiting, self._waiting = self._waiting, {}
            for call in waiting.values():
                call.fail(self._error)


async def connect(address: Address) -> socket.socket:
    """A connected, non-blocking socket. Raises TransportError. Cancelling leaves nothing open."""
    try:
        if isinstance(address, TcpAddress):
            stream = await trio.open_tcp_stream(address.host, address.port)
            sock = stream.socket
            set_tcp_options(sock)
        else:
            sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                await sock.connect(address.path)
            except BaseException:
                sock.close()
                raise
    except OSError as error:
        raise TransportError(f"{address}: cannot connect: {error.strerror or error}") from error
    # Ours to drive from here on: the frames want recvmsg, sendmsg and sendfile without trio's wrapper in between.
    raw = socket.socket(sock.family, sock.type, sock.proto, fileno=sock.detach())
    raw.setblocking(False)
    return raw


def set_tcp_options(sock: Any) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # A peer that vanished with its node, or is cut off, is noticed within 40 s where nothing is under way: one probe
    # after 30 s, and 10 s for its answer.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
    # Where something is, it would be sent again and again for 15 minutes. This also ends a connection whose other side
    # takes nothing in for so long, with its buffers full.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNACKNOWLEDGED_MS)


def _channel_over(sock: socket.socket, address: Address, limits: Limits | None, security: Security | None) -> Channel:
    if security is None or not isinstance(address, TcpAddress):
        return Channel(sock, Connection(asking=True, limits=limits))
    connection = Connection(asking=True, limits=limits, handshake=security.asking())
    if security.client_tls is None:
        return Channel(sock, connection)
    return TlsChannel(sock, connection, security.client_tls, address.host)


async def _greet(channel: Channel, hello: Hello) -> None:
    """Until both sides know who the other is. Raises AuthenticationError, RemoteProtocolError, TransportError."""
    connection = channel.connection
    if isinstance(channel, TlsChannel):
        await channel.handshake()
        assert connection.handshake is not None
        connection.handshake.binding = channel.peer_certificate_sha256()
    await channel.send(connection.hello(hello))
    frame = await channel.receive()
    if frame is not None and connection.handshake is not None:
        await channel.send(connection.auth())
        frame = await channel.receive()
    if frame is None:
        why = "; it speaks TLS, see --tls-ca" if connection.met_tls else ""
        raise TransportError(f"the other side closed the connection at once{why}")


async def run_peer(
    address: Address,
    hello: Hello,
    limits: Limits | None = None,
    timeout_s: float = 10.0,
    security: Security | None = None,
    *,
    task_status: trio.TaskStatus[Peer],
) -> None:
    """Connect, report the `Peer`, and serve it until the connection ends.

    Raises TransportError before it is up, of the kind HandshakeError when one side does not accept the other.
    """
    channel = None
    try:
        with trio.move_on_after(timeout_s) as scope:
            sock = await connect(address)
            try:
                channel = _channel_over(sock, address, limits, security)
            except BaseException:
                sock.close()
                raise
            try:
                await _greet(channel, hello)
            except AuthenticationError as error:
                raise HandshakeError(f"{address}: {error}") from error
            except (RemoteProtocolError, TransportError) as error:
                raise TransportError(f"{address}: {error}") from error
        if scope.cancelled_caught or channel is None or channel.connection.peer_hello is None:
            raise TransportError(f"{address}: no answer within {timeout_s:g} s")
        async with trio.open_nursery() as nursery:
            peer = Peer(channel, address, channel.connection.peer_hello, nursery)
            task_status.started(peer)
            await peer._receive()
            nursery.cancel_scope.cancel()
    finally:
        if channel is not None:
            channel.close()


@asynccontextmanager
async def open_peer(
    address: Address,
    hello: Hello,
    limits: Limits | None = None,
    timeout_s: float = 10.0,
    security: Security | None = None,
) -> AsyncGenerator[Peer, None]:
    """A connection for as long as the block lasts. Raises TransportError when there is none within the timeout."""
    async with open_background() as nursery:
        yield await start_peer(nursery, address, hello, limits, timeout_s, security)


async def start_peer(
    nursery: trio.Nursery,
    address: Address,
    hello: Hello,
    limits: Limits | None = None,
    timeout_s: float = 10.0,
    security: Security | None = None,
) -> Peer:
    """A `Peer` that lives in the nursery, and whose end is no error there. Raises TransportError."""

    async def run(task_status: trio.TaskStatus[outcome.Outcome[Peer]]) -> None:
        class Started:
            def started(self, value: Peer) -> None:
                task_status.started(outcome.Value(value))

        try:
            await run_peer(address, hello, limits, timeout_s, security, task_status=Started())  # type: ignore[arg-type]
        except TransportError as error:
            task_status.started(outcome.Error(error))

    started: outcome.Outcome[Peer] = await nursery.start(run)
    return started.unwrap()


class Pool:
    """Keeps one connection to one address: made at the first request, and again at the first after a loss.

    It repeats no request. Between two connects that fail it waits longer and longer, and whoever asks meanwhile gets
    the TransportError at once.
    """

    def __init__(
        self,
        address: Address,
        hello: Hello,
        connect_timeout_s: float,
        nursery: trio.Nursery,
        security: Security | None = None,
    ) -> None:
        self.address = address
        self._hello = hello
        self._security = security
        self._connect_timeout_s = connect_timeout_s
        self._nursery = nursery
        self._peer: Peer | None = None
        self._connecting = trio.Lock()
        self._pause_s = 0.0
        self._not_before = 0.0
        self._last_error = TransportError(f"{address}: not connected")
        self._users = 0
        self._retired = False

    async def call(self, request: Request[R]) -> Answer[R]:
        """As `Peer.call`; TransportError also when there is no connection to be had."""
        with self._used():
            return await (await self.peer()).call(request)

    @asynccontextmanager
    async def stream(self, request: StreamRequest[R]) -> AsyncGenerator[AsyncIterator[R], None]:
        """As `Peer.stream`; TransportError also when there is no connection to be had."""
        with self._used():
            async with (await self.peer()).stream(request) as items:
                yield items

    def retire(self) -> None:
        """Another one takes its place: its connection is closed as soon as nothing is under way."""
        self._retired = True
        with self._used():
            pass

    @contextmanager
    def _used(self) -> Iterator[None]:
        self._users += 1
        try:
            yield
        finally:
            self._users -= 1
            if self._retired and not self._users and self._peer is not None:
                self._peer.end()

    @property
    def arrivals(self) -> tuple[int, int]:
        """Changes with whatever comes by its connection, and with a new connection."""
        return (id(self._peer), self._peer.arrivals) if self._peer is not None else (0, 0)

    async def peer(self) -> Peer:
        """The live connection. Raises TransportError."""
        if self._peer is not None and not self._peer.closed.is_set():
            return self._peer
        async with self._connecting:
            if self._peer is not None and not self._peer.closed.is_set():
                return self._peer
            if trio.current_time() < self._not_before:
                raise self._last_error
            try:
                self._peer = await start_peer(
                    self._nursery,
                    self.address,
                    self._hello,
                    timeout_s=self._connect_timeout_s,
                    security=self._security,
                )
            except TransportError as error:
                self._last_error = error
                self._pause_s = min(1.0, max(0.02, 2 * self._pause_s))
                self._not_before = trio.current_time() + self._pause_s
                raise
            self._pause_s = 0.0
            return self._peer


@asynccontextmanager
async def open_pool(
    address: Address, hello: Hello, connect_timeout_s: float = 5.0, security: Security | None = None
) -> AsyncGenerator[Pool, None]:
    """A pool for as long as the block lasts; connects when it is first used."""
    async with open_background() as nursery:
        yield Pool(address, hello, connect_timeout_s, nursery, security)
