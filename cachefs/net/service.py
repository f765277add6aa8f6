"""The answering side: requests in, handlers' answers out."""

from __future__ import annotations

import itertools
import logging
import os
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from time import perf_counter
from typing import Any, TypeVar

import trio

from cachefs.model import (
    AuthenticationError,
    CachefsError,
    CapacityError,
    LogLimiter,
    MiB,
    RemoteProtocolError,
    TransportError,
)
from cachefs.net.addresses import Address
from cachefs.net.channel import Answer, Body, Channel, FileSlice, StalledError, close_all
from cachefs.net.payloads import Room, of_this_process
from cachefs.net.peer import set_tcp_options
from cachefs.net.security import Security
from cachefs.net.sockets import Listener, listening
from cachefs.net.tls import TlsChannel
from cachefs.wire import (
    STREAM_WINDOW,
    Connection,
    Frame,
    Hello,
    Kind,
    Limits,
    Request,
    RequestDecoder,
    Role,
    StreamRequest,
    decode_credit,
    to_wire,
)

logger = logging.getLogger(__name__)

Q = TypeVar("Q", bound=Request[Any])
S = TypeVar("S", bound=StreamRequest[Any])

MAX_IN_PROGRESS = 1024
"""Requests of one connection that are not answered yet; further ones are refused."""
MAX_RUNNING = 256
"""Of those, how many are carried out at once, answers that wait to be sent included; the others wait for their turn."""
MAX_UNSENT_BYTES = 32 * MiB
"""Answers of one connection that wait to be sent; above it, no further request is begun."""
MAX_UNGREETED = 512
"""Connections that have not said who they are; above it, the oldest one is closed."""
HELLO_TIMEOUT_S = 10.0
_DESCRIPTOR_COST = MiB
"""What an open file in an unsent answer counts for."""
_session_ids = itertools.count(1)


EVERYONE = frozenset(Role)
WORKERS = frozenset({Role.WORKER})
ADMINS = frozenset({Role.ADMIN})
UNLISTED = WORKERS | ADMINS
Allowed = Mapping[type[Any], frozenset[Role]]
"""Request class -> the roles that may make it."""


class _Unsent:
    """Answers that wait until the other side takes them."""

    def __init__(self) -> None:
        self._bytes = 0
        self._room = trio.Event()

    def add(self, count: int) -> None:
        self._bytes += count

    def remove(self, count: int) -> None:
        self._bytes -= count
        if self._bytes <= MAX_UNSENT_BYTES:
            self._room.set()

    async def wait_for_room(self) -> None:
        while self._bytes > MAX_UNSENT_BYTES:
            if self._room.is_set():
                self._room = trio.Event()
            await self._room.wait()


class Session:
    """One connection, as handlers see it."""

    def __init__(self, hello: Hello, credentials: tuple[int, int, int] | None = None, role: Role | None = None) -> None:
        self.id = next(_session_ids)
        """Unique in this process."""
        self.hello = hello
        self.credentials = credentials
        """(pid, uid, gid) on unix sockets."""
        self.role = role
        """What the other side has proved to be; None, which may do everything: on unix sockets, and without tokens."""
        self.closed = trio.Event()

    async def room_for_payload(self, count: int, store: str = "") -> Room:
        """Wait until not too many bytes are being made, or wait to be sent, for all connections of this process (see
        `Payloads`); then make `count`, by reading that store; empty: they are here. To be given back once, when they
        are sent (`Answer.on_sent`) or given up.
        """
        return await of_this_process.take(self.id, count, store)


