"""An S3 server in a process of its own, with one directory of any number of keys, made up as they are listed.

The keys are `dir/000000000` and so on; what can be changed of them are three ranges of numbers. It knows ListObjectsV2,
HEAD and GET with ranges, as our client uses them, and checks no signatures.
"""

from __future__ import annotations

import itertools
import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from cachefs.model import CachefsError

BUCKET = "huge"
DIRECTORY = "dir"
_DIGITS = 9
_LIMIT_S = 120.0


def name_of(number: int) -> str:
    return f"{number:0{_DIGITS}}"


def content_of(number: int, *, changed: bool = False) -> bytes:
    return f"{'changed' if changed else 'content'} {number}\n".encode()


class HugeS3:
    """Made by `running_huge_s3`. Every method returns when the server has done it."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self.url = f"s3://{BUCKET}"
        # One page may be held for as long as a test takes.
        self.options = {
            "endpoint_url": f"http://127.0.0.1:{self._answer()}",
            "anon": "true",
            "read_timeout": "300",
            "deadline": "600",
        }

    @property
    def environment(self) -> dict[str, str]:
        """Tells a cachefs process how to reach it."""
        return {"CACHEFS_UFS_OPTIONS": json.dumps(self.options)}

    def hold(self, page: int) -> None:
        """Answer no page of the directory from this one on, until `release`. The first page is 0."""
        self._do("hold", page)

    def wait_held(self) -> None:
        """Return when somebody waits for a page that is held."""
        self._do("wait_held")

    def release(self) -> None:
        self._do("release")

    def change(self, *, removed: tuple[int, int] = (0, 0), changed: tuple[int, int] = (0, 0), added: int = 0) -> None:
        """From now on: without the numbers of one range, others with another content, and more behind the last."""
        self._do("change", removed, changed, added)

    def pages(self) -> int:
        """Pages of the directory that were answered."""
        return int(self._do("pages"))

    def _do(self, *command: Any) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command).encode() + b"\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        readable, _, _ = select.select([self._process.stdout], [], [], _LIMIT_S)
        line = self._process.stdout.readline() if readable else b""
        if not line:
            raise CachefsError("the huge S3 server does not answer")
        return json.loads(line)


@contextmanager
def running_huge_s3(count: int) -> Iterator[HugeS3]:
    """A server with `count` keys. It ends with the block, and also when we are killed."""
    command = [sys.executable, "-m", "cachefs.testing.huge_s3", str(count)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            yield HugeS3(process)
        finally:
            process.kill()


# ---- the server's process --------------------------------------------------------------------------------------------


class _Directory:
    """What is in it, and which of its pages may be answered."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._removed = self._changed = range(0)
        self._added = 0
        self._held_from: int | None = None
        self._waiting = 0
        self._moved = threading.Condition()
        self.pages = 0
        self._modified = int(time.time()) - 100

    def hold(self, page: int) -> None:
        with self._moved:
            self._held_from = page

    def wait_held(self) -> None:
        with self._moved:
            self._moved.wait_for(lambda: self._waiting > 0)

    def release(self) -> None:
        with self._moved:
            self._held_from = None
            self._moved.notify_all()

    def change(self, removed: tuple[int, int], changed: tuple[int, int], added: int) -> None:
        self._removed, self._changed, self._added = range(*removed), range(*changed), added

    def turn(self, page: int) -> None:
        """Return when this page may be answered."""

        def is_free() -> bool:
            return self._held_from is None or page < self._held_from

        with self._moved:
            if not is_free():
                self._waiting += 1
                self._moved.notify_all()
                self._moved.wait_for(is_free)
                self._waiting -= 1
            self.pages += 1

    def numbers(self, first: int) -> Iterator[int]:
        """Those that exist, from this one on."""
        end = self._count + self._added
        removed = self._removed
        if not removed:
            return iter(range(first, end))
        before, behind = range(first, min(end, removed.start)), range(max(first, removed.stop), end)
        return itertools.chain(before, behind)

    def find(self, name: str) -> int | None:
        number = int(name) if len(name) == _DIGITS and name.isdecimal() else -1
        is_there = 0 <= number < self._count + self._added and number not in self._removed
        return number if is_there else None

    def content(self, number: int) -> bytes:
        return content_of(number, changed=number in self._changed)

    def etag(self, number: int) -> str:
        return f'"{"b" if number in self._changed else "a"}{number}"'

    @property
    def modified(self) -> time.struct_time:
        return time.gmtime(self._modified)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Head and body in one packet: otherwise each answer would wait for an acknowledgement of its first half.
    wbufsize = -1
    disable_nagle_algorithm = True
    directory: _Directory

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        key = unquote(parts.path).removeprefix(f"/{BUCKET}").removeprefix("/")
        if key:
            self._object(key)
        else:
            query = {name: values[0] for name, values in parse_qs(parts.query).items()}
            self._send(200, self._list(query), {"Content-Type": "application/xml"})

    do_HEAD = do_GET

    def _list(self, query: dict[str, str]) -> bytes:
        prefix, most = query.get("prefix", ""), int(query.get("max-keys", 1000))
        after = query.get("continuation-token") or query.get("start-after", "")
        inside = f"{DIRECTORY}/"
        rows: list[str] = []
        token = ""
        if prefix == "" and "delimiter" in query:
            rows.append(f"<CommonPrefixes><Prefix>{inside}</Prefix></CommonPrefixes>")
        elif prefix in ("", inside):
            first = int(after.removeprefix(inside)) + 1 if after else 0
            if most > 1:
                self.directory.turn(first // most)
            modified = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", self.directory.modified)
            numbers = self.directory.numbers(first)
            last = first
            for last in itertools.islice(numbers, most):
                rows.append(
                    f"<Contents><Key>{inside}{name_of(last)}</Key><LastModified>{modified}</LastModified>"
                    f"<ETag>{self.directory.etag(last).replace(chr(34), '&quot;')}</ETag>"
                    f"<Size>{len(self.directory.content(last))}</Size><StorageClass>STANDARD</StorageClass></Contents>"
                )
            if next(numbers, None) is not None:
                token = f"<NextContinuationToken>{inside}{name_of(last)}</NextContinuationToken>"
        elif self.directory.find(prefix.removeprefix(inside)) is not None:
            number = int(prefix.removeprefix(inside))
            rows.append(f"<Contents><Key>{prefix}</Key><Size>{len(self.directory.content(number))}</Size></Contents>")
        text = (
            '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
            f"<Name>{BUCKET}</Name><Prefix>{prefix}</Prefix><KeyCount>{len(rows)}</KeyCount><MaxKeys>{most}</MaxKeys>"
            f"<IsTruncated>{'true' if token else 'false'}</IsTruncated>{token}{''.join(rows)}</ListBucketResult>"
        )
        return text.encode()

    def _object(self, key: str) -> None:
        number = self.directory.find(key.removeprefix(f"{DIRECTORY}/"))
        if number is None:
            self._send(404, b"<Error><Code>NoSuchKey</Code><Message>no such key</Message></Error>", {})
            return
        content, etag = self.directory.content(number), self.directory.etag(number)
        if self.headers["If-Match"] not in (None, etag, etag.strip('"')):
            self._send(412, b"<Error><Code>PreconditionFailed</Code><Message>changed</Message></Error>", {})
            return
        modified = time.strftime("%a, %d %b %Y %H:%M:%S GMT", self.directory.modified)
        facts = {"ETag": etag, "Last-Modified": modified, "Accept-Ranges": "bytes"}
        wanted = self.headers["Range"]
        if wanted is None:
            self._send(200, content, facts)
            return
        first, last = (int(end) for end in wanted.removeprefix("bytes=").split("-"))
        last = min(last, len(content) - 1)
        facts["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        self._send(206, content[first : last + 1], facts)

    def _send(self, status: int, content: bytes, facts: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in facts.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def handle(self) -> None:
        with suppress(OSError):
            super().handle()

    def finish(self) -> None:
        with suppress(OSError):
            super().finish()

    def log_message(self, format: str, *args: Any) -> None:
        pass


def _main() -> None:
    directory = _Handler.directory = _Directory(int(sys.argv[1]))
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_address[1], flush=True)
    # Commands come one by one from the process that started this one; when it is gone, this one ends.
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        if name == "pages":
            print(directory.pages, flush=True)
        else:
            getattr(directory, name)(*arguments)
            print("null", flush=True)
    os._exit(0)


if __name__ == "__main__":
    _main()
