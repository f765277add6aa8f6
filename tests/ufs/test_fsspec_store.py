"""Stores of fsspec under the contract: one in memory, and real servers of HTTP and FTP."""

from __future__ import annotations

import hashlib
import http.client
import itertools
import os
import random
import socket
import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import aiohttp
import fsspec
import pytest
import trio
from pyftpdlib.authorizers import DummyAuthorizer
from pyftpdlib.handlers import FTPHandler
from pyftpdlib.ioloop import IOLoop
from pyftpdlib.servers import FTPServer

from cachefs.model import (
    CachefsError,
    ConfigError,
    ContentChangedError,
    DeniedError,
    NotFoundError,
    ThrottledError,
    UnavailableError,
    UnderStoreError,
)
from cachefs.testing.cluster import running_cluster
from cachefs.testing.understore_contract import UnderStoreContract, list_all, names
from cachefs.ufs import UnderStore, open_under_store
from cachefs.ufs.fsspec_store import modified_ns, schemes, storage_options, tag_of, translate

_numbers = itertools.count(1)


class Directory:
    """What a server serves. Every change is a second after the last one, as whole seconds are all that some tell."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._times = itertools.count(1_700_000_000)

    def put(self, objects: Mapping[str, bytes]) -> None:
        for key, content in objects.items():
            path = self.root / key
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            stamp = next(self._times)
            os.utime(path, (stamp, stamp))

    def delete(self, *keys: str) -> None:
        for key in keys:
            (self.root / key).unlink()


@pytest.fixture
def directory(tmp_path: Path) -> Directory:
    (tmp_path / "served").mkdir()
    return Directory(tmp_path / "served")


class Memory:
    """The memory of fsspec is one for the whole process, so every test has a directory of its own in it."""

    def __init__(self) -> None:
        self.url = f"memory://test-{next(_numbers)}"
        self._files = fsspec.filesystem("memory")
        self._files.makedirs(self.url)

    def put(self, objects: Mapping[str, bytes]) -> None:
        for key, content in objects.items():
            self._files.pipe_file(f"{self.url}/{key}", content)

    def delete(self, *keys: str) -> None:
        for key in keys:
            self._files.rm_file(f"{self.url}/{key}")


class TestMemory(UnderStoreContract):
    @pytest.fixture
    def behind(self) -> Memory:
        return Memory()

    @pytest.fixture
    async def ufs(self, behind: Memory) -> AsyncIterator[UnderStore]:
        async with open_under_store(behind.url, {"settle": "0"}) as ufs:
            yield ufs

    async def test_names_that_are_none_are_hidden_and_counted(self, ufs: UnderStore, behind: Memory) -> None:
        behind.put({"dir/good": b"x", "dir/" + "x" * 256: b"x", "dir/..": b"x"})
        assert names(await list_all(ufs, "dir")) == ["dir/good"]
        assert ufs.hidden_keys == 2


class _HttpHandler(SimpleHTTPRequestHandler):
    """What Python serves, with ranges and etags, as other servers do."""

    protocol_version = "HTTP/1.1"
    server: HttpServer

    def do_GET(self) -> None:
        self.server.requests.append((self.command, self.path))
        status = self.server.answer.get(self.command)
        if status == -1:
            self.server.blocked.set()
            self.server.release.wait()
            self.close_connection = True
        elif status:
            self.send_error(status)
        else:
            self._serve()

    do_HEAD = do_GET

    def _serve(self) -> None:
        path = Path(self.translate_path(self.path))
        if not path.is_file() or self.path.endswith("/"):
            (super().do_GET if self.command == "GET" else super().do_HEAD)()
            return
        content = path.read_bytes()
        part, wanted = content, self.headers.get("Range")
        self.send_response(206 if wanted else 200)
        if wanted:
            first, last = (int(each) for each in wanted.removeprefix("bytes=").split("-"))
            part = content[first : last + 1]
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        if self.server.etags:
            self.send_header("ETag", f'"{hashlib.md5(content).hexdigest()}"')
        self.send_header("Last-Modified", self.date_time_string(path.stat().st_mtime))
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(part)

    def handle(self) -> None:
        with suppress(OSError):
            super().handle()

    def log_message(self, format: str, *args: Any) -> None:
        pass


class HttpServer(ThreadingHTTPServer):
    def __init__(self, root: Path) -> None:
        self.root = root
        self.etags = True
        self.answer: dict[str, int] = {}
        """Method -> status of every answer; -1: none until `release`."""
        self.blocked = threading.Event()
        self.release = threading.Event()
        self.requests: list[tuple[str, str]] = []
        super().__init__(("127.0.0.1", 0), _HttpHandler)

    def finish_request(self, request: Any, client_address: Any) -> None:
        _HttpHandler(request, client_address, self, directory=str(self.root))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@pytest.fixture
def http_server(directory: Directory) -> Iterator[HttpServer]:
    with HttpServer(directory.root) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield server
        server.release.set()
        server.shutdown()
        thread.join()


class TestHttp(UnderStoreContract):
    @pytest.fixture
    def behind(self, directory: Directory) -> Directory:
        return directory

    @pytest.fixture
    async def ufs(self, http_server: HttpServer) -> AsyncIterator[UnderStore]:
        async with open_under_store(http_server.url, {"deadline": "2"}) as ufs:
            yield ufs

    @pytest.mark.parametrize(
        ("status", "error"),
        [(403, DeniedError), (404, NotFoundError), (429, ThrottledError), (500, UnavailableError)],
    )
    async def test_only_what_is_missing_is_missing(
        self, http_server: HttpServer, status: int, error: type[Exception]
    ) -> None:
        """fsspec calls every failed look a missing file."""
        http_server.answer = {"HEAD": status, "GET": status}
        async with open_under_store(http_server.url, {"deadline": "0.1"}) as ufs:
            with pytest.raises(error):
                await ufs.stat("file")
            with pytest.raises(error):
                await list_all(ufs, "")

    async def test_a_time_tells_versions_where_no_etag_does(
        self, ufs: UnderStore, http_server: HttpServer, behind: Directory
    ) -> None:
        http_server.etags = False
        behind.put({"file": b"one"})
        old = await ufs.stat("file")
        assert old.mtime_ns == 1_700_000_000 * 10**9
        behind.put({"file": b"two"})
        with pytest.raises(ContentChangedError):
            await ufs.read_range(old, 0, 3)

    async def test_a_server_without_ranges_is_named(self, behind: Directory, tmp_path: Path) -> None:
        behind.put({"file": b"content"})

        class Whole(_HttpHandler):
            def _serve(self) -> None:
                del self.headers["Range"]
                super()._serve()

        with HttpServer(behind.root) as server:
            server.finish_request = lambda request, address: Whole(  # type: ignore[method-assign]
                request, address, server, directory=str(behind.root)
            )
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
            thread.start()
            async with open_under_store(server.url, {}) as ufs:
                info = await ufs.stat("file")
                assert await ufs.read_range(info, 0, 7) == b"content"
                with pytest.raises(UnderStoreError, match="sends no ranges"):
                    await ufs.read_range(info, 1, 3)
            server.shutdown()
            thread.join()

    async def test_a_server_that_never_answers(self, http_server: HttpServer, behind: Directory) -> None:
        behind.put({"file": b"content"})
        http_server.answer = {"HEAD": -1, "GET": -1}
        options = {"deadline": "0.3", "request_timeout": "0.2"}
        async with open_under_store(http_server.url, options) as ufs:
            with trio.fail_after(60), pytest.raises(UnavailableError, match="no answer"):
                await ufs.stat("file")
            http_server.release.set()


class _FtpHandler(FTPHandler):  # type: ignore[misc]
    use_sendfile = False
    auth_failed_timeout = 0.01


class FtpServer:
    def __init__(self, root: Path) -> None:
        authorizer = DummyAuthorizer()
        authorizer.add_user("reader", "ftp-secret", str(root))
        self.handler = type("_Handler", (_FtpHandler,), {"authorizer": authorizer})
        self._loop = IOLoop()
        self._server = FTPServer(("127.0.0.1", 0), self.handler, ioloop=self._loop)
        self._ending = threading.Event()
        self.url = f"ftp://127.0.0.1:{self._server.address[1]}/"

    def run(self) -> None:
        while not self._ending.is_set():
            self._server.serve_forever(timeout=0.02, blocking=False)
        self._server.close_all()

    @property
    def connections(self) -> int:
        return len(self._server.ip_map)

    def end(self) -> None:
        self._ending.set()


@pytest.fixture
def ftp_server(directory: Directory) -> Iterator[FtpServer]:
    server = FtpServer(directory.root)
    thread = threading.Thread(target=server.run)
    thread.start()
    yield server
    server.end()
    thread.join()


FTP_OPTIONS = {"username": "reader", "password": "ftp-secret", "deadline": "20"}


class TestFtp(UnderStoreContract):
    @pytest.fixture
    def behind(self, directory: Directory) -> Directory:
        return directory

    @pytest.fixture
    async def ufs(self, ftp_server: FtpServer) -> AsyncIterator[UnderStore]:
        async with open_under_store(ftp_server.url, FTP_OPTIONS) as ufs:
            yield ufs

    async def test_a_refused_login_is_denied_and_not_shown(self, ftp_server: FtpServer) -> None:
        async with open_under_store(ftp_server.url, {**FTP_OPTIONS, "password": "wrong-secret"}) as ufs:
            with pytest.raises(DeniedError) as caught:
                await ufs.stat("file")
            assert "secret" not in str(caught.value)
            assert "secret" not in ufs.origin

    async def test_closed_it_has_no_connection_left(self, ftp_server: FtpServer, behind: Directory) -> None:
        behind.put({"file": b"content"})
        before = ftp_server.connections
        async with open_under_store(ftp_server.url, FTP_OPTIONS) as ufs:
            await ufs.stat("file")
            assert ftp_server.connections == before + 1
        with trio.fail_after(60):
            while ftp_server.connections > before:
                await trio.sleep(0.02)
        # Whoever has it yet has no connection with it.
        assert ufs.origin == ftp_server.url.rstrip("/")


async def test_a_blocked_thread_is_not_waited_for_and_ends_with_its_socket() -> None:
    """A server that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        options = {"timeout": "60", "deadline": "120", "request_timeout": "120", "max_connections": "1"}
        async with open_under_store(f"ftp://127.0.0.1:{port}", options) as ufs:
            calls = ufs._calls  # type: ignore[attr-defined]
            async with trio.open_nursery() as nursery:
                nursery.start_soon(ufs.stat, "file")
                silent.setblocking(False)
                with trio.fail_after(60):
                    await trio.lowlevel.wait_readable(silent)
                nursery.cancel_scope.cancel()
            assert calls._slots.borrowed_tokens == 1
            # What waits to be accepted ends with it.
            silent.close()
            with trio.fail_after(60):
                while calls._slots.borrowed_tokens:
                    await trio.sleep(0.05)


