"""s3:// under the contract on a real server, and its bad days through a proxy."""

from __future__ import annotations

import gc
import os
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, suppress
from datetime import UTC, datetime
from pathlib import Path

import pytest
import trio
from botocore.utils import parse_timestamp
from obstore.exceptions import GenericError

from cachefs.model import (
    ConfigError,
    ContentChangedError,
    DeniedError,
    Kind,
    MiB,
    NotFoundError,
    ObjectInfo,
    ThrottledError,
    UnavailableError,
    UnderStoreError,
)
from cachefs.testing.faulty_s3 import Fault, FaultyS3, running_faulty_s3
from cachefs.testing.fixtures import Bucket
from cachefs.testing.ports import hold_port
from cachefs.testing.understore_contract import Behind, UnderStoreContract, list_all, names
from cachefs.ufs import UnderStore, open_under_store, s3, s3_ranges
from cachefs.ufs.s3 import open_s3, parse_time


@pytest.fixture
def behind(s3_bucket: Bucket) -> Bucket:
    return s3_bucket


@pytest.fixture(params=["obstore", "s3fs"])
def reader(request: pytest.FixtureRequest) -> str:
    """What reads ranges; everything is true of both."""
    return str(request.param)


@pytest.fixture
async def ufs(behind: Bucket, reader: str) -> AsyncIterator[UnderStore]:
    async with open_under_store(behind.url, {**behind.options, "reader": reader}) as ufs:
        yield ufs


class TestS3(UnderStoreContract):
    @pytest.mark.parametrize("reader", ["s3fs"], indirect=True)
    async def test_a_long_listing_is_streamed(self, ufs: UnderStore, behind: Behind) -> None:
        """Once, as no reader is in it."""
        await super().test_a_long_listing_is_streamed(ufs, behind)


class TestS3ByMoto(UnderStoreContract):
    """Another server, which also honours If-Match."""

    @pytest.fixture
    def behind(self, moto_bucket: Bucket) -> Bucket:
        return moto_bucket

    @pytest.fixture
    def reader(self) -> str:
        return "obstore"

    async def test_a_long_listing_is_streamed(
        self, ufs: UnderStore, behind: Behind, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """In small pages, as this server is slow. The last one is full."""
        monkeypatch.setattr(s3, "_PAGE", 10)
        behind.put({f"many/{number:02}": b"x" for number in range(30)})
        async with ufs.list_dir("many") as chunks:
            assert [len(chunk) async for chunk in chunks] == [10, 10, 10]


async def test_credentials_of_the_environment(behind: Bucket, monkeypatch: pytest.MonkeyPatch, reader: str) -> None:
    behind.put({"file": b"content"})
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", behind.options["key"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", behind.options["secret"])
    monkeypatch.setenv("AWS_ENDPOINT_URL", behind.options["endpoint_url"])
    async with open_under_store(behind.url, {"reader": reader}) as ufs:
        assert bytes(await ufs.read_range(await ufs.stat("file"), 1, 3)) == b"ont"


async def test_credentials_of_a_profile_in_the_usual_file(
    behind: Bucket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, reader: str
) -> None:
    behind.put({"file": b"content"})
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws" / "credentials").write_text(
        "[default]\naws_access_key_id = nobody\naws_secret_access_key = nothing\n"
        f"[training]\naws_access_key_id = {behind.options['key']}\n"
        f"aws_secret_access_key = {behind.options['secret']}\n"
    )
    monkeypatch.setenv("HOME", str(tmp_path))
    endpoint = {"endpoint_url": behind.options["endpoint_url"], "reader": reader}
    async with open_under_store(behind.url, {**endpoint, "profile": "training"}) as ufs:
        assert bytes(await ufs.read_range(await ufs.stat("file"), 1, 3)) == b"ont"
    monkeypatch.setenv("AWS_PROFILE", "training")
    async with open_under_store(behind.url, endpoint) as ufs:
        assert bytes(await ufs.read_range(await ufs.stat("file"), 1, 3)) == b"ont"
    monkeypatch.delenv("AWS_PROFILE")
    async with open_under_store(behind.url, endpoint) as ufs:
        with pytest.raises(DeniedError):
            await ufs.stat("file")
    with pytest.raises(ConfigError, match="profile"):
        async with open_under_store(behind.url, {**endpoint, "profile": "nosuch"}):
            pass


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Error performing GET http://h:4168/x in 1.00416s, 503 tries - error sending request", UnavailableError),
        ("Error performing GET http://h/416 in 1s - Server returned non-2xx status code: 500 Oops", UnavailableError),
        ("Error performing GET http://h/x in 1s - Server returned non-2xx status code: 503 Busy", ThrottledError),
        ("Error performing GET http://h/x in 1s - Server returned non-2xx status code: 416 No", ContentChangedError),
    ],
)
def test_only_the_status_of_an_error_says_what_it_is(text: str, expected: type[Exception]) -> None:
    """A time of 1.00416 s was once taken for status 416, and a stalled read for a changed object."""
    assert type(s3_ranges._translate("x", GenericError(text))) is expected


