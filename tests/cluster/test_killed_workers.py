"""Workers that are killed: while they fetch for others, serve, or seal. And who takes their names."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from cachefs.client import Client
from cachefs.model import CachefsError, MiB, UnderStoreError
from cachefs.testing.faulty_s3 import FaultyS3, running_faulty_s3
from cachefs.testing.fixtures import Bucket
from cachefs.testing.real_cluster import PAGE, kept_bytes, promoted, read_all, real_cluster
from cachefs.worker import WorkerConfig

LARGE = random.Random(1).randbytes(16 * PAGE)
AT_ONCE = {"settle": "0"}
"""The files were made just now; they are read at once."""


@contextmanager
def slow_store(bucket: Bucket) -> Iterator[tuple[FaultyS3, dict[str, str]]]:
    """A proxy in front of the bucket, and how to reach it."""
    with running_faulty_s3(bucket.server.endpoint) as faulty:
        yield faulty, replace(bucket.server, endpoint=faulty.endpoint).ufs_options


async def until_kept(client: Client, path: str, least: int) -> None:
    while await kept_bytes(client, path) < least:
        await trio.sleep(0.02)


async def test_killed_while_it_fetches_and_others_wait(tmp_path: Path, s3_bucket: Bucket) -> None:
    """It has passed on what it has got; the rest is fetched once, by one of those who waited."""
    s3_bucket.put({"large": LARGE})
    early = 5
    late = len(LARGE) // PAGE - early
    assert late + early <= WorkerConfig.demand_slots
    with slow_store(s3_bucket) as (faulty, options), trio.fail_after(90):
        # No request that stalls is made again.
        options |= {"read_timeout": "90", "deadline": "90"}
        async with (
            real_cluster(tmp_path, s3_bucket.url, workers=["a", "b", "c"], ufs_options=options) as cluster,
            cluster.client("a", patience_s=0) as of_a,
            cluster.client("b") as of_b,
            cluster.client("c") as of_c,
        ):
            waiting = [of_b, of_c]
            for client in (of_a, *waiting):
                await client.metadata.resolve("/large")
            faulty.inject("stall", part="/large", after=early, times=1000)
            got: list[bytes] = []

            async def read(client: Client) -> None:
                got.append(await promoted(client, "/large"))

            async def read_at_the_dead() -> None:
                with pytest.raises(CachefsError):
                    await promoted(of_a, "/large")

            async with trio.open_nursery() as nursery:
                nursery.start_soon(read_at_the_dead)
                await until_kept(of_a, "/large", early * PAGE)
                # All of them: what it asks for while it is being killed would be counted as somebody else's.
                await trio.to_thread.run_sync(faulty.wait_stalled, late, abandon_on_cancel=True)
                for client in waiting:
                    nursery.start_soon(read, client)
                for client in waiting:
                    await until_kept(client, "/large", early * PAGE)
                assert not got
                faulty.forget()
                before = faulty.asked_bytes
                await cluster.kill("a")
                faulty.release()
            assert got == [LARGE, LARGE]
            # Not a page twice: neither what had been passed on, nor by both of them.
            fetched = [(await cluster.status(name)).counters for name in ("b", "c")]
            assert sum(each.under_store_bytes for each in fetched) == late * PAGE
            assert faulty.asked_bytes - before == late * PAGE
            assert sum(each.peer_bytes for each in fetched) == len(LARGE) + early * PAGE


async def test_when_nobody_is_left_who_could_supply_it(tmp_path: Path, s3_bucket: Bucket) -> None:
    """The only worker that has it is dead, and the under-store fails: an error, soon. What is cached is still read, and
    everything again once the under-store answers.
    """
    contents = {"small": LARGE[:1000], "large": LARGE, "known": LARGE[::-1]}
    s3_bucket.put(contents)
    with slow_store(s3_bucket) as (faulty, options), trio.fail_after(90):
        options |= {"deadline": "2", "read_timeout": "1"}
        async with (
            real_cluster(tmp_path, s3_bucket.url, workers=["a", "b", "c"], ufs_options=options) as cluster,
            cluster.client("a") as of_a,
            cluster.client("b") as of_b,
            cluster.client("c") as of_c,
        ):
            for name in contents:
                assert await promoted(of_a, f"/{name}") == contents[name]
                for client in (of_b, of_c):
                    await client.metadata.resolve(f"/{name}")
            while await of_b.holders(await of_b.metadata.resolve("/known"), 0) != ["a"]:
                await trio.sleep(0.02)
            assert await promoted(of_b, "/known") == contents["known"]
            await cluster.kill("a")
            faulty.inject("internal-error", times=1_000_000)

            async def fails(client: Client, path: str) -> None:
                with pytest.raises(UnderStoreError), trio.fail_after(30):
                    await promoted(client, path)

            async with trio.open_nursery() as nursery:
                for client in (of_b, of_c):
                    for name in ("small", "large"):
                        nursery.start_soon(fails, client, f"/{name}")
            for client in (of_b, of_c):
                assert await promoted(client, "/known") == contents["known"]
            faulty.forget()
            for client in (of_b, of_c):
                for name, content in contents.items():
                    assert await promoted(client, f"/{name}") == content


async def test_killed_while_it_serves(tmp_path: Path) -> None:
    """Whoever reads from it in that moment gets the rest elsewhere."""
    content = random.Random(2).randbytes(48 * MiB)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/huge").write_bytes(content)
    url = (tmp_path / "data").as_uri()
    with trio.fail_after(90):
        async with (
            real_cluster(tmp_path, url, workers=["a", "b"], ufs_options=AT_ONCE) as cluster,
            cluster.client("a", patience_s=0) as of_a,
            cluster.client("b") as of_b,
        ):
            assert await promoted(of_a, "/huge") == content
            while (await of_b.holders(await of_b.metadata.resolve("/huge"), 0)) != ["a"]:
                await trio.sleep(0.02)
            got: list[bytes] = []

            async def read() -> None:
                got.append(await promoted(of_b, "/huge"))

            # It runs for moments, and is held still while we look: the rest must not arrive meanwhile.
            cluster.stop("a")
            async with trio.open_nursery() as nursery:
                nursery.start_soon(read)
                while await kept_bytes(of_b, "/huge") < 8 * PAGE:
                    cluster.go_on("a")
                    await trio.sleep(0.002)
                    cluster.stop("a")
                assert 0 < await kept_bytes(of_b, "/huge") < len(content) and not got
                await cluster.kill("a")
            assert got == [content]
            counters = (await cluster.status("b")).counters
            assert 0 < counters.peer_bytes < len(content)
            assert counters.under_store_bytes == len(content) - counters.peer_bytes
            assert counters.peer_failures > 0 and counters.corrupt == 0


async def test_killed_while_it_seals(tmp_path: Path) -> None:
    """Nothing half is ever served, by it or to others; started again under its name at once, it goes on."""
    contents = {f"{number:03}": random.Random(number).randbytes(20_000 + number) for number in range(300)}
    (tmp_path / "data").mkdir()
    for name, content in contents.items():
        (tmp_path / "data" / name).write_bytes(content)
    url = (tmp_path / "data").as_uri()
    with trio.fail_after(90):
        async with (
            real_cluster(tmp_path, url, workers=["a", "b"], ufs_options=AT_ONCE) as cluster,
            cluster.client("a") as of_a,
            cluster.client("b") as of_b,
        ):
            wrong: list[str] = []
            keys = {(await of_a.metadata.resolve(f"/{name}")).key.hex(): name for name in contents}

            async def read(client: Client, names: Iterator[str]) -> None:
                for name in names:
                    if await promoted(client, f"/{name}") != contents[name]:
                        wrong.append(name)

            async with trio.open_nursery() as nursery:
                # Each in an order of its own: they wait for each other's files.
                for client, order in ((of_a, sorted(contents)), (of_b, sorted(contents, reverse=True))):
                    names = iter(order)
                    for _ in range(4):
                        nursery.start_soon(read, client, names)
                while len(cluster.sealed("a")) < 30:
                    await trio.lowlevel.checkpoint()
                await cluster.kill("a")
                found = cluster.sealed("a")
                assert 30 <= len(found) < len(contents)
                for path in found:
                    assert path.read_bytes() == contents[keys[path.name.split("-")[0]]]
                    assert path.with_name(path.name + ".sums").exists()
                # Complete, and never renamed: as a crash of the machine may leave it. It is not what is served.
                key = next(key for key in keys if not (cluster.tier("a") / f"sealed/{key[:2]}/{key}-0").exists())
                unsealed = cluster.tier("a") / f"partial/{key[:2]}/{key}-0"
                unsealed.parent.mkdir(exist_ok=True)
                unsealed.write_bytes(bytes(len(contents[keys[key]])))
                await cluster.start_worker("a")
            assert not wrong
            for name, content in contents.items():
                assert await read_all(of_a, f"/{name}") == content
            assert (await cluster.status("a")).tiers[0].blocks == len(contents)
            for worker in ("a", "b"):
                assert (await cluster.status(worker)).counters.corrupt == 0


async def test_a_name_that_is_taken(tmp_path: Path) -> None:
    """The second of a name is refused, and the first notices nothing. The name of a dead one is free."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data/file").write_bytes(LARGE)
    url = (tmp_path / "data").as_uri()
    with trio.fail_after(90):
        async with (
            real_cluster(tmp_path, url, workers=["a"], ufs_options=AT_ONCE) as cluster,
            cluster.client("a") as client,
        ):
            before = await cluster.told(client, "a")
            other = ("--socket", tmp_path / "other.sock", "--tier", f"ssd:{tmp_path / 'other'}:16M")
            process = cluster.processes.pop("a")
            with pytest.raises(CachefsError) as raised:
                await cluster.start_worker("a", *other)
            cluster.processes["a"] = process
            expected = f"a name that no other worker has; the one at {before.address} is alive"
            assert f"--name: 'a' is not accepted; expected {expected}" in str(raised.value)
            after = await cluster.told(client, "a")
            assert (after.connected, after.address, after.epoch) == (True, before.address, before.epoch)
            assert await promoted(client, "/file") == LARGE
            assert not (tmp_path / "other.sock").exists()
            await cluster.kill("a")
            await cluster.start_worker("a")
            again = await cluster.told(client, "a")
            assert again.connected and again.epoch > before.epoch and again.address != before.address
            shutil.rmtree(tmp_path / "data")
            assert await read_all(client, "/file") == LARGE
