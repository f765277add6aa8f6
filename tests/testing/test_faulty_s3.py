"""The faulty proxy does what it is told."""

from __future__ import annotations

import socket
import urllib.error
import urllib.request
from contextlib import ExitStack
from dataclasses import replace
from http.server import BaseHTTPRequestHandler

import botocore.exceptions
import pytest

from cachefs.testing.faulty_s3 import ProxyServer, running_faulty_s3
from cachefs.testing.fixtures import Bucket


def test_a_server_that_ignores_if_match(s3_bucket: Bucket) -> None:
    s3_bucket.put({"key": b"content"})
    with running_faulty_s3(s3_bucket.server.endpoint) as faulty:
        client = replace(s3_bucket.server, endpoint=faulty.endpoint).client()
        wanted = {"Bucket": s3_bucket.name, "Key": s3_bucket.prefix + "key", "IfMatch": '"other"', "Range": "bytes=1-2"}
        with pytest.raises(botocore.exceptions.ClientError, match="PreconditionFailed"):
            client.get_object(**wanted)
        faulty.ignores_if_match = (s3_bucket.server.key, s3_bucket.server.secret)
        assert client.get_object(**wanted)["Body"].read() == b"on"
        client.close()


def test_one_of_every_so_many_is_met(s3_bucket: Bucket) -> None:
    s3_bucket.put({"key": b"content"})
    with running_faulty_s3(s3_bucket.server.endpoint) as faulty:
        faulty.inject("too-many", part="/key", times=2, every=3)
        url = f"{faulty.endpoint}/{s3_bucket.name}/{s3_bucket.prefix}key"
        found = []
        for _ in range(6):
            with pytest.raises(urllib.error.HTTPError) as raised:
                urllib.request.urlopen(url, timeout=20)
            found.append(raised.value.code)
            raised.value.close()
        # 403: it is not signed.
        assert found == [429, 403, 403, 429, 403, 403]


def test_many_that_connect_at_once_do_not_wait_for_each_other() -> None:
    """Even while it accepts nothing: who finds no room in its queue comes back a second later."""
    with ProxyServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server, ExitStack() as stack:
        for _ in range(64):
            stack.enter_context(socket.create_connection(server.server_address[:2], timeout=0.9))
