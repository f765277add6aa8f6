"""Two workers that reach their master and not each other."""

from __future__ import annotations

import os
import random
import socket
from pathlib import Path

import pytest
import trio

from cachefs.model import KiB
from cachefs.net import Role, Security, load_tokens, new_tokens
from cachefs.testing.networks import two_hosts, why_no_networks
from cachefs.testing.real_cluster import PAGE, promoted, real_cluster

CONTENTS = {
    "small": random.Random(1).randbytes(10_000),
    "large": random.Random(2).randbytes(40 * PAGE + 5),
    "other": random.Random(3).randbytes(20 * PAGE),
    "after": random.Random(4).randbytes(5 * PAGE),
}
AT_ONCE = {"settle": "0"}
"""The files were made just now; they are read at once."""


@pytest.mark.skipif(why_no_networks() is not None, reason=str(why_no_networks()))
async def test_readers_get_what_a_worker_has_that_cannot_be_reached(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name, content in CONTENTS.items():
        (tmp_path / "data" / name).write_bytes(content)
    tokens = tmp_path / "tokens"
    new_tokens(str(tokens), list(Role))
    with two_hosts() as hosts, trio.fail_after(120):
        async with real_cluster(
            tmp_path,
            (tmp_path / "data").as_uri(),
            ufs_options=AT_ONCE,
            listen="0.0.0.0",
            flags=("--tokens", tokens),
            security=Security(load_tokens(str(tokens))),
        ) as cluster:
            await cluster.start_worker("a", host=hosts.a)
            await cluster.start_worker("b", host=hosts.b)
            async with cluster.client("a") as of_a, cluster.client("b") as of_b:

                async def until_held(path: str, *holders: str) -> None:
                    attr = await of_a.metadata.resolve(path)
                    while await of_a.holders(attr, 0) != list(holders):
                        await trio.sleep(0.02)

                for path in ("/small", "/large"):
                    assert await promoted(of_a, path) == CONTENTS[path[1:]]
                    await until_held(path, "a")
                # As long as the cable is there, it is used.
                assert await promoted(of_b, "/small") == CONTENTS["small"]
                before = (await cluster.status("b")).counters
                assert (before.under_store_bytes, before.peer_bytes) == (0, len(CONTENTS["small"]))

                with hosts.cut():
                    got: dict[str, bytes] = {}

                    async def read(path: str) -> None:
                        # The same by both, of whom one is told to wait for the other.
                        async with trio.open_nursery() as both:
                            for name, client in (("a", of_a), ("b", of_b)):

                                async def one(name: str = name, client: object = client) -> None:
                                    got[name + path] = await promoted(client, path)  # type: ignore[arg-type]

                                both.start_soon(one)

                    with trio.fail_after(60):
                        async with trio.open_nursery() as nursery:
                            for path in ("/large", "/other"):
                                nursery.start_soon(read, path)
                    assert got == {name + path: CONTENTS[path[1:]] for name in "ab" for path in ("/large", "/other")}
                    for name in "ab":
                        # The master reaches both.
                        assert (await cluster.told(of_a, name)).connected
                    during = (await cluster.status("b")).counters
                    assert during.under_store_bytes >= len(CONTENTS["large"]) and during.peer_failures > 0
                    assert during.corrupt == 0

                # Whole again, they find each other by themselves.
                assert await promoted(of_a, "/after") == CONTENTS["after"]
                await until_held("/after", "a")
                number = 0
                while (await cluster.status("b")).counters.peer_bytes == during.peer_bytes:
                    number += 1
                    (tmp_path / "data" / f"again{number}").write_bytes(bytes([number]) * KiB)
                    for client in (of_a, of_b):
                        assert await promoted(client, f"/again{number}") == bytes([number]) * KiB
                    await trio.sleep(0.2)
                assert await promoted(of_b, "/after") == CONTENTS["after"]
    assert [link for link in socket.if_nameindex() if str(os.getpid()) in link[1]] == []