class Service:
    """Which requests are answered, to whom, and by what."""

    def __init__(self, allowed: Allowed | None = None) -> None:
        """`allowed`: who may ask what; only workers and admins may ask what is not in it."""
        self._allowed = allowed or {}
        self.observe: Callable[[str, float, bool], None] | None = None
        """Called with the name of each request that was answered, the seconds that took, and whether with no error."""
        self._handlers: dict[type[Any], Callable[[Any, Session], Awaitable[Any]]] = {}
        self._at_once: dict[type[Any], Callable[[Any, Session], Any]] = {}
        self._streams: dict[type[Any], Callable[[Any, Session], AsyncGenerator[Any, None]]] = {}
        self._decoder: RequestDecoder | None = None

    def on(self, request_class: type[Q], handler: Callable[[Q, Session], Awaitable[Any]]) -> None:
        """`handler` returns the reply, or an `Answer` with it. What it raises is told to the asker."""
        self._handlers[request_class] = handler

    def on_at_once(self, request_class: type[Q], handler: Callable[[Q, Session], Any]) -> None:
        """As `on`, of what needs no waiting: it gets no task of its own, which would cost more than the answer."""
        self._at_once[request_class] = handler

    def on_stream(self, request_class: type[S], handler: Callable[[S, Session], AsyncGenerator[Any, None]]) -> None:
        """`handler` is an async generator of the items."""
        self._streams[request_class] = handler

    def check(self, request: Any, session: Session) -> None:
        """Raises AuthenticationError for a request that this session may not make."""
        if session.role is None:
            return
        request_class = type(request)
        allowed = self._allowed.get(request_class, UNLISTED)
        if session.role not in allowed:
            roles = " or ".join(sorted(allowed))
            raise AuthenticationError(f"{request_class.__name__} needs the token of {roles}, not of {session.role}")

    def decode(self, frame: Frame) -> Any:
        if self._decoder is None:
            self._decoder = RequestDecoder([*self._handlers, *self._at_once, *self._streams])
        request = self._decoder.decode(frame.meta)
        if not any(type(request) in known for known in (self._handlers, self._at_once, self._streams)):
            raise RemoteProtocolError("request refused: it asks for nothing")
        return request

    def handler(self, request: Any) -> Callable[[Any, Session], Awaitable[Any]] | None:
        return self._handlers.get(type(request))

    def handler_at_once(self, request: Any) -> Callable[[Any, Session], Any] | None:
        return self._at_once.get(type(request))

    def stream_handler(self, request: Any) -> Callable[[Any, Session], AsyncGenerator[Any, None]]:
        return self._streams[type(request)]


class _Credit:
    """Items that a stream may still send."""

    def __init__(self) -> None:
        self._left = STREAM_WINDOW
        self._more = trio.Event()

    def add(self, count: int) -> None:
        self._left += count
        self._more.set()

    async def take(self) -> None:
        while self._left == 0:
            self._more = trio.Event()
            await self._more.wait()
        self._left -= 1


class _Running:
    """A request that is being carried out."""

    def __init__(self) -> None:
        self.scope = trio.CancelScope()
        self.credit = _Credit()


