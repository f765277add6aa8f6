"""A proxy in front of a real S3 server that counts requests, and the bytes of objects that go out to us: what was
asked of and read from the under-store, whatever our own counters say.
"""

from __future__ import annotations

import http.client
import select
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import unquote, urlsplit

from cachefs.testing.faulty_s3 import ProxyServer

_PIECE = 256 * 1024
_OWN_HEADERS = {"connection", "content-length", "date", "transfer-encoding"}


class CountingS3:
    """Made by `running_counting_s3`."""

    def __init__(self, endpoint: str, server: ProxyServer) -> None:
        self.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        self.upstream = urlsplit(endpoint)
        self.revoked: set[str] = set()
        """Access keys: requests that are signed with one are refused."""
        self._lock = threading.Lock()
        self._bytes: Counter[str] = Counter()
        self._reads: Counter[str] = Counter()
        self._requests: Counter[str] = Counter()
        self._under_way = 0

    @property
    def object_bytes(self) -> int:
        """Of the bodies of all GETs of objects that were answered with content, as far as the network took them."""
        with self._lock:
            return self._bytes.total()

    @property
    def object_reads(self) -> int:
        """Such GETs."""
        with self._lock:
            return self._reads.total()

    def requests(self) -> Counter[str]:
        """Method -> all requests that came, of whatever kind."""
        with self._lock:
            return Counter(self._requests)

    @property
    def under_way(self) -> int:
        """Requests that are not answered yet."""
        with self._lock:
            return self._under_way

    def bytes_by_object(self) -> Counter[str]:
        """Path of an object, bucket/key, -> bytes."""
        with self._lock:
            return Counter(self._bytes)

    def begin(self, method: str) -> None:
        with self._lock:
            self._under_way += 1
            self._requests[method] += 1

    def end(self) -> None:
        with self._lock:
            self._under_way -= 1

    def answered(self, path: str) -> None:
        with self._lock:
            self._reads[path] += 1

    def send(self, connection: socket.socket, piece: memoryview, path: str) -> int:
        """As much as the network takes at once, which is counted before anybody can ask for it. Raises OSError."""
        with self._lock:
            try:
                count = connection.send(piece, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return 0
            if path:
                self._bytes[path] += count
            return count


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    counting: CountingS3
    _upstream: http.client.HTTPConnection | None = None

    def _serve(self) -> None:
        self.counting.begin(self.command)
        try:
            self._pass_on()
        finally:
            self.counting.end()

    def _pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        signed_by = self.headers.get("Authorization", "").partition("Credential=")[2].partition("/")[0]
        if signed_by in self.counting.revoked:
            self._refuse()
            return
        if self._upstream is None:
            there = self.counting.upstream
            self._upstream = http.client.HTTPConnection(there.hostname or "", there.port)
        # The Host header goes on as it came: it is part of the signature.
        self._upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            self._upstream.putheader(name, value)
        self._upstream.endheaders(body)
        response = self._upstream.getresponse()
        length = response.getheader("Content-Length")
        content = b""
        if length is None and self.command != "HEAD":
            content = response.read()
            length = str(len(content))
        self.send_response(response.status)
        for name, value in response.getheaders():
            if name.lower() not in _OWN_HEADERS:
                self.send_header(name, value)
        if length is not None:
            self.send_header("Content-Length", length)
        path = self._object()
        counted = path if response.status in (200, 206) else ""
        if counted:
            self.counting.answered(counted)
        self.end_headers()
        if content:
            self._send(content, counted)
        while piece := response.read(_PIECE):
            self._send(piece, counted)

    def _refuse(self) -> None:
        content = b"<Error><Code>InvalidAccessKeyId</Code><Message>revoked</Message></Error>"
        self.send_response(403)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _object(self) -> str:
        """bucket/key of a GET of an object; empty for anything else, such as a listing."""
        path = urlsplit(self.path).path.removeprefix("/")
        _, _, key = path.partition("/")
        return unquote(path) if self.command == "GET" and key else ""

    def _send(self, piece: bytes, counted: str) -> None:
        rest = memoryview(piece)
        while rest:
            sent = self.counting.send(self.connection, rest, counted)
            if not sent:
                room = select.poll()
                room.register(self.connection, select.POLLOUT)
                room.poll()
            rest = rest[sent:]

    do_GET = do_HEAD = do_PUT = do_DELETE = do_POST = _serve

    def handle(self) -> None:
        with suppress(OSError, ValueError, http.client.HTTPException):
            super().handle()

    def finish(self) -> None:
        if self._upstream is not None:
            self._upstream.close()
        with suppress(OSError, ValueError):
            super().finish()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def running_counting_s3(endpoint: str) -> Iterator[CountingS3]:
    """A proxy to the server at `endpoint`, on a free port of loopback."""
    handler = type("_BoundHandler", (_Handler,), {})
    with ProxyServer(("127.0.0.1", 0), handler) as server:
        counting = handler.counting = CountingS3(endpoint, server)  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield counting
        finally:
            server.shutdown()
            thread.join()
            server.hang_up()
