"""S3 and what speaks like it, through the client that s3fs sets up (sessions, credentials, endpoints).

Range reads go by obstore (`s3_ranges`), which takes a fifth of the processor's time, unless the key or the option
`reader` says otherwise; looks and listings go by s3fs, which is right about odd keys.

The library's requests are made one by one, because its file-system calls send no If-Match and look at no response ETag.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar
from urllib.parse import urlsplit

import aiobotocore.session
import aiohttp
import botocore.exceptions
import botocore.utils
import s3fs
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
    without_credentials,
)
from cachefs.ufs import options as opts
from cachefs.ufs.base import is_file_name
from cachefs.ufs.bridge import Bridge, Running, open_bridge
from cachefs.ufs.files import Claim, Data, Keep, read_one_by_one
from cachefs.ufs.retry import Requests, at_most, retry_after_s
from cachefs.ufs.s3_ranges import RangeReader, open_ranges

logger = logging.getLogger(__name__)

T = TypeVar("T")

OPTIONS = {
    "endpoint_url": "of a store other than AWS",
    "region": "of the bucket",
    "key": "access key id",
    "secret": "secret access key",
    "token": "session token",
    "profile": "name of a profile in the AWS configuration",
    "anon": "true for a public bucket, without credentials",
    "path_style": "true for http://host/bucket instead of http://bucket.host",
    "connect_timeout": "seconds, default 5",
    "read_timeout": "seconds without a byte, default 15",
    "deadline": "seconds for one request with its retries, default 60",
    "max_connections": "at once, default 64",
    "reader": "obstore or s3fs, by which ranges are read; default obstore",
}

_PAGE = 1000
_GONE = {"404", "NoSuchKey", "NotFound"}
_CHANGED = {"412", "PreconditionFailed", "416", "InvalidRange"}
_DENIED = {
    "401",
    "403",
    "AccessDenied",
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "ExpiredToken",
    "AccountProblem",
}
_THROTTLED = {"429", "503", "SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded", "TooManyRequests"}


@dataclass(frozen=True)
class S3Config:
    bucket: str
    prefix: str
    """"" or ending in "/"."""
    deadline_s: float
    connections: int
    reader: str
    session: Mapping[str, Any]
    """Arguments of s3fs.S3FileSystem. Holds credentials."""


def parse_s3(url: str, options: Mapping[str, str]) -> S3Config:
    """Raises ConfigError."""
    parts = urlsplit(url)
    if not parts.netloc or parts.query or parts.fragment or "@" in parts.netloc:
        raise ConfigError(
            "URL", without_credentials(url), "s3://BUCKET or s3://BUCKET/PREFIX; credentials and endpoint are options"
        )
    opts.check_names("s3", options, OPTIONS)
    if ("key" in options) != ("secret" in options):
        raise ConfigError(opts.KEY, "key or secret", "both of them, or neither")
    endpoint = options.get("endpoint_url", "http://x")
    if not endpoint.startswith(("http://", "https://")) or not urlsplit(endpoint).netloc:
        accepted = "a URL that begins with http:// or https://, such as http://minio:9000"
        raise ConfigError(f"{opts.KEY} endpoint_url", without_credentials(endpoint), accepted)
    connections = int(opts.number(options, "max_connections", 64, 1, 4096))
    config: dict[str, Any] = {
        # The only retries are ours, so that one deadline bounds them all.
        "retries": {"total_max_attempts": 1},
        "connect_timeout": opts.number(options, "connect_timeout", 5, 0.05, 600),
        "read_timeout": opts.number(options, "read_timeout", 15, 0.05, 600),
        "max_pool_connections": connections,
    }
    if opts.flag(options, "path_style"):
        config["s3"] = {"addressing_style": "path"}
    session: dict[str, Any] = {
        "anon": opts.flag(options, "anon"),
        "config_kwargs": config,
        "client_kwargs": {"region_name": options["region"]} if "region" in options else {},
    }
    for name in ("endpoint_url", "key", "secret", "token", "profile"):
        if name in options:
            session[name] = options[name]
    prefix = "/".join(part for part in parts.path.split("/") if part)
    deadline_s = opts.number(options, "deadline", 60, 0.1, 3600)
    reader = options.get("reader", "obstore")
    if reader not in ("obstore", "s3fs"):
        raise ConfigError(f"{opts.KEY} reader", reader, "obstore or s3fs")
    return S3Config(parts.netloc, f"{prefix}/" if prefix else "", deadline_s, connections, reader, session)


class S3Store:
    """Implements `base.UnderStore`. Made by `open_s3`."""

    def __init__(self, config: S3Config, client: Any, ranges: RangeReader | None, bridge: Bridge) -> None:
        self._bucket = config.bucket
        self._prefix = config.prefix
        self._deadline_s = config.deadline_s
        self._requests = Requests(config.deadline_s, config.connections)
        self._client = client
        self._ranges = ranges
        self._bridge = bridge
        endpoint = str(client.meta.endpoint_url).rstrip("/")
        self.origin = f"{endpoint}/{config.bucket}/{config.prefix}".rstrip("/")
        self.hidden_keys = 0
        self._has_told_empty = False

    async def stat(self, path: str) -> ObjectInfo:
        async def look() -> ObjectInfo:
            below = self._prefix + path + "/" if path else self._prefix
            lists = self._client.list_objects_v2(Bucket=self._bucket, Prefix=below, MaxKeys=1)
            if not path:
                if not (await lists).get("Contents"):
                    self._tell_empty()
                return _directory("")
            heads = self._client.head_object(Bucket=self._bucket, Key=self._prefix + path)
            both: tuple[Any, Any] = await asyncio.gather(lists, heads, return_exceptions=True)
            listed, head = both
            if isinstance(listed, BaseException):
                raise listed
            if listed.get("Contents"):
                return _directory(path)
            if isinstance(head, BaseException):
                raise head
            return _object(path, head["ContentLength"], head["LastModified"], head["ETag"])

        info: ObjectInfo = await self._request(f"stat {path!r}", look)
        return info

    def _tell_empty(self) -> None:
        """A prefix that is mistyped is no error of an object store: there may be something later."""
        if not self._has_told_empty:
            self._has_told_empty = True
            logger.info("nothing is there yet; is it the right URL? origin=%s", self.origin)

    @asynccontextmanager
    async def list_dir(self, path: str) -> AsyncGenerator[AsyncIterator[list[ObjectInfo]], None]:
        pages = _Pages(self, path)
        try:
            yield pages
        finally:
            await pages.stop()

    async def list_page(self, prefix: str, token: str | None) -> tuple[Any, str | None]:
        """One page of the keys and prefixes right below `prefix`, and the token of the next one. Runs in asyncio."""
        more = {"ContinuationToken": token} if token else {}
        page = await self._client.list_objects_v2(
            Bucket=self._bucket, Prefix=prefix, Delimiter="/", MaxKeys=_PAGE, **more
        )
        return page, page.get("NextContinuationToken") if page.get("IsTruncated") else None

    async def read_range(self, info: ObjectInfo, offset: int, length: int) -> bytes | bytearray | memoryview:
        if length == 0:
            return b""
        key = self._prefix + info.path
        ranges = self._ranges if self._ranges is not None and self._ranges.can_read(key) else None
        throttled = False

        async def attempt() -> bytes | memoryview:
            nonlocal throttled
            # obstore does not tell the header Retry-After: after a throttled answer the client sees it.
            if ranges is None or throttled:
                return await self.translated(what, self._bridge.start(read))
            try:
                return await self.translated(what, self._bridge.start(lambda: ranges.read(key, info, offset, length)))
            except ThrottledError:
                throttled = True
                raise

        what = f"read {info.path!r}"
        last = offset + length - 1
        precondition = {"IfMatch": f'"{info.tag}"'} if info.tag else {}

        async def read() -> bytes:
            response = await self._client.get_object(
                Bucket=self._bucket, Key=key, Range=f"bytes={offset}-{last}", **precondition
            )
            async with response["Body"] as body:
                # Some servers ignore If-Match: what came is believed, not what was asked for.
                etag = _tag(response["ETag"])
                if info.tag and etag != info.tag:
                    raise ContentChangedError(f"{info.path}: etag is {etag} now, it was {info.tag}")
                content_range = response.get("ContentRange", "")
                if not content_range:
                    raise UnderStoreError(f"{info.path}: the server sends no ranges")
                if content_range != f"bytes {offset}-{last}/{info.size_bytes}":
                    raise ContentChangedError(
                        f"{info.path}: got {content_range} for bytes {offset}-{last} of {info.size_bytes}"
                    )
                data: bytes = await body.read()
            if len(data) != length:
                raise UnavailableError(f"{info.path}: the answer broke off after {len(data)} of {length} bytes")
            return data

        try:
            return await self._requests.run(what, attempt)
        except ContentChangedError as error:
            if not await self._is_still(info):
                raise
            logger.info("an answer was of another version than the object is, reading again error=%s", error)
        return await self._requests.run(what, attempt)

    async def _is_still(self, info: ObjectInfo) -> bool:
        """Whether the store has that version, whatever an answer said: one of them may be wrong."""
        if not info.tag:
            return False
        try:
            found = await self.stat(info.path)
        except CachefsError:
            return False
        return (found.tag, found.size_bytes) == (info.tag, info.size_bytes)

    async def read_files(
        self, infos: Sequence[ObjectInfo], keep: Keep, at_once: int, claim: Claim
    ) -> list[Exception | None]:
        ranges = self._ranges
        if ranges is None:
            return await read_one_by_one(self, infos, keep, at_once, claim)
        began = trio.current_time()
        wanted = [(self._prefix + info.path, info) for info in infos]

        async def attempt(slots: int) -> list[Exception | None]:
            return await self._bridge.run(lambda: ranges.read_files(wanted, keep, slots, claim, self._bridge))

        outcomes = await self._requests.together(f"read {len(infos)} objects", at_once, attempt)
        doubted = (ThrottledError, UnavailableError, ContentChangedError)
        again = [n for n, error in enumerate(outcomes) if isinstance(error, doubted)]
        left_s = self._deadline_s - (trio.current_time() - began)
        if again and left_s > 0:

            def keep_again(number: int, data: Data) -> None:
                keep(again[number], data)

            with at_most(left_s):
                found = await read_one_by_one(self, [infos[n] for n in again], keep_again, at_once, lambda _: True)
            for number, error in zip(again, found, strict=True):
                outcomes[number] = error
        return outcomes

    async def _request(self, what: str, make: Callable[[], Any]) -> Any:
        """Run asyncio code, with retries, and errors translated."""
        return await self._requests.run(what, lambda: self.translated(what, self._bridge.start(make)))

    @property
    def slowed(self) -> bool:
        """As of `Requests`."""
        return self._requests.slowed

    def start(self, make: Callable[[], Any]) -> Running[Any]:
        return self._bridge.start(make)

    async def list_again(self, what: str, first: Running[Any] | None, make: Callable[[], Any]) -> Any:
        """The result of `first`, if it is given, or else of `make`; with retries by `make`."""
        started = [first] if first is not None else []

        async def attempt() -> Any:
            return await self.translated(what, started.pop() if started else self._bridge.start(make))

        return await self._requests.run(what, attempt)

    async def translated(self, what: str, running: Running[T]) -> T:
        try:
            return await running.result()
        except Exception as error:
            raise self._translate(what, error) from error

    def _translate(self, what: str, error: Exception) -> CachefsError:
        where = f"s3://{self._bucket}: {what}"
        if isinstance(error, CachefsError):
            return error
        if isinstance(error, botocore.exceptions.ClientError):
            code = str(error.response.get("Error", {}).get("Code", ""))
            status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
            if code == "NoSuchBucket":
                return NotFoundError(f"s3://{self._bucket}: no such bucket")
            if code in _CHANGED or status in (412, 416):
                return ContentChangedError(f"{where}: the object changed")
            if code in _GONE or status == 404:
                return NotFoundError(f"{where}: no such object")
            if code in _DENIED or status in (401, 403):
                return DeniedError(f"{where}: access denied ({code})")
            if code in _THROTTLED or status in (429, 503):
                headers = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
                throttled = ThrottledError(f"{where}: the store asks for fewer requests ({code})")
                throttled.retry_after_s = retry_after_s(headers.get("retry-after", ""))
                return throttled
            if status >= 500 or status == 0:
                return UnavailableError(f"{where}: the store fails ({code})")
            return UnderStoreError(f"{where}: {error}")
        if isinstance(error, (botocore.exceptions.NoCredentialsError, botocore.exceptions.PartialCredentialsError)):
            return DeniedError(
                f"{where}: no credentials: the options key and secret are not given, and where the master (or worker) "
                "was started there is no AWS_ACCESS_KEY_ID and the like either; for a public bucket: anon=true"
            )
        if isinstance(
            error,
            (
                botocore.exceptions.HTTPClientError,
                botocore.exceptions.ConnectionError,
                aiohttp.ClientError,
                asyncio.TimeoutError,
                OSError,
                EOFError,
            ),
        ):
            return UnavailableError(f"{where}: {error or type(error).__name__}")
        if isinstance(error, botocore.exceptions.BotoCoreError):
            return UnderStoreError(f"{where}: {error}")
        return UnderStoreError(f"{where}: {type(error).__name__}: {error}")

    def parse_page(self, prefix: str, page: Any) -> list[ObjectInfo]:
        """What a page of a listing names, directories first: in one page they shadow objects at once."""
        found: dict[str, ObjectInfo] = {}
        skip = len(self._prefix)
        for each in page.get("CommonPrefixes", ()):
            path = each["Prefix"][skip:-1]
            if self._shown(path[len(prefix) - skip :]):
                found[path] = _directory(path)
        for each in page.get("Contents", ()):
            key = each["Key"]
            if key == prefix:
                continue  # the marker of the directory itself
            path = key[skip:]
            if self._shown(key[len(prefix) :]) and path not in found:
                found[path] = _object(path, each["Size"], each["LastModified"], each["ETag"])
        return list(found.values())

    def _shown(self, name: str) -> bool:
        shown = is_file_name(name)
        self.hidden_keys += not shown
        return shown

    def prefix_of(self, path: str) -> str:
        return f"{self._prefix}{path}/" if path else self._prefix


class _Pages:
    """The pages of one listing, the next one being fetched while the caller works on the last."""

    def __init__(self, store: S3Store, path: str) -> None:
        self._store = store
        self._path = path
        self._prefix = store.prefix_of(path)
        self._token: str | None = None
        self._at_end = False
        self._next: Running[Any] | None = None

    def __aiter__(self) -> _Pages:
        return self

    async def __anext__(self) -> list[ObjectInfo]:
        while not self._at_end:
            running, self._next = self._next, None
            token = self._token
            page, self._token = await self._store.list_again(f"list {self._path!r}", running, self._page(token))
            self._at_end = self._token is None
            # What is fetched ahead takes no slot; it is left out when the store wants less.
            if not self._at_end and not self._store.slowed:
                self._next = self._store.start(self._page(self._token))
            found = self._store.parse_page(self._prefix, page)
            if found:
                return found
        raise StopAsyncIteration

    def _page(self, token: str | None) -> Callable[[], Any]:
        return lambda: self._store.list_page(self._prefix, token)

    async def stop(self) -> None:
        if self._next is not None:
            await self._next.abandon()
            self._next = None


@asynccontextmanager
async def open_s3(url: str, options: Mapping[str, str]) -> AsyncGenerator[S3Store, None]:
    """Raises ConfigError for a wrong URL or option. Does not talk to the store yet."""
    config = parse_s3(url, options)
    async with open_bridge("cachefs-s3") as bridge:

        async def set_up() -> tuple[Any, RangeReader | None]:
            arguments = dict(config.session)
            session = aiobotocore.session.AioSession(profile=arguments.pop("profile", None))
            parsers = session.get_component("response_parser_factory")
            parsers.set_parser_defaults(timestamp_parser=parse_time)
            file_system = s3fs.S3FileSystem(asynchronous=True, skip_instance_cache=True, session=session, **arguments)
            client = await file_system.set_session()
            if config.reader != "obstore":
                return client, None
            return client, await open_ranges(config.bucket, config.session, client, session)

        try:
            client, ranges = await bridge.run(set_up)
        except (botocore.exceptions.BotoCoreError, ValueError) as error:
            raise ConfigError(opts.KEY, ", ".join(sorted(options)) or "(none)", f"usable settings ({error})") from error
        try:
            yield S3Store(config, client, ranges, bridge)
        finally:
            await bridge.close(client.close, f"s3://{config.bucket}")


def parse_time(text: Any) -> datetime:
    """As botocore's own parser of times, which takes most of the time of a listing, for what listings say."""
    if isinstance(text, str) and text[10:11] == "T" and text.endswith("Z"):
        try:
            return datetime.fromisoformat(text)
        except ValueError:
            pass
    parsed: datetime = botocore.utils.parse_timestamp(text)
    return parsed


def _directory(path: str) -> ObjectInfo:
    return ObjectInfo(path, Kind.DIRECTORY, 0, 0, "")


def _object(path: str, size: int, modified: Any, etag: str) -> ObjectInfo:
    # Whole seconds: HEAD has no more, and a listing must not seem to change what a HEAD found.
    return ObjectInfo(path, Kind.FILE, size, int(modified.timestamp()) * 1_000_000_000, _tag(etag))


def _tag(etag: str) -> str:
    return etag.strip('"')
