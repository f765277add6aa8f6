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
            options = s3_bucket.options | {"endpoint_url": store.endpoint}
            async with (
                running_cluster(tmp_path, s3_bucket.url, ufs_options=options) as cluster,
                cluster.client() as client,
            ):
                attr = await client.metadata.resolve("/dir/file")
                assert await client.promote(attr.ino)
        options |= {"connect_timeout": "0.5", "deadline": "1"}
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


async def test_a_store_that_was_never_mounted_must_answer(tmp_path: Path, s3_bucket: Bucket) -> None:
    with running_faulty_s3(s3_bucket.server.endpoint) as store:
        options = s3_bucket.options | {"endpoint_url": store.endpoint, "connect_timeout": "0.5", "deadline": "1"}
    with pytest.raises(UnavailableError, match="cannot mount"):
        async with running_cluster(tmp_path, s3_bucket.url, ufs_options=options):
            pass
