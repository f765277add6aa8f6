"""Every store that fsspec knows, beside S3 and directories, which have modules of their own.

fsspec sends no preconditions, so a version is looked at before and after each range is read. Its listings come whole.
Asynchronous implementations run in the thread of `bridge`. The others run in threads, each on an instance of the file
system of its own, since many keep one connection that two must not use. Cancelling does not wait for such a thread:
it ends when its library's socket times out, and only then gives back its slot and its instance.
"""

from __future__ import annotations

import asyncio
import email.utils
import ftplib
import inspect
import json
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol, TypeVar
from urllib.parse import quote, unquote, urlsplit

import aiohttp
import fsspec
import trio

from cachefs.model import (
    CachefsError,
    ConfigError,
    ContentChangedError,
    DeniedError,
    Kind,
    NotFoundError,
    ObjectInfo,
    ThrottledError,
    UnavailableError,
    UnderStoreError,
    is_credential,
)
from cachefs.ufs import options as opts
from cachefs.ufs import settle
from cachefs.ufs.base import is_file_name
from cachefs.ufs.bridge import CLOSE_S, Bridge, open_bridge
from cachefs.ufs.files import Claim, Keep, read_one_by_one
from cachefs.ufs.ftp import Ftp
from cachefs.ufs.retry import Requests, retry_after_s

T = TypeVar("T")

OPTIONS = {
    "deadline": "seconds for one request with its retries, default 60",
    "request_timeout": "seconds for one attempt, default 15",
    "max_connections": "at once, default 32",
    "settle": settle.MEANING + ", where only a time tells versions apart",
}
"""Ours; all others are the storage options of the file system."""

_CHUNK = 1000
_WRAPPERS = {"async_wrapper", "asyncwrapper", "blockcache", "cached", "dir", "filecache", "generic", "simplecache"}
_CLIENTS = ("_session", "service_client")
"""Attributes of asynchronous file systems that have connections: of most, and of Azure's."""
_ELSEWHERE = {"file", "local", "s3", "s3a"}
_PLACES = ("account_name", "endpoint_url", "host", "org", "port", "ref", "repo", "sha", "url")
"""Options that say which store it is. No others are shown or become part of `origin`: they may be secret."""
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_VERSIONS = (
    "etag",
    "ETag",
    "md5",
    "md5Hash",
    "Content-MD5",
    "content_hash",
    "checksum",
    "sha",
    "sha256",
    "Digest",
    "generation",
)
_TIMES = (
    "mtime",
    "LastModified",
    "last_modified",
    "Last-Modified",
    "updated",
    "modified",
    "modificationTime",
    "modify",
    "created",
)


def schemes() -> list[str]:
    """Those that `open_fsspec` accepts, installed or not."""
    return sorted(set(fsspec.available_protocols()) - _WRAPPERS - _ELSEWHERE)


