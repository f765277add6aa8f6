"""A proxy in front of a real S3 server that does what networks and servers do on bad days, when told to."""

from __future__ import annotations

import http.client
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal
from urllib.parse import urlsplit

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from cachefs.model import CachefsError

Fault = Literal[
    "slow-down",
    "too-many",
    "internal-error",
    "reset",
    "cut-off",
    "short-body",
    "wrong-range",
    "other-etag",
    "ignore-if-match",
    "ignore-range",
    "stall",
]
"""
slow-down, too-many, internal-error   503 SlowDown, 429 TooManyRequests, 500 InternalError
reset            the connection is reset after half of the body
cut-off          the connection is closed after half of the body
short-body       an answer in order, with half of the body and its length
wrong-range      the answer says that it is another range
other-etag       the answer carries another ETag than was asked for
ignore-if-match, ignore-range   the server behind does not see that header, and must not check signatures
stall            no answer until `release`
"""
_STATUS = {
    "slow-down": (503, "SlowDown"),
    "too-many": (429, "TooManyRequests"),
    "internal-error": (500, "InternalError"),
}


@dataclass
class _Order:
    fault: Fault
    method: str
    part: str
    times: int
    retry_after: str
    after: int
    every: int
    seen: int = 0


class FaultyS3:
    """Made by `running_faulty_s3`."""

    def __init__(self, endpoint: str, server: ProxyServer) -> None:
        self.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        self._server = server
        self.upstream = urlsplit(endpoint)
        self.ignores_if_match: tuple[str, str] | None = None
        """Key and secret, to sign requests anew without their If-Match: some servers know nothing of it."""
        self.delay_s = 0.0
        """Before each answer: a store that is far away."""
        self.requests: list[tuple[str, str]] = []
        """(method, path with query) of everything that came."""
        self.asked_bytes = 0
        """By requests for ranges, whatever became of them."""
        self.came_at: list[float] = []
        """When, by time.monotonic()."""
        self.most_at_once = 0
        """Requests; may be set back to 0."""
        self._at_once = 0
        self._orders: list[_Order] = []
        self._lock = threading.Lock()
        self._released = threading.Event()
        self._stalled = threading.Semaphore(0)

    @property
    def at_once(self) -> int:
        """Requests that are not answered yet."""
        return self._at_once

    def inject(
        self,
        fault: Fault,
        *,
        method: str = "GET",
        part: str = "",
        times: int = 1,
        retry_after: str = "",
        after: int = 0,
        every: int = 1,
    ) -> None:
        """Meet the next `times` requests of that method, whose path and query contain `part`, with the fault.

        `retry_after` is sent as the header Retry-After. `after` so many of them that are met with nothing. Only one
        of `every` so many is met, the first and so on.
        """
        with self._lock:
            self._orders.append(_Order(fault, method, part, times, retry_after, after, every))

    def open_connections(self) -> int:
        """Those that the client has not closed."""
        return self._server.open_connections()

    def forget(self) -> None:
        """Meet no more requests with faults."""
        with self._lock:
            self._orders.clear()

    def release(self) -> None:
        """End all stalls, now and later."""
        self._released.set()

    def wait_stalled(self, count: int = 1, limit_s: float = 120.0) -> None:
        """Return when `count` more requests have met a stall. Raises CachefsError when that takes longer."""
        give_up_at = time.monotonic() + limit_s
        for _ in range(count):
            if not self._stalled.acquire(timeout=max(0.0, give_up_at - time.monotonic())):
                raise CachefsError(f"no request has met a stall within {limit_s:g} s")

    def stall(self) -> None:
        self._stalled.release()
        self._released.wait()

    def take(self, method: str, path: str, range_: str | None) -> _Order | None:
        with self._lock:
            self.requests.append((method, path))
            if range_ is not None:
                first, last = (int(end) for end in range_.removeprefix("bytes=").split("-"))
                self.asked_bytes += last + 1 - first
            self.came_at.append(time.monotonic())
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
            for order in self._orders:
                if order.times > 0 and order.method == method and order.part in path:
                    if order.after > 0:
                        order.after -= 1
                        continue
                    order.seen += 1
                    if (order.seen - 1) % order.every:
                        continue
                    order.times -= 1
                    return order
        return None

    def answered(self) -> None:
        with self._lock:
            self._at_once -= 1


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    faulty: FaultyS3

    def _serve(self) -> None:
        order = self.faulty.take(self.command, self.path, self.headers["Range"])
        try:
            self._meet(order.fault if order else None, order.retry_after if order else "")
        finally:
            self.faulty.answered()

    def _meet(self, fault: Fault | None, retry_after: str) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        time.sleep(self.faulty.delay_s)
        if fault == "stall":
            self.faulty.stall()
        if fault in _STATUS:
            status, code = _STATUS[fault]
            headers = {"Retry-After": retry_after} if retry_after else {}
            self._answer(status, headers, f"<Error><Code>{code}</Code><Message>injected</Message></Error>".encode())
            return
        hidden = {"ignore-if-match": "if-match", "ignore-range": "range"}.get(fault or "")
        upstream = http.client.HTTPConnection(self.faulty.upstream.hostname or "", self.faulty.upstream.port)
        try:
            # The Host header goes on as it came: it is part of the signature.
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self._headers():
                if name.lower() != hidden:
                    upstream.putheader(name, value)
            upstream.endheaders(body)
            response = upstream.getresponse()
            content = response.read()
            answer = {
                name: value
                for name, value in response.getheaders()
                if name.lower() not in ("content-length", "connection", "transfer-encoding", "date")
            }
            length = response.getheader("Content-Length") if self.command == "HEAD" else None
            changed = {"other-etag": ("ETag", '"another"'), "wrong-range": ("Content-Range", "bytes 7-12/50")}
            if fault in changed:
                header, value = changed[fault]
                answer = {name: old for name, old in answer.items() if name.lower() != header.lower()}
                answer[header] = value
            if fault == "short-body":
                content = content[: len(content) // 2]
            self._answer(response.status, answer, content, fault, length)
        finally:
            upstream.close()

    def _headers(self) -> list[tuple[str, str]]:
        identity = self.faulty.ignores_if_match
        if identity is None or self.headers["If-Match"] is None:
            return list(self.headers.items())
        kept = {name: self.headers[name] for name in ("Host", "Range") if self.headers[name] is not None}
        request = AWSRequest(self.command, self.faulty.upstream.geturl() + self.path, headers=kept)
        S3SigV4Auth(Credentials(*identity), "s3", "us-east-1").add_auth(request)
        return list(request.headers.items())

    def _answer(
        self,
        status: int,
        headers: dict[str, str],
        content: bytes,
        fault: Fault | None = None,
        length: str | None = None,
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", length or str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault in ("reset", "cut-off"):
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            self.close_connection = True
            if fault == "reset":
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
            else:
                self.connection.shutdown(socket.SHUT_RDWR)
            return
        self.wfile.write(content)

    do_GET = do_HEAD = do_PUT = do_DELETE = do_POST = _serve

    def handle(self) -> None:
        with suppress(OSError, ValueError):
            super().handle()

    def finish(self) -> None:
        with suppress(OSError, ValueError):
            super().finish()

    def log_message(self, format: str, *args: Any) -> None:
        pass


class ProxyServer(ThreadingHTTPServer):
    """With a thread for each connection; ended by `shutdown` and `hang_up`."""

    request_queue_size = 128
    """A worker opens dozens of connections at once. One that the queue has no room for is tried again by the kernel
    a second later, and its request comes when a test believes that everything has been asked."""
    daemon_threads = False

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._connections: list[socket.socket] = []

    def get_request(self) -> Any:
        connection, address = super().get_request()
        self._connections.append(connection)
        return connection, address

    def open_connections(self) -> int:
        return sum(map(_is_open, list(self._connections)))

    def hang_up(self) -> None:
        """End every connection: a client may keep idle ones for longer than anybody wants to wait."""
        for connection in self._connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def shutdown_request(self, request: Any) -> None:
        with suppress(OSError):
            super().shutdown_request(request)


def _is_open(connection: socket.socket) -> bool:
    try:
        return connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False


@contextmanager
def running_faulty_s3(endpoint: str) -> Iterator[FaultyS3]:
    """A proxy to the server at `endpoint`, on a free port of loopback."""
    handler = type("_BoundHandler", (_Handler,), {})
    with ProxyServer(("127.0.0.1", 0), handler) as server:
        faulty = handler.faulty = FaultyS3(endpoint, server)  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield faulty
        finally:
            faulty.release()
            server.shutdown()
            thread.join()
            server.hang_up()
