"""A worker that hangs without being dead: the others go on, and it is one of them again when it does."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import trio

from cachefs.client import Client
from cachefs.testing.faulty_s3 import running_faulty_s3
from cachefs.testing.fixtures import Bucket
from cachefs.testing.real_cluster import PAGE, kept_bytes, promoted, real_cluster
from cachefs.worker import WorkerConfig

HELD = random.Random(1).randbytes(20 * PAGE)
FETCHED = random.Random(2).randbytes(16 * PAGE)
NEW = random.Random(3).randbytes(3 * PAGE)


async def test_stopped_while_it_holds_and_fetches_what_others_want(tmp_path: Path, s3_bucket: Bucket) -> None:
    s3_bucket.put({"held": HELD, "fetched": FETCHED, "new": NEW})
    early = 4
    late = len(FETCHED) // PAGE - early
    assert late + early <= WorkerConfig.demand_slots
    with running_faulty_s3(s3_bucket.server.endpoint) as faulty, trio.fail_after(300):
        options = replace(s3_bucket.server, endpoint=faulty.endpoint).ufs_options
        async with (
            real_cluster(tmp_path, s3_bucket.url, workers=["a", "b", "c"], ufs_options=options) as cluster,
            cluster.client("a") as of_a,
            cluster.client("b") as of_b,
            cluster.client("c") as of_c,
        ):
            for client in (of_a, of_b, of_c):
                await client.metadata.resolve("/fetched")
            assert await promoted(of_a, "/held") == HELD
            while await of_b.holders(await of_b.metadata.resolve("/held"), 0) != ["a"]:
                await trio.sleep(0.02)
            faulty.inject("stall", part="/fetched", after=early, times=1000)
            got: dict[str, bytes] = {}

            async def read(client: Client, who: str, path: str) -> None:
                got[who] = await promoted(client, path)

            async with trio.open_nursery() as of_the_stopped, trio.open_nursery() as nursery:
                of_the_stopped.start_soon(read, of_a, "a", "/fetched")
                while await kept_bytes(of_a, "/fetched") < early * PAGE:
                    await trio.sleep(0.02)
                # All of them: what it asks for later would be counted as somebody else's.
                await trio.to_thread.run_sync(faulty.wait_stalled, late, abandon_on_cancel=True)
                for client, name in ((of_b, "b"), (of_c, "c")):
                    nursery.start_soon(read, client, name, "/fetched")
                for client in (of_b, of_c):
                    while await kept_bytes(client, "/fetched") < early * PAGE:
                        await trio.sleep(0.02)
                faulty.forget()
                cluster.stop("a")
                faulty.release()
                for client, name in ((of_b, "b held"), (of_c, "c held")):
                    nursery.start_soon(read, client, name, "/held")
                while len(got) < 4:
                    await trio.sleep(0.02)
                assert got == {"b": FETCHED, "c": FETCHED, "b held": HELD, "c held": HELD}
                # Neither of the two went to the under-store for what the other fetched. By what they say: requests of
                # the stopped one may come to the store at any time.
                fetched_by = [(await cluster.status(name)).counters.under_store_bytes for name in ("b", "c")]
                assert sum(fetched_by) == late * PAGE + len(HELD)
                for name in ("b", "c"):
                    # As many pages as are asked for at once; those that waited for their turn did not try it again.
                    assert (await cluster.status(name)).counters.peer_failures <= 16
                await cluster.until_alive(of_b, "a", alive=False)
                while "worker is away name=a silent=True" not in cluster.log("master"):
                    await trio.sleep(0.05)
                cluster.go_on("a")
            assert got["a"] == FETCHED
            await cluster.until_alive(of_b, "a")
            assert "worker is back name=a" in cluster.log("master")
            # Of use again, for others too, with what it had and with what it fetches now.
            assert await promoted(of_a, "/new") == NEW
            attr = await of_b.metadata.resolve("/new")
            while await of_b.holders(attr, 0) != ["a"]:
                await trio.sleep(0.02)
            served = (await cluster.status("a")).counters.served_bytes
            fetched = (await cluster.status("b")).counters.under_store_bytes
            assert await promoted(of_b, "/new") == NEW
            while (await cluster.status("a")).counters.served_bytes < served + len(NEW):
                await trio.sleep(0.02)
            assert (await cluster.status("b")).counters.under_store_bytes == fetched
