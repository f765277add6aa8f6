"""A second S3 server, and less to do for every store that a test opens."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

import botocore.session
import pytest

from cachefs.testing.fixtures import BUCKET, Bucket
from cachefs.testing.moto_s3 import running_moto
from cachefs.testing.s3server import S3Server

_numbers = itertools.count(1)


@pytest.fixture(scope="session", autouse=True)
def models_are_read_once() -> Iterator[None]:
    """botocore reads them for every session again, which takes a third of a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(botocore.session, "create_loader", functools.cache(botocore.session.create_loader))
        yield


@pytest.fixture(scope="session")
def moto() -> Iterator[S3Server]:
    with running_moto() as server:
        client = server.client()
        client.create_bucket(Bucket=BUCKET)
        client.close()
        yield server


@pytest.fixture
def moto_bucket(moto: S3Server) -> Iterator[Bucket]:
    client = moto.client()
    yield Bucket(moto, BUCKET, f"test-{next(_numbers)}", client)
    client.close()