async def test_keys_that_obstore_would_change_are_left_to_s3fs(behind: Bucket) -> None:
    keys = ("a/b", "a//b", "a/./b", "a/../b", "a/", "/a", "a\nb", "\x7f", "ü +%")
    async with open_s3("s3://bucket/p", behind.options) as ufs:
        assert ufs._ranges is not None
        assert [key for key in keys if ufs._ranges.can_read(key)] == ["a/b", "ü +%"]


@pytest.fixture
def faulty(behind: Bucket) -> Iterator[FaultyS3]:
    with running_faulty_s3(behind.server.endpoint) as faulty:
        yield faulty


@pytest.fixture
def patience_s() -> float:
    """Plenty, for what is to be tried again; tests of what stays wrong have less."""
    return 30


@pytest.fixture
def silence_s() -> float:
    """Without a byte, until a request is given up: no answer that is only late."""
    return 15


FAILS_SOON = pytest.mark.parametrize("patience_s", [1])


@pytest.fixture
async def through(
    faulty: FaultyS3, behind: Bucket, reader: str, patience_s: float, silence_s: float
) -> AsyncIterator[UnderStore]:
    """The store through the proxy."""
    options = {
        **behind.options,
        "endpoint_url": faulty.endpoint,
        "deadline": f"{patience_s}",
        "read_timeout": f"{silence_s}",
        "reader": reader,
    }
    async with open_under_store(behind.url, options) as ufs:
        yield ufs


async def test_keys_that_are_no_file_names_are_hidden_and_counted(behind: Bucket) -> None:
    """On a page as S3 sends it, since the server used here stores no such keys."""
    async with open_s3("s3://bucket/p", behind.options) as ufs:
        facts = {"Size": 1, "LastModified": datetime(2026, 1, 1, tzinfo=UTC), "ETag": '"e"'}
        keys = ["p/d/", "p/d/good", "p/d/" + "x" * 256, "p/d/.", "p/d/..", "p/d/nul\0", "p/d/shadowed"]
        page = {
            "Contents": [{"Key": key, **facts} for key in keys],
            "CommonPrefixes": [{"Prefix": f"p/d/{name}/"} for name in ("dir", "", "..", "shadowed")],
        }
        assert names(ufs.parse_page("p/d/", page)) == ["d/dir/", "d/good", "d/shadowed/"]
        assert ufs.hidden_keys == 6


async def test_the_origin_has_no_credentials_and_names_the_place(ufs: UnderStore, behind: Bucket) -> None:
    assert ufs.origin == f"{behind.server.endpoint}/{behind.name}/{behind.prefix}".rstrip("/")


@pytest.mark.parametrize(
    ("fault", "silence_s"),
    [(fault, 15) for fault in ("slow-down", "too-many", "internal-error", "reset", "cut-off", "short-body")]
    + [("stall", 2)],
)
async def test_what_passes_is_tried_again(through: UnderStore, faulty: FaultyS3, behind: Bucket, fault: Fault) -> None:
    content = bytes(range(256)) * 1000
    behind.put({"file": content})
    info = await through.stat("file")
    faulty.inject(fault, part="/file", times=1)
    assert bytes(await through.read_range(info, 1000, 200_000)) == content[1000:201_000]
    asked = len([path for method, path in faulty.requests if method == "GET" and "/file" in path])
    # An answer that is only late may be given up, too, where little silence is borne.
    assert asked == 2 or (asked > 2 and fault == "stall")


@pytest.mark.parametrize("reader", ["s3fs"], indirect=True)
@pytest.mark.parametrize("fault", ["slow-down", "internal-error"])
async def test_listings_are_tried_again_page_by_page(
    through: UnderStore, faulty: FaultyS3, behind: Bucket, fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "_PAGE", 10)
    behind.put({f"many/{number:02}": b"" for number in range(25)})
    faulty.inject(fault, part="continuation-token", times=1)
    assert len(await list_all(through, "many")) == 25