class _ServedConnection:
    def __init__(
        self, channel: Channel, service: Service, session: Session, log: LogLimiter, nursery: trio.Nursery
    ) -> None:
        self._channel = channel
        self._service = service
        self._session = session
        self._log = log
        self._nursery = nursery
        self._running: dict[int, _Running] = {}
        self._turns = trio.CapacityLimiter(MAX_RUNNING)
        self._unsent = _Unsent()

    async def run(self) -> None:
        """Start a task per request until the asker goes away. CANCEL and CREDIT are never kept waiting behind them.

        A refusal is sent from here: while the asker does not read those, it is not read either.
        """
        while (frame := await self._channel.receive()) is not None:
            running = self._running.get(frame.request_id)
            if frame.kind is Kind.CANCEL:
                if running is not None:
                    running.scope.cancel()
            elif frame.kind is Kind.CREDIT:
                credit = decode_credit(frame.meta)
                if running is not None:
                    running.credit.add(credit)
            elif running is not None:
                raise RemoteProtocolError(f"request id {frame.request_id} is in use")
            else:
                await self._start(frame)

    async def _start(self, frame: Frame) -> None:
        try:
            if len(self._running) >= MAX_IN_PROGRESS:
                raise CapacityError(f"more than {MAX_IN_PROGRESS} requests at once on one connection")
            request = self._service.decode(frame)
            self._service.check(request, self._session)
        except CachefsError as error:
            await self._send_error(frame.request_id, error)
            return
        at_once = self._service.handler_at_once(request)
        if at_once is not None:
            began = perf_counter()
            try:
                await self._answer(frame.request_id, at_once(request, self._session))
                self._observe(request, began)
            except Exception as error:
                await self._failed(frame.request_id, request, error, began)
            return
        running = self._running[frame.request_id] = _Running()
        self._nursery.start_soon(self._carry_out, frame.request_id, request, running)

    async def _carry_out(self, request_id: int, request: Any, running: _Running) -> None:
        began = perf_counter()
        try:
            with running.scope:
                try:
                    self._turns.acquire_on_behalf_of_nowait(running)
                except trio.WouldBlock:
                    await self._turns.acquire_on_behalf_of(running)
                await self._unsent.wait_for_room()
                try:
                    handler = self._service.handler(request)
                    if handler is None:
                        await self._answer_stream(request_id, request, running.credit)
                        self._observe(request, began)
                        return
                    answer = await handler(request, self._session)
                except TransportError:
                    if self._channel.closed:
                        return
                    raise
            if not running.scope.cancelled_caught:
                await self._answer(request_id, answer)
                self._observe(request, began)
        except Exception as error:
            await self._failed(request_id, request, error, began)
        finally:
            with suppress(RuntimeError):  # cancelled before its turn came
                self._turns.release_on_behalf_of(running)
            self._running.pop(request_id, None)

    def _observe(self, request: Any, began: float, ok: bool = True) -> None:
        if self._service.observe is not None:
            self._service.observe(type(request).__name__, perf_counter() - began, ok)

    async def _failed(self, request_id: int, request: Any, error: Exception, began: float) -> None:
        if not isinstance(error, CachefsError):
            name = type(request).__name__
            kind = ("request failed", name, type(error).__name__)
            self._log.log(logging.ERROR, kind, "request failed request=%s error=%r", name, error, exc_info=error)
        await self._send_error(request_id, error)
        self._observe(request, began, ok=False)

    async def _answer(self, request_id: int, answer: Any) -> None:
        if not isinstance(answer, Answer):
            await self._send(self._channel.connection.head(Kind.REPLY, request_id, answer))
            return
        try:
            payload = answer.payload
            length = payload.length if isinstance(payload, FileSlice) else len(payload)
            head = self._channel.connection.head(Kind.REPLY, request_id, answer.message, length, len(answer.fds))
            await self._send(head, payload, answer.fds)
        finally:
            if answer.close_fds:
                close_all(answer.fds)
            if answer.on_sent is not None:
                answer.on_sent()

    async def _send(self, head: bytes, payload: Body = b"", fds: Sequence[int] = ()) -> None:
        cost = len(head) + len(fds) * _DESCRIPTOR_COST
        cost += _DESCRIPTOR_COST if isinstance(payload, FileSlice) else len(payload)
        self._unsent.add(cost)
        try:
            await self._channel.send(head, payload, fds)
        except StalledError as error:
            role = self._session.hello.role
            self._log.log(logging.WARNING, "stalled", "connection closed role=%s error=%s", role, error)
            raise
        finally:
            self._unsent.remove(cost)

    async def _answer_stream(self, request_id: int, request: Any, credit: _Credit) -> None:
        async with aclosing(self._service.stream_handler(request)(request, self._session)) as items:
            async for item in items:
                await credit.take()
                await self._send(self._channel.connection.head(Kind.ITEM, request_id, item))
        await self._send(self._channel.connection.head(Kind.REPLY, request_id))

    async def _send_error(self, request_id: int, error: Exception) -> None:
        try:
            await self._send(self._channel.connection.head(Kind.ERROR, request_id, to_wire(error)))
        except TransportError:
            pass


