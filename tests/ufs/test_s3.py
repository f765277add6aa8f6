"""s3:// under the contract on a real server, and its bad days through a proxy."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime

import pytest
import trio
from obstore.exceptions import GenericError

from cachefs.model import (
    ConfigError,
    ContentChangedError,
    DeniedError,
    NotFoundError,
    ThrottledError,
    UnavailableError,
)
from cachefs.testing.faulty_s3 import Fault, FaultyS3, running_faulty_s3
from cachefs.testing.fixtures import Bucket
from cachefs.testing.understore_contract import UnderStoreContract, list_all, names
from cachefs.ufs import UnderStore, open_under_store, s3_ranges
from cachefs.ufs.s3 import open_s3


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
    pass


async def test_credentials_of_the_environment(behind: Bucket, monkeypatch: pytest.MonkeyPatch, reader: str) -> None:
    behind.put({"file": b"content"})
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", behind.options["key"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", behind.options["secret"])
    monkeypatch.setenv("AWS_ENDPOINT_URL", behind.options["endpoint_url"])
    async with open_under_store(behind.url, {"reader": reader}) as ufs:
        assert bytes(await ufs.read_range(await ufs.stat("file"), 1, 3)) == b"ont"


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
    async with open_s3("s3://bucket/p", behind.options) as ufs:
        assert ufs._ranges is not None
        assert [key for key in ("a/b", "a//b", "a/./b", "a/../b", "a/", "/a", "ü +%") if ufs._ranges.can_read(key)] == [
            "a/b",
            "ü +%",
        ]


@pytest.fixture
def faulty(behind: Bucket) -> Iterator[FaultyS3]:
    with running_faulty_s3(behind.server.endpoint) as faulty:
        yield faulty


@pytest.fixture
async def through(faulty: FaultyS3, behind: Bucket, reader: str) -> AsyncIterator[UnderStore]:
    """The store through the proxy, patient for a few seconds."""
    options = {
        **behind.options,
        "endpoint_url": faulty.endpoint,
        "deadline": "4",
        "read_timeout": "1",
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


@pytest.mark.parametrize("fault", ["slow-down", "internal-error", "reset", "cut-off", "stall"])
async def test_what_passes_is_tried_again(through: UnderStore, faulty: FaultyS3, behind: Bucket, fault: Fault) -> None:
    content = bytes(range(256)) * 1000
    behind.put({"file": content})
    info = await through.stat("file")
    faulty.inject(fault, part="/file", times=1)
    assert bytes(await through.read_range(info, 1000, 200_000)) == content[1000:201_000]
    assert len([path for method, path in faulty.requests if method == "GET" and "/file" in path]) == 2


@pytest.mark.parametrize("reader", ["s3fs"], indirect=True)
@pytest.mark.parametrize("fault", ["slow-down", "internal-error"])
async def test_listings_are_tried_again_page_by_page(
    through: UnderStore, faulty: FaultyS3, behind: Bucket, fault: Fault
) -> None:
    behind.put({f"many/{number:05}": b"" for number in range(1010)})
    faulty.inject(fault, part="continuation-token", times=1)
    assert len(await list_all(through, "many")) == 1010


@pytest.mark.parametrize(("fault", "error"), [("slow-down", ThrottledError), ("internal-error", UnavailableError)])
async def test_the_deadline_ends_it(faulty: FaultyS3, behind: Bucket, fault: Fault, error: type[Exception]) -> None:
    options = {**behind.options, "endpoint_url": faulty.endpoint, "deadline": "0.3"}
    async with open_under_store(behind.url, options) as ufs:
        faulty.inject(fault, method="HEAD", times=1000)
        with pytest.raises(error):
            await ufs.stat("file")


async def test_the_answer_is_believed_and_not_what_was_asked(
    through: UnderStore, faulty: FaultyS3, behind: Bucket
) -> None:
    behind.put({"file": b"content"})
    info = await through.stat("file")
    faulty.inject("other-etag", part="/file", times=1)
    with pytest.raises(ContentChangedError):
        await through.read_range(info, 0, 5)


async def test_a_cancelled_read_ends_at_once(through: UnderStore, faulty: FaultyS3, behind: Bucket) -> None:
    behind.put({"file": b"content"})
    info = await through.stat("file")
    faulty.inject("stall", part="/file", times=10)
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(through.read_range, info, 0, 3)
            await trio.to_thread.run_sync(faulty.wait_stalled)
            nursery.cancel_scope.cancel()


async def test_wrong_credentials_are_told_at_once(behind: Bucket) -> None:
    async with open_under_store(behind.url, {**behind.options, "secret": "wrong"}) as ufs:
        with pytest.raises(DeniedError, match="access denied") as caught:
            await ufs.stat("file")
        assert "wrong" not in str(caught.value)


async def test_a_missing_bucket_is_named(behind: Bucket) -> None:
    async with open_under_store("s3://no-such-bucket/x", behind.options) as ufs:
        with pytest.raises(NotFoundError, match="no-such-bucket"):
            await ufs.stat("")


async def test_nobody_listens(behind: Bucket) -> None:
    options = {**behind.options, "endpoint_url": "http://127.0.0.1:9", "deadline": "0.2"}
    async with open_under_store(behind.url, options) as ufs:
        with pytest.raises(UnavailableError):
            await ufs.stat("")


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
    ],
)
async def test_wrong_settings(url: str, options: dict[str, str], key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        async with open_under_store(url, options):
            pass