@pytest.mark.parametrize(("fault", "error"), [("slow-down", ThrottledError), ("internal-error", UnavailableError)])
async def test_the_deadline_ends_it(faulty: FaultyS3, behind: Bucket, fault: Fault, error: type[Exception]) -> None:
    options = {**behind.options, "endpoint_url": faulty.endpoint, "deadline": "1"}
    async with open_under_store(behind.url, options) as ufs:
        faulty.inject(fault, method="HEAD", times=1000)
        with pytest.raises(error):
            await ufs.stat("file")


async def test_the_answer_is_believed_and_not_what_was_asked(
    through: UnderStore, faulty: FaultyS3, behind: Bucket
) -> None:
    behind.put({"file": b"content"})
    info = await through.stat("file")
    faulty.inject("other-etag", part="/file", times=2)
    with pytest.raises(ContentChangedError):
        await through.read_range(info, 0, 5)


async def test_one_answer_of_another_version_is_looked_at_again(
    through: UnderStore, faulty: FaultyS3, behind: Bucket
) -> None:
    """By ranges and as whole files: an error would reach the reader of an object that never changed."""
    behind.put({"file": b"content"})
    info = await through.stat("file")
    faulty.inject("other-etag", part="/file", times=1)
    assert bytes(await through.read_range(info, 0, 5)) == b"conte"
    assert ("HEAD", f"/{behind.name}/{behind.prefix}file") in faulty.requests
    faulty.inject("other-etag", part="/file", times=1)
    kept = []
    assert await through.read_files([info], lambda number, data: kept.append(bytes(data)), 4, lambda _: True) == [None]
    assert kept == [b"content"]


