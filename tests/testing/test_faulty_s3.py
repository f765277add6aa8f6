"""The faulty proxy does what it is told."""

from __future__ import annotations

from dataclasses import replace

import botocore.exceptions
import pytest

from cachefs.testing.faulty_s3 import running_faulty_s3
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
