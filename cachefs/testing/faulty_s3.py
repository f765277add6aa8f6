"""A proxy in front of a real S3 server that does what networks and servers do on bad days, when told to."""

from __future__ import annotations

import http.client
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal
from urllib.parse import urlsplit

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

Fault = Literal["slow-down", "internal-error", "reset", "cut-off", "other-etag", "stall"]
"""
slow-down, internal-error   503 SlowDown, 500 InternalError
reset       the connection is reset after half of the body
cut-off     the connection is closed after half of the body
other-etag  the answer carries another ETag than was asked for: what a server that ignores If-Match sends
stall       no answer until `release`
"""


@dataclass
class _Order:
    fault: Fault
    method: str
    part: str
    times: int


class FaultyS3:
    """Made by `running_faulty_s3`."""

    def __init__(self, endpoint: str, port: int) -> None:
        self.endpoint = f"http://127.0.0.1:{port}"
        self.upstream = urlsplit(endpoint)
        self.ignores_if_match: tuple[str, str] | None = None
        """Key and secret, to sign requests anew without their If-Match: some servers know nothing of it."""
        self.requests: list[tuple[str, str]] = []
        """(method, path with query) of everything that came."""
        self._orders: list[_Order] = []
        self._lock = threading.Lock()
        self._released = threading.Event()
        self._stalled = threading.Event()

    def inject(self, fault: Fault, *, method: str = "GET", part: str = "", times: int = 1) -> None:
        """Meet the next `times` requests of that method, whose path and query contain `part`, with the fault."""
        with self._lock:
            self._orders.append(_Order(fault, method, part, times))

    def release(self) -> None:
        """End all stalls, now and later."""
        self._released.set()

    def wait_stalled(self) -> None:
        """Return when a request has met a stall."""
        self._stalled.wait()

    def stall(self) -> None:
        self._stalled.set()
        self._released.wait()

    def take(self, method: str, path: str) -> Fault | None:
        with self._lock:
            self.requests.append((method, path))
            for order in self._orders:
                if order.times > 0 and order.method == method and order.part in path:
                    order.times -= 1
                    return order.fault
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    faulty: FaultyS3

    def _serve(self) -> None:
        fault = self.faulty.take(self.command, self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if fault == "stall":
            self.faulty.stall()
        if fault in ("slow-down", "internal-error"):
            code, status = ("SlowDown", 503) if fault == "slow-down" else ("InternalError", 500)
            self._answer(status, {}, f"<Error><Code>{code}</Code><Message>injected</Message></Error>".encode())
            return
        upstream = http.client.HTTPConnection(self.faulty.upstream.hostname or "", self.faulty.upstream.port)
        try:
            # The Host header goes on as it came: it is part of the signature.
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self._headers():
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
            if fault == "other-etag":
                answer = {name: value for name, value in answer.items() if name.lower() != "etag"}
                answer["ETag"] = '"another"'
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


class _Server(ThreadingHTTPServer):
    daemon_threads = False

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._connections: list[socket.socket] = []

    def get_request(self) -> Any:
        connection, address = super().get_request()
        self._connections.append(connection)
        return connection, address

    def hang_up(self) -> None:
        """End every connection: a client may keep idle ones for longer than anybody wants to wait."""
        for connection in self._connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def shutdown_request(self, request: Any) -> None:
        with suppress(OSError):
            super().shutdown_request(request)


@contextmanager
def running_faulty_s3(endpoint: str) -> Iterator[FaultyS3]:
    """A proxy to the server at `endpoint`, on a free port of loopback."""
    handler = type("_BoundHandler", (_Handler,), {})
    with _Server(("127.0.0.1", 0), handler) as server:
        faulty = handler.faulty = FaultyS3(endpoint, server.server_address[1])  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield faulty
        finally:
            faulty.release()
            server.shutdown()
            thread.join()
            server.hang_up()
