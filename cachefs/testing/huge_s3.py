"""An S3 server with one directory of as many objects as are asked for, none of which takes any room.

It is a process of its own, so that its memory and its CPU time are not those of whoever measures. It answers what a
reader asks: ListObjectsV2, HEAD and GET of ranges; signatures are not looked at.
"""

from __future__ import annotations

import json
import multiprocessing
import re
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

BUCKET = "huge"
DIRECTORY = "dir/"
PAGE = 1000
_TIME = "2026-01-02T03:04:05.000Z"
_HTTP_TIME = "Fri, 02 Jan 2026 03:04:05 GMT"


def name(number: int) -> str:
    return f"f{number:07}"


def size(number: int) -> int:
    """Bytes of the first version of an object; each later one has one more."""
    return 100 + number % 1000


class HugeS3:
    """Made by `running_huge_s3`."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.url = f"s3://{BUCKET}"
        self.ufs_options = {"endpoint_url": endpoint, "key": "any", "secret": "any"}

    def hold(self, page: int) -> None:
        """Answer no page of a listing after the first `page` ones of each, until `release`."""
        self._tell(hold=page)

    def release(self) -> None:
        self._tell(hold=-1)

    def change(self, *, gone: list[int] | None = None, changed: list[int] | None = None) -> None:
        """These objects are gone; those have another content."""
        self._tell(gone=gone or [], changed=changed or [])

    def pages(self) -> int:
        """Pages of listings that were answered."""
        return int(self._tell()["pages"])

    def wait_held(self) -> None:
        """Return when a listing waits at the page it is held at."""
        self._tell(wait_held=True)

    def _tell(self, **what: Any) -> Any:
        request = urllib.request.Request(f"{self.endpoint}/-/control", data=json.dumps(what).encode())
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)


class _State:
    def __init__(self, count: int) -> None:
        self.count = count
        self.gone: set[int] = set()
        self.versions: dict[int, int] = {}
        self.hold = -1
        self.held = 0
        self.pages = 0
        self.moved = threading.Condition()

    def control(self, what: dict[str, Any]) -> dict[str, Any]:
        with self.moved:
            self.hold = what.get("hold", self.hold)
            self.gone.update(what.get("gone", ()))
            for number in what.get("changed", ()):
                self.versions[number] = self.versions.get(number, 0) + 1
            self.moved.notify_all()
            if what.get("wait_held"):
                self.moved.wait_for(lambda: self.held)
            return {"pages": self.pages}

    def wait_for_page(self, page: int) -> None:
        with self.moved:
            self.held += 1
            self.moved.notify_all()
            self.moved.wait_for(lambda: not 0 <= self.hold <= page)
            self.held -= 1
            self.pages += 1

    def object(self, key: str) -> tuple[int, str] | None:
        """(size, etag)."""
        found = re.fullmatch(re.escape(DIRECTORY) + r"f(\d{7})", key)
        number = int(found[1]) if found else self.count
        return self.describe(number) if number < self.count and number not in self.gone else None

    def describe(self, number: int) -> tuple[int, str]:
        version = self.versions.get(number, 0)
        return size(number) + version, f"{number:024x}{version:08x}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: _State

    def do_POST(self) -> None:
        what = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self._answer(200, json.dumps(self.state.control(what)).encode())

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        key = unquote(parts.path).removeprefix(f"/{BUCKET}").removeprefix("/")
        query = {name: values[0] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
        if not key:
            self._answer(200, self._list(query) if "list-type" in query else b"")
            return
        found = self.state.object(key)
        if found is None:
            self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
            return
        length, etag = found
        headers = {"ETag": f'"{etag}"', "Last-Modified": _HTTP_TIME, "Accept-Ranges": "bytes"}
        content = (key.encode() * (length // len(key) + 1))[:length]
        if self.command == "GET" and "Range" in self.headers:
            first, last = (int(each) for each in self.headers["Range"].removeprefix("bytes=").split("-"))
            headers["Content-Range"] = f"bytes {first}-{last}/{length}"
            self._answer(206, content[first : last + 1], headers)
        else:
            self._answer(200, content, headers)

    def _list(self, query: dict[str, str]) -> bytes:
        prefix, most = query.get("prefix", ""), min(PAGE, int(query.get("max-keys", PAGE)))
        inner, token = "", None
        if prefix == DIRECTORY:
            start = int(query.get("continuation-token", 0))
            if most == PAGE:
                self.state.wait_for_page(start // PAGE)
            end = min(self.state.count, start + most)
            inner = "".join(self._content(number) for number in range(start, end) if number not in self.state.gone)
            token = end if end < self.state.count else None
        elif DIRECTORY.startswith(prefix):
            inner = f"<CommonPrefixes><Prefix>{DIRECTORY}</Prefix></CommonPrefixes>"
        more = f"<NextContinuationToken>{token}</NextContinuationToken>" if token is not None else ""
        return (
            f"<?xml version='1.0'?><ListBucketResult><Name>{BUCKET}</Name><Prefix>{prefix}</Prefix>"
            f"<IsTruncated>{'true' if more else 'false'}</IsTruncated>{more}{inner}</ListBucketResult>"
        ).encode()

    def _content(self, number: int) -> str:
        length, etag = self.state.describe(number)
        return (
            f"<Contents><Key>{DIRECTORY}{name(number)}</Key><LastModified>{_TIME}</LastModified>"
            f"<ETag>&quot;{etag}&quot;</ETag><Size>{length}</Size></Contents>"
        )

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for header, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(header, value)
        self.end_headers()
        if self.command != "HEAD":
            # Who asked may have been killed meanwhile.
            with suppress(ConnectionError):
                self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True


def _serve(count: int, link: Connection) -> None:
    handler = type("Handler", (_Handler,), {"state": _State(count)})
    server = _Server(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    link.send(server.server_address[1])
    # Until the other side is gone, in whatever way.
    try:
        link.recv()
    except EOFError:
        pass


@contextmanager
def running_huge_s3(count: int) -> Iterator[HugeS3]:
    """`count` objects in one directory. It ends with the block, and by itself if this process is killed."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(count, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        yield HugeS3(f"http://127.0.0.1:{ours.recv()}")
    finally:
        ours.close()
        process.join(10)
        process.kill()
        process.join()
        process.close()