class _Listening:
    """What the connections of one `serve` share."""

    def __init__(self, service: Service, hello: Hello, limits: Limits | None, security: Security | None) -> None:
        self._service = service
        self._hello = hello
        self._limits = limits
        self._security = security
        self._ungreeted: dict[Channel, None] = {}
        self.log = LogLimiter(logger)

    async def serve_connection(self, sock: socket.socket) -> None:
        """Until it ends, which is never an error of ours."""
        channel = self._channel_over(sock)
        session: Session | None = None
        try:
            if sock.family != socket.AF_UNIX:
                set_tcp_options(sock)
            session = await self._greet(channel)
            if session is not None:
                await self._serve_session(channel, session)
        except RemoteProtocolError as error:
            role = session.hello.role if session is not None else "unknown"
            self.log.log(logging.WARNING, "malformed", "connection closed role=%s error=%s", role, error)
        except (TransportError, OSError) as error:
            logger.debug("connection lost error=%s", error)
        except Exception as error:
            # A bug, of this connection alone.
            self.log.log(logging.ERROR, "bug", "connection failed error=%r", error, exc_info=error)
        finally:
            channel.close()
            if session is not None:
                session.closed.set()

    def _channel_over(self, sock: socket.socket) -> Channel:
        if self._security is None or sock.family == socket.AF_UNIX:
            return Channel(sock, Connection(asking=False, limits=self._limits))
        connection = Connection(asking=False, limits=self._limits, handshake=self._security.answering())
        if self._security.server_tls is None:
            return Channel(sock, connection)
        return TlsChannel(sock, connection, self._security.server_tls)

    async def _greet(self, channel: Channel) -> Session | None:
        """None when the other side may not connect, or does not say who it is in time."""
        credentials = channel.peer_credentials()
        if credentials is not None and credentials[1] not in (0, os.geteuid()):
            uid, pid = credentials[1], credentials[0]
            self.log.log(logging.WARNING, "refused", "connection refused uid=%d pid=%d", uid, pid)
            return None
        if len(self._ungreeted) >= MAX_UNGREETED:
            # Whoever means well says hello at once, so it is not the newest one that keeps silent.
            oldest = next(iter(self._ungreeted))
            del self._ungreeted[oldest]
            oldest.close()
        self._ungreeted[channel] = None
        try:
            with trio.move_on_after(HELLO_TIMEOUT_S):
                if not await self._exchange(channel):
                    return None
        finally:
            self._ungreeted.pop(channel, None)
        connection = channel.connection
        if connection.peer_hello is None or not connection.is_open:
            self.log.log(logging.INFO, "silent", "connection closed reason=no-hello")
            return None
        return Session(connection.peer_hello, credentials, connection.role)

    async def _exchange(self, channel: Channel) -> bool:
        """Until both sides know who the other is. False when this one does not accept the other, or it leaves."""
        connection = channel.connection
        if isinstance(channel, TlsChannel):
            try:
                await channel.handshake()
            except TransportError as error:
                where = channel.peer_host()
                self.log.log(logging.WARNING, "no tls", "connection refused from=%s error=%s", where, error)
                await channel.finish()
                return False
        try:
            await channel.send(connection.hello(self._hello))
            if await channel.receive() is None:
                return False
            if connection.handshake is None:
                return True
            if await channel.receive() is None:
                return False
            await channel.send(connection.auth())
            return True
        except AuthenticationError as error:
            where, hello = channel.peer_host(), connection.peer_hello
            role = hello.token or hello.role if hello is not None else "unknown"
            message = "connection refused from=%s role=%s error=%s"
            self.log.log(logging.WARNING, "unauthenticated", message, where, role, error)
            # Why is for our log only: who asks has proved nothing.
            await channel.send(connection.refusal(AuthenticationError("not accepted")))
            await channel.finish()
            return False

    async def _serve_session(self, channel: Channel, session: Session) -> None:
        error: CachefsError | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_close_at_end, channel)
            try:
                await _ServedConnection(channel, self._service, session, self.log, nursery).run()
            except (RemoteProtocolError, TransportError) as raised:
                error = raised
            nursery.cancel_scope.cancel()
        if error is not None:
            raise error


async def _close_at_end(channel: Channel) -> None:
    """So that a task in the middle of sending something to a peer that does not read, which is shielded, ends too."""
    try:
        await trio.sleep_forever()
    finally:
        channel.close()


async def serve_on(
    service: Service,
    listeners: Sequence[Listener],
    *,
    hello: Hello,
    limits: Limits | None = None,
    security: Security | None = None,
) -> None:
    """Answer whoever connects until cancelled; every connection is closed then.

    With `security`, to those over TCP who prove what it demands; over unix sockets to processes of this user or root.
    """
    shared = _Listening(service, hello, limits, security)
    async with trio.open_nursery() as nursery:
        for listener in listeners:
            nursery.start_soon(_accept, listener.sock, shared, nursery)


async def serve(
    service: Service,
    addresses: Sequence[Address],
    *,
    hello: Hello,
    limits: Limits | None = None,
    security: Security | None = None,
    task_status: trio.TaskStatus[list[Address]] = trio.TASK_STATUS_IGNORED,
) -> None:
    """`listening` and `serve_on`; reports the addresses it is bound to. Raises as `listening`."""
    async with listening(addresses) as listeners:
        task_status.started([listener.address for listener in listeners])
        await serve_on(service, listeners, hello=hello, limits=limits, security=security)


async def _accept(listener: socket.socket, listening: _Listening, nursery: trio.Nursery) -> None:
    while True:
        try:
            sock, _ = listener.accept()
        except BlockingIOError:
            await trio.lowlevel.wait_readable(listener)
            continue
        except OSError as error:
            # Out of descriptors, or the other side is gone already: neither ends the service.
            listening.log.log(logging.WARNING, "not accepted", "connection not accepted error=%s", error)
            await trio.sleep(0.1)
            continue
        sock.setblocking(False)
        nursery.start_soon(listening.serve_connection, sock)
        # However many come, they do not keep everybody else from running.
        await trio.lowlevel.checkpoint()
