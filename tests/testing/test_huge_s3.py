"""The S3 server of a huge directory, asked by a plain S3 client."""

from __future__ import annotations

import botocore.session
import pytest
from botocore import UNSIGNED
from botocore.config import Config

from cachefs.testing.huge_s3 import BUCKET, content_of, name_of, running_huge_s3


def test_it_lists_and_serves_what_it_was_told() -> None:
    with running_huge_s3(2500) as server:
        config = Config(signature_version=UNSIGNED, s3={"addressing_style": "path"}, retries={"total_max_attempts": 1})
        client = botocore.session.Session().create_client(
            "s3", region_name="us-east-1", endpoint_url=server.options["endpoint_url"], config=config
        )
        pages = client.get_paginator("list_objects_v2")

        def listed(prefix: str = "dir/", after: str = "") -> list[str]:
            found = pages.paginate(Bucket=BUCKET, Prefix=prefix, Delimiter="/", StartAfter=after)
            return [each["Key"] for page in found for each in page.get("Contents", ())]

        assert listed() == [f"dir/{name_of(number)}" for number in range(2500)]
        assert server.pages() == 3
        assert listed(after=f"dir/{name_of(2400)}") == [f"dir/{name_of(number)}" for number in range(2401, 2500)]
        assert listed(prefix=f"dir/{name_of(7)}/") == []
        (top,) = client.list_objects_v2(Bucket=BUCKET, Delimiter="/")["CommonPrefixes"]
        assert top == {"Prefix": "dir/"}
        server.change(removed=(10, 1990), changed=(2000, 2002), added=5)
        kept = [*range(10), *range(1990, 2505)]
        assert listed() == [f"dir/{name_of(number)}" for number in kept]
        for number in (0, 2000, 2504):
            key = f"dir/{name_of(number)}"
            head = client.head_object(Bucket=BUCKET, Key=key)
            content = content_of(number, changed=number == 2000)
            assert head["ContentLength"] == len(content)
            part = client.get_object(Bucket=BUCKET, Key=key, Range="bytes=2-4", IfMatch=head["ETag"])
            assert part["Body"].read() == content[2:5]
        for number in (10, 2505):
            with pytest.raises(client.exceptions.ClientError, match="404"):
                client.head_object(Bucket=BUCKET, Key=f"dir/{name_of(number)}")
        client.close()
