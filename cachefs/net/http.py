"""A small HTTP server for what monitoring asks: GET and HEAD of a few paths, one request a connection.

    request complete within REQUEST_TIMEOUT_S? -> h11 understands it? -> GET or HEAD? -> `answer` knows the path?
               no: closed, or 408                     no: 400, 431       no: 405            no: 404

Plain HTTP without authentication: what is answered must be fit for everybody who can connect.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from http import HTTPStatus

import h11
import trio

from cachefs.model import ConfigError, LogLimiter
from cachefs.net.addresses import TcpAddress
from cachefs.net.background import open_background
from cachefs.net.sockets import listening

logger = logging.getLogger(__name__)

MAX_CONNECTIONS = 32
"""With more, the oldest one is closed: who asks for something is through in no time."""
MAX_HEAD_BYTES = 16 * 1024
"""Of a request's line and headers."""
REQUEST_TIMEOUT_S = 10.0
"""For all of a connection, from its start until the answer is sent."""
LINGER_S = 1.0
"""How long what is still sent to us is read and thrown away: closing earlier would take our answer back."""
_CHUNK = 8192
_ALLOWED = (b"GET", b"HEAD")

HttpAnswer = tuple[int, str, bytes]
"""(status, content type, body)."""
AnswerPath = Callable[[str], Awaitable[HttpAnswer | None]]
"""What is at a path; None: nothing. What it raises is answered with 500, and logged."""


@asynccontextmanager
async def serving_http(
    address: TcpAddress, answer: AnswerPath, *, timeout_s: float = REQUEST_TIMEOUT_S
) -> AsyncGenerator[TcpAddress, None]:
    """Answers until the end of the block; gives the address it got. Raises ConfigError for one that cannot be bound."""
    async with AsyncExitStack() as stack:
        try:
            (listener,) = await stack.enter_async_context(listening([address]))
        except ConfigError as error:
            raise ConfigError("--http", error.value, error.accepted) from error
        nursery = await stack.enter_async_context(open_background())
        accepting = trio.SocketListener(trio.socket.from_stdlib_socket(listener.sock))
        nursery.start_soon(trio.serve_listeners, _Server(answer, timeout_s).serve, [accepting])
        yield address._replace(port=listener.sock.getsockname()[1])


class _Server:
    def __init__(self, answer: AnswerPath, timeout_s: float) -> None:
        self._answer = answer
        self._timeout_s = timeout_s
        self._open: dict[trio.CancelScope, None] = {}
        """One of each connection, the oldest first."""
        self._log = LogLimiter(logger)

    async def serve(self, stream: trio.SocketStream) -> None:
        """Never raises."""
        if len(self._open) >= MAX_CONNECTIONS:
            oldest = next(iter(self._open))
            del self._open[oldest]
            oldest.cancel()
        with trio.CancelScope() as scope:
            self._open[scope] = None
            try:
                await self._serve(stream)
            except (trio.BrokenResourceError, trio.ClosedResourceError, OSError) as error:
                logger.debug("connection lost error=%s", error)
            except Exception as error:
                self._log.log(logging.ERROR, "bug", "connection failed error=%r", error, exc_info=error)
            finally:
                self._open.pop(scope, None)
                stream.socket.close()

    async def _serve(self, stream: trio.SocketStream) -> None:
        connection = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD_BYTES)
        with trio.move_on_after(self._timeout_s) as scope:
            try:
                request = await _receive(connection, stream)
                if request is None:
                    return
                await _send(connection, stream, *await self._answer_to(request), head_only=request.method == b"HEAD")
            except h11.RemoteProtocolError as error:
                if connection.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
                    return
                await _send(connection, stream, error.error_status_hint, "text/plain", f"{error}\n".encode())
        if scope.cancelled_caught:
            await _say_too_slow(connection, stream)
        await _linger(stream)

    async def _answer_to(self, request: h11.Request) -> HttpAnswer:
        if request.method not in _ALLOWED:
            return 405, "text/plain", b"only GET and HEAD\n"
        path = request.target.decode("ascii", "replace").partition("?")[0]
        try:
            found = await self._answer(path)
        except Exception as error:
            self._log.log(
                logging.ERROR, ("failed", path), "request failed path=%s error=%r", path, error, exc_info=error
            )
            return 500, "text/plain", b"failed, see the log\n"
        return found if found is not None else (404, "text/plain", b"nothing here\n")


async def _receive(connection: h11.Connection, stream: trio.SocketStream) -> h11.Request | None:
    """None: the other side went away before it had asked. Raises h11.RemoteProtocolError for what is no request."""
    while True:
        event = connection.next_event()
        if isinstance(event, h11.Request):
            return event
        if event is not h11.NEED_DATA:
            return None
        connection.receive_data(await stream.receive_some(_CHUNK))


async def _send(
    connection: h11.Connection,
    stream: trio.SocketStream,
    status: int,
    content_type: str,
    body: bytes,
    *,
    head_only: bool = False,
) -> None:
    headers = [
        ("Content-Type", content_type),
        ("Content-Length", str(len(body))),
        ("Cache-Control", "no-store"),
        ("Connection", "close"),
        *([("Allow", "GET, HEAD")] if status == 405 else []),
    ]
    data = connection.send(h11.Response(status_code=status, headers=headers, reason=HTTPStatus(status).phrase)) or b""
    if not head_only:
        data += connection.send(h11.Data(body)) or b""
    await stream.send_all(data + (connection.send(h11.EndOfMessage()) or b""))


async def _say_too_slow(connection: h11.Connection, stream: trio.SocketStream) -> None:
    """If nothing was sent yet, and can be without waiting."""
    if connection.our_state in (h11.IDLE, h11.SEND_RESPONSE):
        with trio.move_on_after(LINGER_S), suppress(trio.BrokenResourceError):
            await _send(connection, stream, 408, "text/plain", b"too slow\n")


async def _linger(stream: trio.SocketStream) -> None:
    """The other side may still be sending; it reads our answer only if the connection is not reset meanwhile."""
    with suppress(OSError):
        stream.socket.shutdown(socket.SHUT_WR)
    with trio.move_on_after(LINGER_S):
        while await stream.receive_some(_CHUNK):
            pass