@pytest.mark.parametrize("etags", [True, False])
async def test_a_cluster_caches_what_a_web_server_has(
    http_server: HttpServer, directory: Directory, tmp_path: Path, etags: bool
) -> None:
    http_server.etags = etags
    content = random.Random(1).randbytes(300_000)
    directory.put({"data/shard #1.tar": content})
    async with running_cluster(tmp_path, http_server.url) as cluster, cluster.client() as client:
        attr = await client.metadata.resolve("/data/shard #1.tar")
        assert await client.promote(attr.ino) is True
        fd = client.open_sealed(attr)
        assert fd is not None
        assert os.pread(fd, len(content) + 1, 0) == content
        os.close(fd)


async def test_nobody_listens() -> None:
    for scheme in ("ftp", "http"):
        async with open_under_store(f"{scheme}://127.0.0.1:9", {"deadline": "0.1"}) as ufs:
            with pytest.raises(UnavailableError):
                await ufs.stat("file")
            with pytest.raises(UnavailableError):
                await list_all(ufs, "")


def test_what_tells_versions() -> None:
    assert tag_of({"etag": '"abc"', "size": 1}, 5) == "abc"
    assert tag_of({"ETag": 'W/"abc"', "md5Hash": "q==", "size": 1}, 5) == "q=="
    assert tag_of({"ETag": 'W/"abc"', "size": 16}, 255) == "time-ff-10"
    assert tag_of({"size": 16}, 0) == ""


