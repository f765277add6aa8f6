"""pytest fixtures: a real S3 server for the whole run, and a bucket of its own for each test.

Use them by `pytest_plugins = ["cachefs.testing.fixtures"]`.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from cachefs.testing.s3server import S3Server, running_s3_server

BUCKET = "cachefs-tests"
_numbers = itertools.count(1)


class Bucket:
    """A prefix of a bucket that no other test uses, seen from behind the back of cachefs."""

    def __init__(self, server: S3Server, name: str, prefix: str, client: Any) -> None:
        self.server = server
        self.client = client
        self.url = f"s3://{name}/{prefix}"
        self.options = server.ufs_options
        self.name = name
        self.prefix = prefix + "/"

    @property
    def environment(self) -> dict[str, str]:
        """Tells a cachefs process how to reach it."""
        return {"CACHEFS_UFS_OPTIONS": json.dumps(self.options)}

    def put(self, objects: Mapping[str, bytes]) -> None:
        self.server.put_objects(self.name, ((self.prefix + key, content) for key, content in objects.items()))

    def delete(self, *keys: str) -> None:
        for key in keys:
            self.client.delete_object(Bucket=self.name, Key=self.prefix + key)

    def contents(self) -> dict[str, str]:
        """Key -> etag of everything in it."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.name, Prefix=self.prefix)
        return {each["Key"]: each["ETag"] for page in pages for each in page.get("Contents", ())}


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    data_dir: Path = tmp_path_factory.mktemp("s3")
    with running_s3_server(data_dir) as server:
        client = server.client()
        # One for all: the server sets aside volumes for every bucket.
        client.create_bucket(Bucket=BUCKET)
        client.close()
        yield server


@pytest.fixture
def s3_bucket(s3_server: S3Server) -> Iterator[Bucket]:
    client = s3_server.client()
    yield Bucket(s3_server, BUCKET, f"test-{next(_numbers)}", client)
    client.close()
