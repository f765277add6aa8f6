"""The answering side: requests in, handlers' answers out."""

from __future__ import annotations

import errno
import itertools
import logging
import os
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, aclosing, suppress
from typing import Any, TypeVar

import trio

from cachefs.model import (
    CachefsError,
    CapacityError,
    ConfigError,
    LocalProtocolError,
    RemoteProtocolError,
    TransportError,
)
from cachefs.net.addresses import Address, TcpAddress, UnixAddress
from cachefs.net.channel import Answer, Channel, FileSlice, close_all
from cachefs.net.peer import set_tcp_options
from cachefs.wire import (
    STREAM_WINDOW,
    Connection,
    Frame,
    Hello,
    Kind,
    Limits,
    Request,
    RequestDecoder,
    StreamRequest,
    decode_credit,
    to_wire,
)

logger = logging.getLogger(__name__)

Q = TypeVar("Q", bound=Request[Any])
S = TypeVar("S", bound=StreamRequest[Any])

MAX_IN_PROGRESS = 1024
"""Requests of one connection that are being carried out; further ones are refused."""
HELLO_TIMEOUT_S = 10.0
_BACKLOG = 256
_session_ids = itertools.count(1)


class Session:
    """One connection, as handlers see it."""

    def __init__(self, hello: Hello, credentials: tuple[int, int, int] | None) -> None:
        self.id = next(_session_ids)
        """Unique in this process."""
        self.hello = hello
        self.credentials = credentials
        """(pid, uid, gid) on unix sockets."""
        self.closed = trio.Event()


class Service:
    """Which requests are answered, and by what."""

    def __init__(self) -> None:
        self._handlers: dict[type[Any], Callable[[Any, Session], Awaitable[Any]]] = {}
        self._streams: dict[type[Any], Callable[[Any, Session], AsyncGenerator[Any, None]]] = {}
        self._decoder: RequestDecoder | None = None

    def on(self, request_class: type[Q], handler: Callable[[Q, Session], Awaitable[Any]]) -> None:
        """`handler` returns the reply, or an `Answer` with it. What it raises is told to the asker."""
        self._handlers[request_class] = handler

    def on_stream(self, request_class: type[S], handler: Callable[[S, Session], AsyncGenerator[Any, None]]) -> None:
        """`handler` is an async generator of the items."""
        self._streams[request_class] = handler

    def decode(self, frame: Frame) -> Any:
        if self._decoder is None:
            self._decoder = RequestDecoder([*self._handlers, *self._streams])
        request = self._decoder.decode(frame.meta)
        if type(request) not in self._handlers and type(request) not in self._streams:
            raise RemoteProtocolError("request refused: it asks for nothing")
        return request

    def handler(self, request: Any) -> Callable[[Any, Session], Awaitable[Any]] | None:
        return self._handlers.get(type(request))

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
    def __init__(self, channel: Channel, service: Service, session: Session, nursery: trio.Nursery) -> None:
        self._channel = channel
        self._service = service
        self._session = session
        self._nursery = nursery
        self._running: dict[int, _Running] = {}

    async def run(self) -> None:
        """Start a task per request until the asker goes away. CANCEL and CREDIT are never kept waiting behind them."""
        while (frame := await self._channel.receive()) is not None:
            close_all(frame.descriptors)
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
        except CachefsError as error:
            await self._send_error(frame.request_id, error)
            return
        running = self._running[frame.request_id] = _Running()
        self._nursery.start_soon(self._carry_out, frame.request_id, request, running)

    async def _carry_out(self, request_id: int, request: Any, running: _Running) -> None:
        try:
            with running.scope:
                try:
                    handler = self._service.handler(request)
                    if handler is None:
                        await self._answer_stream(request_id, request, running.credit)
                        return
                    answer = await handler(request, self._session)
                except TransportError:
                    if self._channel.closed:
                        return
                    raise
            if not running.scope.cancelled_caught:
                await self._answer(request_id, answer)
        except CachefsError as error:
            await self._send_error(request_id, error)
        except Exception as error:
            logger.exception("request failed request=%s", type(request).__name__)
            await self._send_error(request_id, error)
        finally:
            self._running.pop(request_id, None)

    async def _answer(self, request_id: int, answer: Any) -> None:
        if not isinstance(answer, Answer):
            await self._channel.send(self._channel.connection.head(Kind.REPLY, request_id, answer))
            return
        try:
            payload = answer.payload
            length = payload.length if isinstance(payload, FileSlice) else len(payload)
            head = self._channel.connection.head(Kind.REPLY, request_id, answer.message, length, len(answer.fds))
            await self._channel.send(head, payload, answer.fds)
        finally:
            if answer.close_fds:
                close_all(answer.fds)

    async def _answer_stream(self, request_id: int, request: Any, credit: _Credit) -> None:
        async with aclosing(self._service.stream_handler(request)(request, self._session)) as items:
            async for item in items:
                await credit.take()
                await self._channel.send(self._channel.connection.head(Kind.ITEM, request_id, item))
        await self._channel.send(self._channel.connection.head(Kind.REPLY, request_id))

    async def _send_error(self, request_id: int, error: Exception) -> None:
        try:
            await self._channel.send(self._channel.connection.head(Kind.ERROR, request_id, to_wire(error)))
        except TransportError:
            pass
        except LocalProtocolError:
            logger.exception("error too long to be sent")
            self._channel.close()