@pytest.mark.parametrize(
    "entry",
    [
        {"mtime": 1_700_000_000},
        {"LastModified": datetime(2023, 11, 14, 22, 13, 20, tzinfo=UTC)},
        {"last_modified": datetime(2023, 11, 14, 22, 13, 20)},
        {"Last-Modified": "Tue, 14 Nov 2023 22:13:20 GMT"},
        {"updated": "2023-11-14T22:13:20.000Z"},
        {"modificationTime": 1_700_000_000_000},
        {"modify": "20231114221320.000"},
        {"modify": "20231114221320"},
    ],
)
def test_times_of_every_kind(entry: dict[str, Any]) -> None:
    assert modified_ns(entry) == 1_700_000_000 * 10**9


def test_times_keep_their_microseconds() -> None:
    assert modified_ns({"mtime": datetime(2023, 11, 14, 22, 13, 20, 123457, tzinfo=UTC)}) == 1_700_000_000_123_457_000
    assert modified_ns({"mtime": 1_700_000_000.123457}) == 1_700_000_000_123_457_000
    assert modified_ns({"modify": "some day"}) == 0


def _with_status(status: int) -> Exception:
    error = http.client.HTTPException("gone wrong at key=top-secret")
    error.status_code = status  # type: ignore[attr-defined]
    return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (FileNotFoundError("x"), NotFoundError),
        (_with_status(404), NotFoundError),
        (_with_status(403), DeniedError),
        (PermissionError(13, "top-secret"), DeniedError),
        (_with_status(429), ThrottledError),
        (_with_status(502), UnavailableError),
        (_with_status(400), UnderStoreError),
        (_with_status(416), ContentChangedError),
        (HTTPError("http://x", 503, "busy", {}, None), ThrottledError),  # type: ignore[arg-type]
        (aiohttp.ClientPayloadError(), UnavailableError),
        (TimeoutError(), UnavailableError),
        (ConnectionResetError("top-secret"), UnavailableError),
        (ValueError("top-secret"), UnderStoreError),
    ],
)
def test_errors_are_told_apart_and_show_no_secrets(error: Exception, expected: type[CachefsError]) -> None:
    told = translate("where", error, ["top-secret"])
    assert type(told) is expected
    assert "top-secret" not in str(told)


