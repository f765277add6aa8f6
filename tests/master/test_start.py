"""A master that is started on a bad day of its under-store."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from cachefs.model import NotFoundError, UnavailableError
from cachefs.testing.cluster import running_cluster
from cachefs.testing.faulty_s3 import running_faulty_s3
from cachefs.testing.fixtures import Bucket


@pytest.mark.expect_warnings("the outage is told")
async def test_what_is_known_of_a_store_that_is_away_is_served(tmp_path: Path, s3_bucket: Bucket) -> None:
    content = b"content" * 1000
    s3_bucket.put({"dir/file": content})
    with trio.fail_after(60):
        with running_faulty_s3(s3_bucket.server.endpoint) as store:
            options = s3_bucket.options | {"endpoint_url": store.endpoint, "connect_timeout": "0.5", "deadline": "1"}
            async with (
                running_cluster(tmp_path, s3_bucket.url, ufs_options=options) as cluster,
                cluster.client() as client,
            ):
                attr = await client.metadata.resolve("/dir/file")
                assert await client.promote(attr.ino)
        async with running_cluster(tmp_path, s3_bucket.url, ufs_options=options) as cluster, cluster.client() as client:
            assert (await client.metadata.resolve("/dir/file")).ino == attr.ino
            assert b"".join([bytes(part) async for part in client.read_file("/dir/file", 100_000)]) == content
            with pytest.raises(UnavailableError):
                await client.metadata.resolve("/dir/another")


async def test_a_bucket_that_is_gone_is_told_even_if_it_is_known(tmp_path: Path, s3_bucket: Bucket) -> None:
    s3_bucket.client.create_bucket(Bucket="going")
    async with running_cluster(tmp_path, "s3://going", ufs_options=s3_bucket.options):
        pass
    s3_bucket.client.delete_bucket(Bucket="going")
    with pytest.raises(NotFoundError, match="going"):
        async with running_cluster(tmp_path, "s3://going", ufs_options=s3_bucket.options):
            pass


def made(directory: Path) -> Path:
    directory.mkdir()
    return directory


async def test_a_file_is_no_under_store(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    with pytest.raises(NotFoundError, match=r"cannot mount .*/file is a file; expected a directory"):
        async with running_cluster(tmp_path, (tmp_path / "file").as_uri()):
            pass


async def test_a_prefix_below_which_nothing_is_is_told_once(
    tmp_path: Path, s3_bucket: Bucket, caplog: pytest.LogCaptureFixture
) -> None:
    """It is no error: there may be something later."""
    s3_bucket.put({"train/file": b"content"})
    said = "nothing is there yet; is it the right URL?"
    with caplog.at_level("INFO"):
        url = f"{s3_bucket.url.rstrip('/')}/trian"
        async with (
            running_cluster(made(tmp_path / "a"), url, ufs_options=s3_bucket.options) as cluster,
            cluster.client() as client,
        ):
            await client.refresh("/")
            told = [each.getMessage() for each in caplog.records if said in each.getMessage()]
            assert [each.endswith("/trian") for each in told] == [True]
        caplog.clear()
        async with running_cluster(made(tmp_path / "b"), s3_bucket.url, ufs_options=s3_bucket.options):
            assert said not in caplog.text


async def test_a_store_that_was_never_mounted_must_answer(tmp_path: Path, s3_bucket: Bucket) -> None:
    with running_faulty_s3(s3_bucket.server.endpoint) as store:
        options = s3_bucket.options | {"endpoint_url": store.endpoint, "connect_timeout": "0.5", "deadline": "1"}
    with pytest.raises(UnavailableError, match="cannot mount"):
        async with running_cluster(tmp_path, s3_bucket.url, ufs_options=options):
            pass
