"""Keys that are odd, on a server that takes them all: every one that can be a file name reads the right bytes, and
the others are hidden and counted."""

from __future__ import annotations

import unicodedata
from collections.abc import AsyncIterator

import pytest

from cachefs.model import Kind
from cachefs.testing.fixtures import Bucket
from cachefs.testing.understore_contract import list_all, names
from cachefs.ufs import UnderStore, open_under_store, s3

pytestmark = pytest.mark.anyio

READABLE = [
    "plain",
    "with space",
    " leading and trailing ",
    "plus+plus",
    "percent%20%",
    "%2e%2e",
    "question?mark=1&x",
    "hash#hash",
    "semi;colon:comma,'\"<>|*\\",
    "tab\tand return\r",
    "control\x01\x1f\x7f",
    "~tilde!()",
    "...",
    ".hidden",
    "a.",
    unicodedata.normalize("NFC", "Ångström-é"),
    unicodedata.normalize("NFD", "Ångström-é"),
    "漢字🙂",
    "x" * 255,
    "é" * 127 + "x",
]
HIDDEN = ["x" * 256, "é" * 128, ".", "..", "nul\0"]


@pytest.fixture(params=["obstore", "s3fs"])
async def ufs(moto_bucket: Bucket, request: pytest.FixtureRequest) -> AsyncIterator[UnderStore]:
    async with open_under_store(
        moto_bucket.url, {**moto_bucket.options, "reader": request.param, "deadline": "5"}
    ) as ufs:
        yield ufs


async def test_every_name_that_can_be_one_reads_its_bytes(ufs: UnderStore, moto_bucket: Bucket) -> None:
    contents = {f"dir/{name}": f"content of {number}".encode() for number, name in enumerate(READABLE)}
    moto_bucket.put({**contents, "dir/empty": b""})
    listed = {each.path: each for each in await list_all(ufs, "dir")}
    assert set(listed) == {*contents, "dir/empty"}
    for path, content in contents.items():
        info = await ufs.stat(path)
        assert info == listed[path]
        assert bytes(await ufs.read_range(info, 3, len(content) - 3)) == content[3:], path
    assert bytes(await ufs.read_range(listed["dir/empty"], 0, 0)) == b""
    assert ufs.hidden_keys == 0
    # The two forms of one letter are two names.
    assert len({unicodedata.normalize("NFC", path) for path in listed}) == len(listed) - 1


async def test_odd_names_of_directories(ufs: UnderStore, moto_bucket: Bucket) -> None:
    directories = [name for name in READABLE if len(name) < 100]
    moto_bucket.put({f"{name}/file": name.encode() for name in directories})
    assert names(await list_all(ufs, "")) == sorted(f"{name}/" for name in directories)
    for name in directories:
        assert (await ufs.stat(name)).kind is Kind.DIRECTORY
        (file,) = await list_all(ufs, name)
        assert bytes(await ufs.read_range(file, 0, file.size_bytes)) == name.encode(), name


@pytest.mark.parametrize("name", HIDDEN)
async def test_other_names_are_hidden_and_counted(ufs: UnderStore, moto_bucket: Bucket, name: str) -> None:
    """As names of files and of directories."""
    put = moto_bucket.client.put_object
    for key in (f"file/{name}", f"dir/{name}/below"):
        put(Bucket=moto_bucket.name, Key=moto_bucket.prefix + key, Body=b"x")
    moto_bucket.put({"file/good": b"1", "dir/good": b"2"})
    assert names(await list_all(ufs, "file")) == ["file/good"]
    assert names(await list_all(ufs, "dir")) == ["dir/good"]
    assert ufs.hidden_keys == 2


async def test_slashes_where_none_should_be(ufs: UnderStore, moto_bucket: Bucket) -> None:
    moto_bucket.put(
        {
            "dir/": b"",  # the marker of a directory
            "dir/file": b"1",
            "dir//double": b"2",
            "/leading": b"3",
            "only/": b"",
            "both": b"an object with a directory of its name",
            "both/below": b"4",
        }
    )
    assert names(await list_all(ufs, "")) == ["both/", "dir/", "only/"]
    assert ufs.hidden_keys == 1  # the directory without a name
    assert names(await list_all(ufs, "dir")) == ["dir/file"]
    assert ufs.hidden_keys == 2
    assert await list_all(ufs, "only") == []
    for path in ("both", "only", "dir"):
        assert (await ufs.stat(path)).kind is Kind.DIRECTORY


async def test_the_object_beside_a_marker(ufs: UnderStore, moto_bucket: Bucket) -> None:
    """`a` and `a/`: the directory wins, and is empty."""
    moto_bucket.put({"a": b"object", "a/": b"", "b": b"x"})
    assert names(await list_all(ufs, "")) in (["a/", "b"], ["a", "a/", "b"])
    assert (await ufs.stat("a")).kind is Kind.DIRECTORY


async def test_a_prefix_with_odd_characters(moto_bucket: Bucket) -> None:
    moto_bucket.put({"sp ace/ü+%/file": b"content"})
    async with open_under_store(f"{moto_bucket.url}/sp ace/ü+%", moto_bucket.options) as ufs:
        (file,) = await list_all(ufs, "")
        assert bytes(await ufs.read_range(file, 0, 7)) == b"content"


@pytest.mark.parametrize("count", [4, 5, 6, 10])
async def test_keys_that_end_where_a_page_does(
    ufs: UnderStore, moto_bucket: Bucket, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In pages of five, files and directories mixed."""
    monkeypatch.setattr(s3, "_PAGE", 5)
    moto_bucket.put({f"many/{number:02}" + "/below" * (number % 2): b"" for number in range(count)})
    assert len(await list_all(ufs, "many")) == count


@pytest.mark.parametrize("reader", ["obstore", "s3fs"])
async def test_a_newline_in_a_name(s3_bucket: Bucket, reader: str) -> None:
    """By the other server: this one has no route for it."""
    s3_bucket.put({"new\nline": b"content", "dir\n/x": b"below"})
    async with open_under_store(s3_bucket.url, {**s3_bucket.options, "reader": reader, "deadline": "5"}) as ufs:
        assert names(await list_all(ufs, "")) == ["dir\n/", "new\nline"]
        for path, content in (("new\nline", b"content"), ("dir\n/x", b"below")):
            assert bytes(await ufs.read_range(await ufs.stat(path), 0, len(content))) == content
