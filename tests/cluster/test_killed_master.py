"""A master that is killed and started again, while its workers fetch, and while readers read."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from cachefs.client import Client
from cachefs.model import Attr
from cachefs.testing.real_cluster import PAGE, promoted, read_all, real_cluster

CONTENTS = {f"{number:03}": random.Random(number).randbytes(30_000 + number) for number in range(200)}
CONTENTS |= {f"large{number}": random.Random(number).randbytes(40 * PAGE + number) for number in range(3)}
AT_ONCE = {"settle": "0"}
"""The files were made just now; they are read at once."""


def sealed_bytes(client: Client, attr: Attr) -> bytes | None:
    fd = client.open_sealed(attr)
    if fd is None:
        return None
    try:
        return os.pread(fd, attr.size_bytes + 1, 0)
    finally:
        os.close(fd)


@pytest.mark.expect_warnings("a restart of the master may take longer than is told")
async def test_killed_during_a_load_and_during_an_epoch(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name, content in CONTENTS.items():
        (tmp_path / "data" / name).write_bytes(content)
    only_a = "large0"
    with trio.fail_after(300):
        async with (
            real_cluster(tmp_path, (tmp_path / "data").as_uri(), workers=["a", "b"], ufs_options=AT_ONCE) as cluster,
            cluster.client("a") as of_a,
            cluster.client("b") as of_b,
        ):
            wrong: list[str] = []

            async def load(client: Client, names: Iterator[str]) -> None:
                for name in names:
                    if await promoted(client, f"/{name}") != CONTENTS[name]:
                        wrong.append(name)

            # Killed during a load, and started again while it goes on as far as it gets.
            async with trio.open_nursery() as nursery:
                for client, order in ((of_a, sorted(CONTENTS)), (of_b, sorted(CONTENTS, reverse=True))):
                    names = iter([name for name in order if name != only_a])
                    for _ in range(4):
                        nursery.start_soon(load, client, names)
                while max(len(cluster.sealed("a")), len(cluster.sealed("b"))) < 40:
                    await trio.sleep(0.005)
                await cluster.kill("master")
                assert max(len(cluster.sealed("a")), len(cluster.sealed("b"))) < len(CONTENTS) - 1
                await cluster.start_master()
            assert not wrong
            loaded = {name: (await cluster.status(name)).counters for name in ("a", "b")}
            sizes = sum(map(len, CONTENTS.values())) - len(CONTENTS[only_a])
            for each in loaded.values():
                assert each.under_store_bytes + each.peer_bytes >= sizes and each.corrupt == 0

            # Killed during an epoch: what is known and cached is read without it, and more than that.
            assert await promoted(of_a, f"/{only_a}") == CONTENTS[only_a]
            attrs = {name: await of_b.metadata.resolve(f"/{name}") for name in CONTENTS}
            readers_of = {name: of_b.open_content(attr) for name, attr in attrs.items() if name.startswith("large")}
            assert bytes(await readers_of[only_a].read(0, 10)) == CONTENTS[only_a][:10]
            await cluster.kill("master")
            for name in random.Random(5).sample(sorted(CONTENTS), len(CONTENTS)):
                if name != only_a:
                    assert sealed_bytes(of_b, attrs[name]) == CONTENTS[name]
            for name, reader in readers_of.items():
                with trio.fail_after(60):
                    assert bytes(await reader.read(0, attrs[name].size_bytes)) == CONTENTS[name]
                reader.close()

            # Started again, it learns from its workers what they hold, and finds one for the other.
            await cluster.start_master()
            await cluster.until_alive(of_a, "a", "b")
            await cluster.start_worker("c")
            async with cluster.client("c") as of_c:
                while await of_c.holders(attrs["000"], 0) != ["a", "b"]:
                    await trio.sleep(0.02)
                for attr in attrs.values():
                    # They are told in parts.
                    while not await of_c.holders(attr, 0):
                        await trio.sleep(0.02)
                for name, content in CONTENTS.items():
                    assert await promoted(of_c, f"/{name}") == content
                counters = (await cluster.status("c")).counters
                assert counters.under_store_bytes == 0
                assert counters.peer_bytes == sum(map(len, CONTENTS.values()))
            for name, content in CONTENTS.items():
                assert await read_all(of_a, f"/{name}") == content