class _Calls(Protocol):
    async def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of the file system. Raises what it raises; cancelling returns at once."""


class _LoopCalls:
    """Of an asynchronous file system."""

    def __init__(self, bridge: Bridge, file_system: Any) -> None:
        self._bridge = bridge
        self._file_system = file_system

    async def call(self, method: str, *arguments: Any) -> Any:
        async def make() -> Any:
            self._file_system.invalidate_cache()
            return await getattr(self._file_system, f"_{method}")(*arguments)

        return await self._bridge.run(make)


class _ThreadCalls:
    """Of a file system that blocks. One thread uses an instance at a time."""

    def __init__(self, make: Callable[[], Any], slots: int) -> None:
        self._make = make
        self._idle: deque[Any] = deque()
        self._closed = False
        # A slot stays taken until its thread ends, also when nobody waits for it any more.
        self._slots = trio.CapacityLimiter(slots)

    async def call(self, method: str, *arguments: Any) -> Any:
        return await trio.to_thread.run_sync(
            lambda: self._work(method, arguments), limiter=self._slots, abandon_on_cancel=True
        )

    def _work(self, method: str, arguments: tuple[Any, ...]) -> Any:
        try:
            file_system = self._idle.pop()
        except IndexError:
            file_system = self._make()
        try:
            file_system.invalidate_cache()
            result = getattr(file_system, method)(*arguments)
        except FileNotFoundError:
            self._give_back(file_system)
            raise
        except Exception:
            # It is not used again: its connection may be in the middle of something.
            _hang_up(file_system)
            raise
        self._give_back(file_system)
        return result

    def _give_back(self, file_system: Any) -> None:
        self._idle.append(file_system)
        if self._closed:
            # Nobody waited for this thread any more.
            self._hang_up_idle()

    def _hang_up_idle(self) -> None:
        while True:
            try:
                file_system = self._idle.pop()
            except IndexError:
                return
            _hang_up(file_system)

    async def close(self) -> None:
        """Give up the connections that nobody uses; those in use are given up by whoever uses them. What hangs is left
        alone. Not to be cancelled.
        """
        self._closed = True
        with trio.move_on_after(CLOSE_S, shield=True):
            await trio.to_thread.run_sync(self._hang_up_idle, limiter=trio.CapacityLimiter(1), abandon_on_cancel=True)


_CONNECTIONS = ("ftp", "client", "session")
"""Attributes of file systems that block, which have connections, and threads with them."""


def _hang_up(file_system: Any) -> None:
    """Without a word to the other side, which may not answer."""
    for name in _CONNECTIONS:
        close = getattr(getattr(file_system, name, None), "close", None)
        if close is not None:
            with suppress(Exception):
                close()


class _Paths:
    """How paths of ours are named by the file system."""

    def __init__(self, root: str) -> None:
        self._root = root.rstrip("/")
        self._top = root

    def full(self, path: str) -> str:
        return f"{self._root}/{path}" if path else self._top

    def directory(self, path: str) -> str:
        return self.full(path)

    def name(self, path: str, entry: Mapping[str, Any]) -> str | None:
        """The name of an entry in the directory `path`; None for what is not one, such as the directory itself."""
        full, name = self.full(path).strip("/"), str(entry["name"]).strip("/")
        if name == full:
            return None
        return name.removeprefix(full).removeprefix("/") if full else name

    def kind(self, entry: Mapping[str, Any]) -> Kind | None:
        return {"directory": Kind.DIRECTORY, "file": Kind.FILE}.get(str(entry.get("type")))


class _Urls(_Paths):
    """Of http: full URLs, quoted; directories end in "/", and a server redirects there when the slash is missing."""

    def full(self, path: str) -> str:
        return f"{self._root}/{quote(path)}"

    def directory(self, path: str) -> str:
        return self.full(path).rstrip("/") + "/"

    def name(self, path: str, entry: Mapping[str, Any]) -> str | None:
        name = str(entry["name"]).removeprefix(self.directory(path))
        # Links that are no entries: other orders of the list, and other places.
        if not name or "?" in name or "#" in name or "://" in name:
            return None
        return unquote(name.rstrip("/"))

    def kind(self, entry: Mapping[str, Any]) -> Kind | None:
        is_directory = str(entry.get("url", entry["name"])).endswith("/")
        return Kind.DIRECTORY if is_directory else Kind.FILE


class FsspecStore:
    """Implements `base.UnderStore`. Made by `open_fsspec`.

    An object that has the name of a directory too is hidden by it in listings; a look at the name finds what the
    library prefers.
    """

    def __init__(
        self,
        origin: str,
        paths: _Paths,
        calls: _Calls,
        settling: settle.Settling,
        secrets: list[str],
        requests: Requests,
        timeout_s: float,
    ) -> None:
        self.origin = origin
        self.hidden_keys = 0
        self._paths = paths
        self._calls = calls
        self._settling = settling
        self._secrets = secrets
        self._requests = requests
        self._timeout_s = timeout_s

    async def stat(self, path: str) -> ObjectInfo:
        return await self._requests.run(f"stat {path!r}", lambda: self._look(path))

    async def _look(self, path: str) -> ObjectInfo:
        full = self._paths.full(path) if path else self._paths.directory(path)
        info = self._info(path, await self._call(path, "info", full))
        if info is None:
            raise NotFoundError(f"{path}: neither a file nor a directory, or of unknown size")
        return info

    def _info(self, path: str, entry: Mapping[str, Any]) -> ObjectInfo | None:
        kind = self._paths.kind(entry)
        if kind is Kind.DIRECTORY:
            return ObjectInfo(path, kind, 0, 0, "")
        size = entry.get("size")
        if kind is None or size is None:
            return None
        mtime_ns = modified_ns(entry)
        return ObjectInfo(path, kind, int(size), mtime_ns, tag_of(entry, mtime_ns))

    @asynccontextmanager
    async def list_dir(self, path: str) -> AsyncGenerator[AsyncIterator[list[ObjectInfo]], None]:
        iterator = self._chunks(path)
        try:
            yield iterator
        finally:
            await iterator.aclose()

    async def _chunks(self, path: str) -> AsyncGenerator[list[ObjectInfo], None]:
        listed = await self._requests.run(
            f"list {path!r}", lambda: self._call(path, "ls", self._paths.directory(path), True)
        )
        directories: dict[str, ObjectInfo] = {}
        files: dict[str, Mapping[str, Any]] = {}
        for entry in listed:
            name = self._paths.name(path, entry)
            if name is None:
                continue
            kind = self._paths.kind(entry)
            below = f"{path}/{name}" if path else name
            if kind is None or not is_file_name(name):
                self.hidden_keys += 1
            elif kind is Kind.DIRECTORY:
                directories[below] = ObjectInfo(below, kind, 0, 0, "")
            else:
                files[below] = entry
        found = list(directories.values())
        todo = [each for each in files.items() if each[0] not in directories]
        while found or todo:
            room = _CHUNK - len(found)
            found += await self._infos(todo[:room])
            todo = todo[room:]
            chunk, found = found[:_CHUNK], found[_CHUNK:]
            if chunk:
                yield chunk

    async def _infos(self, entries: list[tuple[str, Mapping[str, Any]]]) -> list[ObjectInfo]:
        """Of files in a listing; those that it tells no size of are looked at one by one, some at once."""
        infos = {path: self._info(path, entry) for path, entry in entries}

        async def look(path: str) -> None:
            try:
                infos[path] = await self.stat(path)
            except NotFoundError:
                del infos[path]  # removed while we looked, or a link to nothing

        async with trio.open_nursery() as nursery:
            for path, entry in entries:
                if entry.get("size") is None:
                    nursery.start_soon(look, path)
        self.hidden_keys += sum(info is None for info in infos.values())
        return [info for info in infos.values() if info is not None]

    async def read_range(self, info: ObjectInfo, offset: int, length: int) -> bytes:
        """Three requests: the version, the bytes, the version again. Waits for what only a time tells to settle."""
        if length == 0:
            return b""
        if info.tag.startswith(_BY_TIME):
            pause_s = self._settling.pause_s(info.path, info.tag, info.mtime_ns)
            if pause_s > 0:
                await self._requests.run(f"stat {info.path!r}", lambda: self._check(info))
                await trio.sleep(pause_s)

        async def read() -> bytes:
            await self._check(info)
            data: bytes = await self._call(info.path, "cat_file", self._paths.full(info.path), offset, offset + length)
            await self._check(info)
            if len(data) < length:
                raise UnavailableError(f"{info.path}: the answer broke off after {len(data)} of {length} bytes")
            if len(data) > length:
                raise UnderStoreError(f"{info.path}: got {len(data)} bytes for {length}; the server sends no ranges")
            return data

        return await self._requests.run(f"read {info.path!r}", read)

    async def read_files(
        self, infos: Sequence[ObjectInfo], keep: Keep, at_once: int, claim: Claim
    ) -> list[Exception | None]:
        return await read_one_by_one(self, infos, keep, at_once, claim)

    async def _check(self, info: ObjectInfo) -> None:
        now = await self._look(info.path)
        if (now.kind, now.size_bytes, now.tag) != (info.kind, info.size_bytes, info.tag):
            raise ContentChangedError(f"{info.path}: changed in the under-store")

    async def _call(self, path: str, method: str, *arguments: Any) -> Any:
        with trio.move_on_after(self._timeout_s):
            try:
                return await self._calls.call(method, *arguments)
            except Exception as error:
                raise translate(f"{self.origin}: {path or '/'}", error, self._secrets) from error
        raise UnavailableError(f"{self.origin}: {path or '/'}: no answer within {self._timeout_s:g} s")


_BY_TIME = "time-"


def tag_of(entry: Mapping[str, Any], mtime_ns: int) -> str:
    """What tells this version from others, by what the file system says of it; "" if nothing does."""
    for name in _VERSIONS:
        value = entry.get(name)
        # A weak etag may stay the same when bytes change.
        if value and not str(value).startswith("W/"):
            return str(value).strip('"')
    return f"{_BY_TIME}{mtime_ns:x}-{int(entry['size']):x}" if mtime_ns else ""


def modified_ns(entry: Mapping[str, Any]) -> int:
    """When it was last changed; 0 if nobody knows."""
    for name in _TIMES:
        value = entry.get(name)
        if value:
            # Only HDFS counts milliseconds.
            return _nanoseconds(value, 1_000_000 if name == "modificationTime" else 1_000_000_000)
    return 0


def _nanoseconds(value: Any, unit: int) -> int:
    if isinstance(value, (int, float)):
        # What a float holds of the time of today.
        return round(value * (unit // 1000)) * 1000
    time = value if isinstance(value, datetime) else _parse_time(str(value))
    if time is None:
        return 0
    if time.tzinfo is None:
        time = time.replace(tzinfo=UTC)
    # Not by way of timestamp(): a float does not hold the microseconds.
    return (time - _EPOCH) // timedelta(microseconds=1) * 1000


def _parse_time(text: str) -> datetime | None:
    """ISO 8601, RFC 5322 (HTTP), or the digits of FTP."""
    parsers: list[Callable[[str], datetime]] = [
        lambda digits: datetime.strptime(digits.partition(".")[0], "%Y%m%d%H%M%S"),
        datetime.fromisoformat,
        email.utils.parsedate_to_datetime,
    ]
    for parse in parsers:
        try:
            return parse(text)
        except ValueError:
            pass
    return None


_FAILURES = (OSError, EOFError, asyncio.TimeoutError, aiohttp.ClientError)


def translate(where: str, error: Exception, secrets: list[str]) -> CachefsError:
    """What an error of fsspec or of a library below it means."""
    if isinstance(error, CachefsError):
        return error
    if isinstance(error, FileNotFoundError):
        # Some implementations call every failure a missing file; what they raise it from says what it was.
        cause = error.__cause__
        if isinstance(cause, _FAILURES) or (isinstance(cause, Exception) and _status(cause)):
            error = cause
    text = str(error) or type(error).__name__
    for secret in secrets:
        text = text.replace(secret, "***")
    status = _status(error)
    if isinstance(error, (FileNotFoundError, NotADirectoryError, IsADirectoryError)) or status in (404, 410):
        return NotFoundError(f"{where}: no such file")
    if isinstance(error, PermissionError) or status in (401, 403):
        return DeniedError(f"{where}: access denied ({text})")
    if status in (429, 503):
        throttled = ThrottledError(f"{where}: the store asks for fewer requests ({text})")
        headers = getattr(error, "headers", None) or getattr(getattr(error, "response", None), "headers", None) or {}
        throttled.retry_after_s = retry_after_s(headers.get("Retry-After", ""))
        return throttled
    if status == 416:
        return ContentChangedError(f"{where}: the file is shorter than it was")
    if status >= 500 or isinstance(error, _FAILURES):
        return UnavailableError(f"{where}: {text}")
    return UnderStoreError(f"{where}: {type(error).__name__}: {text}")


def _status(error: Exception) -> int:
    """As of HTTP; 0 if the error has none."""
    if isinstance(error, ftplib.Error):
        code = str(error)[:3]
        return {"530": 401, "532": 401, "550": 404}.get(code, 500 if code.startswith("4") else 400)
    for holder in (error, getattr(error, "response", None)):
        for name in ("status", "status_code", "code"):
            value = getattr(holder, name, None)
            if isinstance(value, int) or (isinstance(value, str) and value.isdecimal()):
                return int(value)
    return 0


def storage_options(options: Mapping[str, str]) -> dict[str, Any]:
    """Texts as what they look like: true and false, whole numbers, JSON objects. Raises ConfigError."""
    return {name: _value(name, text) for name, text in options.items() if name not in OPTIONS}


def _value(name: str, text: str) -> Any:
    if text.startswith("{"):
        try:
            return json.loads(text)
        except ValueError:
            raise ConfigError(f"{opts.KEY} {name}", "{…}", "a JSON object") from None
    if is_credential(name):
        return text  # whatever it looks like
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    return int(text) if text.isascii() and text.isdecimal() else text


def _texts(value: Any) -> list[str]:
    """Of what may be secret: every text and number in an option."""
    if isinstance(value, dict):
        return [text for each in value.values() for text in _texts(each)]
    return [str(value)] if not isinstance(value, bool) and len(str(value)) >= 4 else []


@asynccontextmanager
async def open_fsspec(url: str, options: Mapping[str, str]) -> AsyncGenerator[FsspecStore, None]:
    """Raises ConfigError for a wrong URL or option, or when the package for the scheme is not installed.

    Makes no request.
    """
    scheme = url.partition("://")[0]
    parts = urlsplit(url)
    if parts.password is not None or parts.query or parts.fragment:
        # Not shown: it may have a secret.
        raise ConfigError("URL", f"{scheme}://…", "no password, ? or #; credentials are options")
    try:
        kind: Any = Ftp if scheme == "ftp" else fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        raise ConfigError("URL", url, f"an installed package for {scheme}: {error}") from error
    deadline_s = opts.number(options, "deadline", 60, 0.1, 3600)
    timeout_s = opts.number(options, "request_timeout", 15, 0.05, 600)
    slots = int(opts.number(options, "max_connections", 32, 1, 4096))
    settling = settle.Settling(settle.settled_s(options))
    given = storage_options(options)
    secrets = [text for name, value in given.items() if name not in _PLACES for text in _texts(value)]
    origin = f"{scheme}://{parts.netloc}/" + "/".join(part for part in parts.path.split("/") if part)
    origin = origin.rstrip("/") + "".join(f";{name}={given[name]}" for name in _PLACES if name in given)
    arguments = {
        **kind._get_kwargs_from_urls(url),
        **given,
        "use_listings_cache": False,
        "skip_instance_cache": True,
    }
    # Whatever blocks in a thread must end by itself.
    if "timeout" in inspect.signature(kind.__init__).parameters:
        arguments.setdefault("timeout", timeout_s)
    paths = _Urls(url) if scheme in ("http", "https") else _Paths(kind._strip_protocol(url))

    def store(calls: _Calls) -> FsspecStore:
        return FsspecStore(origin, paths, calls, settling, secrets, Requests(deadline_s, slots), timeout_s)

    if not kind.async_impl:
        calls = _ThreadCalls(lambda: kind(**arguments), slots)
        try:
            yield store(calls)
        finally:
            await calls.close()
        return
    async with open_bridge(f"cachefs-{scheme}") as bridge:

        async def set_up() -> Any:
            return kind(asynchronous=True, **arguments)

        async def close() -> None:
            for name in _CLIENTS:
                client = getattr(file_system, name, None)
                if client is not None:
                    await client.close()

        try:
            file_system = await bridge.run(set_up)
        except (TypeError, ValueError) as error:
            raise ConfigError(opts.KEY, ", ".join(sorted(options)) or "(none)", "usable settings") from error
        try:
            yield store(_LoopCalls(bridge, file_system))
        finally:
            await bridge.close(close, origin)
