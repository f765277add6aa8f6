"""The proxy that benchmarks count under-store bytes with."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import pytest

from cachefs.testing.counting_s3 import CountingS3, running_counting_s3
from cachefs.testing.fixtures import Bucket

SIZE = 700_001
CONTENT = bytes(range(256)) * (SIZE // 256) + bytes(SIZE % 256)


@pytest.fixture
def counting(s3_bucket: Bucket) -> Iterator[CountingS3]:
    with running_counting_s3(s3_bucket.server.endpoint) as proxy:
        yield proxy


@pytest.fixture
def client(s3_bucket: Bucket, counting: CountingS3) -> Iterator[Any]:
    client = replace(s3_bucket.server, endpoint=counting.endpoint).client()
    yield client
    client.close()


def test_bytes_of_objects_are_counted_exactly(s3_bucket: Bucket, counting: CountingS3, client: Any) -> None:
    s3_bucket.put({"whole": CONTENT, "with space": b"12345"})
    names = {"Bucket": s3_bucket.name}
    assert client.get_object(**names, Key=f"{s3_bucket.prefix}whole")["Body"].read() == CONTENT
    part = client.get_object(**names, Key=f"{s3_bucket.prefix}whole", Range="bytes=1000-300999")["Body"].read()
    assert part == CONTENT[1000:301_000]
    assert client.get_object(**names, Key=f"{s3_bucket.prefix}with space")["Body"].read() == b"12345"
    path = f"{s3_bucket.name}/{s3_bucket.prefix}"
    assert counting.bytes_by_object() == {f"{path}whole": SIZE + 300_000, f"{path}with space": 5}
    assert counting.object_bytes == SIZE + 300_005
    assert counting.object_reads == 3


def test_nothing_else_is_counted(s3_bucket: Bucket, counting: CountingS3, client: Any) -> None:
    name, key = s3_bucket.name, f"{s3_bucket.prefix}one"
    client.put_object(Bucket=name, Key=key, Body=CONTENT)
    assert client.head_object(Bucket=name, Key=key)["ContentLength"] == SIZE
    assert [each["Key"] for each in client.list_objects_v2(Bucket=name, Prefix=s3_bucket.prefix)["Contents"]] == [key]
    with pytest.raises(client.exceptions.NoSuchKey):
        client.get_object(Bucket=name, Key=f"{key}-missing")
    assert (counting.object_bytes, counting.object_reads) == (0, 0)


def test_of_an_answer_that_was_given_up_only_what_was_sent_counts(
    s3_bucket: Bucket, counting: CountingS3, client: Any
) -> None:
    content = bytes(64 << 20)
    s3_bucket.put({"large": content})
    url = client.generate_presigned_url(
        "get_object", Params={"Bucket": s3_bucket.name, "Key": f"{s3_bucket.prefix}large"}
    )
    parts = urlsplit(url)
    received = 0
    with socket.create_connection((parts.hostname, parts.port)) as sock:
        sock.sendall(f"GET {parts.path}?{parts.query} HTTP/1.1\r\nHost: {parts.netloc}\r\n\r\n".encode())
        while received < 100_000:
            received += len(sock.recv(10_000))
        assert counting.under_way == 1
    give_up = time.monotonic() + 60
    while counting.under_way and time.monotonic() < give_up:
        time.sleep(0.01)
    assert counting.under_way == 0
    assert 90_000 < counting.object_bytes < len(content)
