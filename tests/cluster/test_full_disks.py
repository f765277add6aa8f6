"""A worker whose disk is full, and fails to say so before it is written to."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import trio

from cachefs.client import Client
from cachefs.model import MiB
from cachefs.testing.disks import small_disk, why_no_disks
from cachefs.testing.real_cluster import PAGE, promoted, read_all, real_cluster

CONTENTS = {f"{number}": random.Random(number).randbytes(16 * PAGE + number) for number in range(12)}
pytestmark = pytest.mark.skipif(bool(why_no_disks()), reason=str(why_no_disks()))


async def test_a_worker_whose_disk_is_full_reads_through_and_the_others_notice_nothing(tmp_path: Path) -> None:
    """Its tier was promised four times what the disk has, and somebody else takes that while it is written to."""
    (tmp_path / "data").mkdir()
    for name, content in CONTENTS.items():
        (tmp_path / "data" / name).write_bytes(content)
    with small_disk(tmp_path, 16 * MiB) as disk, trio.fail_after(300):
        async with real_cluster(
            tmp_path, (tmp_path / "data").as_uri(), workers=["b", "c"], ufs_options={"settle": "0"}
        ) as cluster:
            await cluster.start_worker("full", "--tier", f"ssd:{disk / 'tier'}:64M")
            # Not all of it has room from the start, however fast the worker is.
            (disk / "before").write_bytes(bytes(6 * MiB))
            async with cluster.client("full") as of_full, cluster.client("b") as of_b, cluster.client("c") as of_c:

                async def read(client: Client) -> None:
                    for name, content in CONTENTS.items():
                        assert await promoted(client, f"/{name}") == content

                async with trio.open_nursery() as nursery:
                    for client in (of_full, of_b, of_c):
                        nursery.start_soon(read, client)
                    while not list((disk / "tier").glob("[ps]*/*/*-0")):
                        await trio.sleep(0.001)
                    with pytest.raises(OSError, match="No space left"), (disk / "theirs").open("wb", 0) as file:
                        while True:
                            file.write(bytes(65536))
                await read(of_full)
                for name in ("b", "c"):
                    status = await cluster.status(name)
                    assert status.tiers[0].blocks == len(CONTENTS) and status.tiers[0].state == "healthy"
                status = await cluster.status("full")
                assert status.tiers[0].blocks < len(CONTENTS) and status.counters.not_admitted > 0
                assert status.counters.corrupt == 0
                fetched = [(await cluster.status(name)).counters.under_store_bytes for name in ("full", "b", "c")]
                # What the full one does not keep, it gets from the others.
                assert sum(fetched) <= 2 * sum(map(len, CONTENTS.values()))
                assert (await cluster.told(of_b, "full")).connected
                # With room again it keeps what it reads again.
                for name in ("before", "theirs"):
                    (disk / name).unlink()
                (tmp_path / "data/new").write_bytes(CONTENTS["0"])
                while not await of_full.promote((await of_full.metadata.resolve("/new")).ino):
                    await trio.sleep(0.1)
                assert await read_all(of_full, "/new") == CONTENTS["0"]