async def _serve_connection(sock: socket.socket, service: Service, hello: Hello, limits: Limits | None) -> None:
    channel = Channel(sock, Connection(asking=False, limits=limits))
    session: Session | None = None
    try:
        credentials = channel.peer_credentials()
        if credentials is not None and credentials[1] not in (0, os.geteuid()):
            logger.warning("connection refused uid=%d pid=%d", credentials[1], credentials[0])
            return
        with trio.move_on_after(HELLO_TIMEOUT_S):
            await channel.send(channel.connection.hello(hello))
            if await channel.receive() is None:
                return
        if channel.connection.peer_hello is None:
            logger.info("connection closed reason=no-hello")
            return
        session = Session(channel.connection.peer_hello, credentials)
        async with trio.open_nursery() as nursery:
            try:
                await _ServedConnection(channel, service, session, nursery).run()
            except RemoteProtocolError as error:
                logger.warning("connection closed role=%s error=%s", session.hello.role, error)
            except TransportError as error:
                logger.debug("connection lost role=%s error=%s", session.hello.role, error)
            finally:
                # Closed first, so that a task in the middle of sending an answer to a peer that does not read ends.
                channel.close()
                nursery.cancel_scope.cancel()
    except RemoteProtocolError as error:
        logger.warning("connection closed error=%s", error)
    except TransportError as error:
        logger.debug("connection lost error=%s", error)
    finally:
        channel.close()
        if session is not None:
            session.closed.set()


async def serve(
    service: Service,
    addresses: Sequence[Address],
    *,
    hello: Hello,
    limits: Limits | None = None,
    task_status: trio.TaskStatus[list[Address]] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer on all these addresses until cancelled; every connection is closed then.

    Reports the addresses it is bound to, port 0 replaced by the port it got. A unix socket's file is its owner's alone
    (0600); one that nobody listens on any more is replaced, and it is removed at the end.

    Raises ConfigError for an address that cannot be bound.
    """
    async with AsyncExitStack() as stack:
        listeners = []
        bound: list[Address] = []
        for address in addresses:
            listener = await (_listen_tcp(address) if isinstance(address, TcpAddress) else _listen_unix(address))
            stack.callback(listener.close)
            listeners.append(listener)
            if isinstance(address, TcpAddress):
                bound.append(TcpAddress(address.host, listener.getsockname()[1]))
            else:
                bound.append(address)
                stack.callback(_unlink_own, address.path, os.stat(address.path).st_ino)
        async with trio.open_nursery() as nursery:
            for listener in listeners:
                nursery.start_soon(_accept, listener, service, hello, limits, nursery)
            task_status.started(bound)


async def _accept(
    listener: socket.socket, service: Service, hello: Hello, limits: Limits | None, nursery: trio.Nursery
) -> None:
    while True:
        try:
            sock, _ = listener.accept()
        except BlockingIOError:
            await trio.lowlevel.wait_readable(listener)
            continue
        except OSError as error:
            # Out of descriptors, or the other side is gone already: neither ends the service.
            logger.warning("connection not accepted error=%s", error)
            await trio.sleep(0.1)
            continue
        sock.setblocking(False)
        if sock.family != socket.AF_UNIX:
            set_tcp_options(sock)
        nursery.start_soon(_serve_connection, sock, service, hello, limits)


async def _listen_tcp(address: TcpAddress) -> socket.socket:
    try:
        found = await trio.socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
        family, _, protocol, _, name = found[0]
        sock = socket.socket(family, socket.SOCK_STREAM, protocol)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.setblocking(False)
            sock.bind(name)
            sock.listen(_BACKLOG)
        except BaseException:
            sock.close()
            raise
    except OSError as error:
        raise ConfigError("--listen", str(address), f"an address of this machine that is free ({error})") from error
    return sock


async def _listen_unix(address: UnixAddress) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        try:
            sock.bind(address.path)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or _is_alive(address.path):
                raise
            os.unlink(address.path)
            sock.bind(address.path)
        # Between bind and listen nobody can connect, so there is no moment at which others could.
        os.chmod(address.path, 0o600)
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        raise ConfigError(
            "--socket", address.path, f"a path for a socket that nobody listens on ({error.strerror or error})"
        ) from error
    return sock


def _is_alive(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return True


def _unlink_own(path: str, ino: int) -> None:
    # A successor may have put its own socket there already.
    with suppress(FileNotFoundError):
        if os.stat(path).st_ino == ino:
            os.unlink(path)