async def test_answers_of_another_version_keep_no_connection(
    through: UnderStore, faulty: FaultyS3, behind: Bucket
) -> None:
    """They are not read to their end. No garbage collection is waited for: services seldom do one."""
    size = 8 * MiB
    behind.put({"file": bytes(size)})
    info = await through.stat("file")
    await through.read_range(info, 0, size // 2)
    gc.disable()
    try:
        before = _sockets()
        for _ in range(10):
            faulty.inject("other-etag", part="/file", times=1)
            await through.read_range(info, 0, size // 2)
            faulty.inject("other-etag", part="/file", times=1)
            assert await through.read_files([info], lambda number, data: None, 4, lambda _: True) == [None]
        with trio.fail_after(60):
            while _sockets() > before + 4:
                await trio.sleep(0.05)
    finally:
        gc.enable()


def _sockets() -> int:
    found = 0
    for fd in os.scandir("/proc/self/fd"):
        with suppress(OSError):
            found += os.readlink(fd.path).startswith("socket:")
    return found


@FAILS_SOON
async def test_another_range_than_was_asked_for_is_never_used(
    through: UnderStore, faulty: FaultyS3, behind: Bucket
) -> None:
    behind.put({"file": b"x" * 50})
    info = await through.stat("file")
    faulty.inject("wrong-range", part="/file", times=1000)
    with pytest.raises((ContentChangedError, UnavailableError)):
        await through.read_range(info, 0, 5)


class TestThroughMoto:
    """A proxy before a server that checks no signatures, so that headers can be taken away on the way."""

    @pytest.fixture
    def behind(self, moto_bucket: Bucket) -> Bucket:
        return moto_bucket

    async def test_a_server_that_ignores_ranges(self, through: UnderStore, faulty: FaultyS3, behind: Bucket) -> None:
        behind.put({"file": b"x" * 50})
        info = await through.stat("file")
        faulty.inject("ignore-range", part="/file", times=1000)
        with pytest.raises(UnderStoreError, match="sends no ranges"):
            await through.read_range(info, 0, 5)

    @pytest.mark.parametrize("ignores", [False, True])
    @pytest.mark.parametrize("content", [b"replaced by as much", b"cut off", None])
    async def test_what_changes_between_two_ranges(
        self, through: UnderStore, faulty: FaultyS3, behind: Bucket, ignores: bool, content: bytes | None
    ) -> None:
        """With servers that honour If-Match, and with those that do not."""
        behind.put({"file": b"the first version.."})
        info = await through.stat("file")
        if ignores:
            faulty.inject("ignore-if-match", part="/file", times=1000)
        assert bytes(await through.read_range(info, 0, 10)) == b"the first "
        if content is None:
            behind.delete("file")
        else:
            behind.put({"file": content})
        with pytest.raises((ContentChangedError, NotFoundError)):
            await through.read_range(info, 10, 9)


@FAILS_SOON
async def test_a_listing_that_fails_in_the_middle_raises(
    through: UnderStore, faulty: FaultyS3, behind: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the second page of three; what was given before stands."""
    monkeypatch.setattr(s3, "_PAGE", 5)
    behind.put({f"many/{number:02}": b"" for number in range(15)})
    got = []
    async with through.list_dir("many") as chunks:
        got += await anext(aiter(chunks))
        faulty.inject("internal-error", part="list-type=2", times=1000)
        with pytest.raises(UnavailableError):
            # The second page may have been asked for before; the third has not.
            for _ in range(2):
                got += await anext(aiter(chunks))
    assert [each.path for each in got[:5]] == [f"many/{number:02}" for number in range(5)]
    assert len(got) < 15


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(60):
        while not condition():
            await trio.sleep(0.01)


async def test_cancelled_reads_and_listings_end_at_once_with_their_connections(
    through: UnderStore, faulty: FaultyS3, behind: Bucket
) -> None:
    behind.put({"file": b"content"})
    info = await through.stat("file")
    await until(lambda: faulty.open_connections() <= 2)
    before = faulty.open_connections()
    faulty.inject("stall", part="/file", times=1000)
    faulty.inject("stall", part="list-type=2", times=1000)
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(through.read_range, info, 0, 3)
                nursery.start_soon(list_all, through, "")
            await trio.to_thread.run_sync(faulty.wait_stalled, 8)
            assert faulty.open_connections() >= 8
            nursery.cancel_scope.cancel()
        await until(lambda: faulty.open_connections() <= before)


class TestSlowDown:
    """A throttled answer is for all requests of the store."""

    @pytest.fixture
    async def through(self, faulty: FaultyS3, behind: Bucket, reader: str) -> AsyncIterator[UnderStore]:
        options = {**behind.options, "endpoint_url": faulty.endpoint, "reader": reader, "max_connections": "8"}
        async with open_under_store(behind.url, options) as ufs:
            yield ufs

    @staticmethod
    async def read_many(ufs: UnderStore, info: ObjectInfo, count: int) -> None:
        async def read() -> None:
            assert bytes(await ufs.read_range(info, 0, 7)) == b"content"

        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                for _ in range(count):
                    nursery.start_soon(read)

    @pytest.mark.parametrize("fault", ["slow-down", "too-many"])
    async def test_retry_after_is_honoured_by_all(
        self, through: UnderStore, faulty: FaultyS3, behind: Bucket, fault: Fault
    ) -> None:
        behind.put({"file": b"content"})
        info = await through.stat("file")
        faulty.inject(fault, method="HEAD", part="/file", retry_after="1")
        asked_at = len(faulty.came_at)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(through.stat, "file")
            # A HEAD and a listing of one key, at once.
            first = asked_at + 2
            await until(lambda: through._requests.slowed and len(faulty.came_at) >= first)  # type: ignore[attr-defined]
            nursery.start_soon(self.read_many, through, info, 20)
        assert faulty.came_at[first] - faulty.came_at[asked_at] > 0.99

    async def test_requests_are_halved_and_hold_back_while_it_lasts(
        self, through: UnderStore, faulty: FaultyS3, behind: Bucket
    ) -> None:
        behind.put({"file": b"content"})
        info = await through.stat("file")
        faulty.inject("slow-down", part="/file", times=1000)
        before = len(faulty.requests)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.read_many, through, info, 30)
            await until(lambda: len(faulty.requests) - before >= 8)
            await trio.sleep(1.5)
            nursery.cancel_scope.cancel()
        # Each of thirty readers by itself would have asked again four times or more: 150 requests.
        assert len(faulty.requests) - before <= 20
        await until(lambda: faulty.at_once == 0)
        faulty.forget()
        faulty.most_at_once = 0
        await self.read_many(through, info, 4)
        assert faulty.most_at_once <= 4

    async def test_they_come_back_when_the_store_is_well(
        self, through: UnderStore, faulty: FaultyS3, behind: Bucket
    ) -> None:
        behind.put({"file": b"content"})
        info = await through.stat("file")
        faulty.inject("slow-down", part="/file", times=1)
        await self.read_many(through, info, 60)
        assert not through._requests.slowed  # type: ignore[attr-defined]


async def test_a_cancelled_read_ends_at_once(through: UnderStore, faulty: FaultyS3, behind: Bucket) -> None:
    behind.put({"file": b"content"})
    info = await through.stat("file")
    faulty.inject("stall", part="/file", times=10)
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(through.read_range, info, 0, 3)
            await trio.to_thread.run_sync(faulty.wait_stalled)
            nursery.cancel_scope.cancel()


async def test_wrong_credentials_are_told_at_once(behind: Bucket, ufs: UnderStore, reader: str) -> None:
    behind.put({"file": b"content"})
    info = await ufs.stat("file")
    async with open_under_store(behind.url, {**behind.options, "secret": "wrong", "reader": reader}) as wrong:
        for ask in (lambda: wrong.stat("file"), lambda: wrong.read_range(info, 0, 3), lambda: list_all(wrong, "")):
            with pytest.raises(DeniedError, match="access denied") as caught:
                await ask()
            assert "wrong" not in str(caught.value)


async def test_where_credentials_are_missing_is_told(
    behind: Bucket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The process that opens the store has none; somebody who runs `ufs add` may well have."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    options = {"endpoint_url": behind.options["endpoint_url"]}
    async with open_under_store(behind.url, options) as ufs:
        with pytest.raises(DeniedError, match=r"key and secret are not given, .* AWS_ACCESS_KEY_ID"):
            await ufs.stat("")


async def test_a_missing_bucket_is_named(behind: Bucket, reader: str) -> None:
    info = ObjectInfo("file", Kind.FILE, 5, 0, "x")
    async with open_under_store("s3://no-such-bucket/x", {**behind.options, "reader": reader}) as ufs:
        with pytest.raises(NotFoundError, match="no-such-bucket"):
            await ufs.stat("")
        with pytest.raises(NotFoundError, match="no-such-bucket"):
            await list_all(ufs, "")
        with pytest.raises(NotFoundError):
            await ufs.read_range(info, 0, 3)


@pytest.fixture(params=["refuses", "takes connections and never answers", "drops every packet"])
def nowhere(request: pytest.FixtureRequest) -> Iterator[str]:
    """An endpoint at which no store is."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as silent, ExitStack() as held:
        address = silent.getsockname()
        if request.param == "refuses":
            # Of a port that nobody else gets.
            address = held.enter_context(hold_port()).getsockname()
        elif request.param == "takes connections and never answers":
            silent.listen(100)
        else:
            # With its queue full, the kernel drops what comes further.
            for _ in range(3):
                waiting = held.enter_context(socket.socket())
                waiting.setblocking(False)
                waiting.connect_ex(address)
        yield f"http://127.0.0.1:{address[1]}"


async def test_an_unreachable_store_is_unavailable_within_the_timeouts(
    behind: Bucket, reader: str, nowhere: str
) -> None:
    info = ObjectInfo("file", Kind.FILE, 5, 0, "x")
    timeouts = {"connect_timeout": "0.2", "read_timeout": "0.2", "deadline": "0.5"}
    options = {**behind.options, **timeouts, "endpoint_url": nowhere, "reader": reader}
    async with open_under_store(behind.url, options) as ufs:
        for ask in (lambda: ufs.stat("file"), lambda: ufs.read_range(info, 0, 3), lambda: list_all(ufs, "")):
            with trio.fail_after(60), pytest.raises(UnavailableError):
                await ask()


@pytest.mark.parametrize(
    ("url", "options", "key"),
    [
        ("s3://", {}, "URL"),
        ("s3://user:secret@bucket/x", {}, "URL"),
        ("s3://bucket", {"endpoint": "x"}, "--ufs-option"),
        ("s3://bucket", {"key": "x"}, "--ufs-option"),
        ("s3://bucket", {"deadline": "soon"}, "--ufs-option deadline"),
        ("s3://bucket", {"anon": "perhaps"}, "--ufs-option anon"),
        ("s3://bucket", {"reader": "curl"}, "--ufs-option reader"),
        ("s3://bucket", {"endpoint_url": "127.0.0.1:9000"}, "endpoint_url: '127.0.0.1:9000' .* begins with http://"),
        ("s3://bucket", {"endpoint_url": "http://"}, "endpoint_url: 'http://' .* begins with http://"),
    ],
)
async def test_wrong_settings(url: str, options: dict[str, str], key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        async with open_under_store(url, options):
            pass


@pytest.mark.parametrize(
    "text",
    [
        "2024-02-29T23:59:59.000Z",
        "2009-10-12T17:50:30Z",
        "2009-10-12T17:50:30.123456Z",
        "2009-10-12T17:50:30+02:00",
        "Mon, 12 Oct 2009 17:50:30 GMT",
        "1255369830",
        1255369830,
    ],
)
def test_times_are_read_as_botocore_reads_them(text: str | int) -> None:
    parsed, expected = parse_time(text), parse_timestamp(text)
    assert parsed == expected and parsed.utcoffset() == expected.utcoffset()


def test_what_is_no_time_is_refused() -> None:
    with pytest.raises(ValueError, match="Invalid timestamp"):
        parse_time("2024-13-45Tnonsense-Z")