def test_options_are_what_they_look_like() -> None:
    given = {"anon": "true", "block_size": "512", "project": "x1", "headers": '{"a": 1}', "password": "123"}
    assert storage_options({**given, "deadline": "3"}) == {
        "anon": True,
        "block_size": 512,
        "project": "x1",
        "headers": {"a": 1},
        "password": "123",
    }


@pytest.mark.parametrize(
    ("url", "options", "message"),
    [
        ("nosuch://x", {}, "abfs, .*file, .*ftp, .*gs, .*http, .*memory, .*s3, "),
        ("gs://bucket", {}, "install gcsfs"),
        ("abfs://container@account.dfs.core.windows.net/x", {}, "Install adlfs"),
        ("ftp://me:secret@host/x", {}, "no password"),
        ("http://host/x?sig=secret", {}, "no password, \\? or #"),
        ("memory://x", {"deadline": "soon"}, "--ufs-option deadline"),
        ("http://host", {"client_kwargs": "{secret"}, "a JSON object"),
        ("simplecache://x", {}, "with a scheme of"),
    ],
)
async def test_wrong_settings(url: str, options: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        async with open_under_store(url, options):
            pass
    assert "secret" not in str(caught.value)


async def test_the_origin_names_the_place() -> None:
    async with open_under_store("ftp://host:2121//a//b/", {"password": "secret", "timeout": "7"}) as ufs:
        assert ufs.origin == "ftp://host:2121/a/b"
    async with open_under_store("webhdfs:///data", {"host": "name.node", "port": "9870", "user": "me"}) as ufs:
        assert ufs.origin == "webhdfs:///data;host=name.node;port=9870"


def test_schemes_have_no_wrappers() -> None:
    assert {"memory", "gs", "gcs", "abfs", "az", "http", "https", "hdfs", "webhdfs", "sftp", "ftp"} <= set(schemes())
    assert not {"simplecache", "s3", "file", "generic"} & set(schemes())
