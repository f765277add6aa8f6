"""Several workers over real sockets: each byte leaves the under-store once, and no reader goes without his bytes."""

from __future__ import annotations

import os
import random
import sqlite3
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from prometheus_client.parser import text_string_to_metric_families

from cachefs.client import Client
from cachefs.meta import MetaStore
from cachefs.model import Attr, CachefsError, ConfigError, MiB
from cachefs.net import Hello, open_peer
from cachefs.policy import Promote
from cachefs.store import TierConfig
from cachefs.testing.cluster import PAGE, TestCluster, running_cluster
from cachefs.wire import cluster as c

pytestmark = pytest.mark.anyio

AT_ONCE = {"settle": "0"}
SMALL = {f"small{number:02}": random.Random(number).randbytes(PAGE // 2 + number) for number in range(24)}
LARGE = {f"large{number}": random.Random(100 + number).randbytes(9 * PAGE + number) for number in range(4)}
FILES = SMALL | LARGE
TOTAL = sum(map(len, FILES.values()))


class Scene:
    """A cluster, and a client on each of its workers."""

    def __init__(self, cluster: TestCluster, data: Path) -> None:
        self.cluster = cluster
        self.data = data
        self.clients: dict[str, Client] = {}

    async def under_store_bytes(self) -> int:
        return sum([(await self.cluster.worker_status(name)).counters.under_store_bytes for name in self.clients])

    async def until_known(self, copies: int) -> None:
        """The master knows of so many copies of blocks, and the workers that are connected have heard of each other:
        one that came back just now is not asked by those who have not.
        """
        client = self.clients["worker"]
        with trio.fail_after(60):
            before = None
            while True:
                workers = (await client.master_status()).workers
                alive = [each.name for each in workers if each.connected]
                known = [self.shows(name, "cachefs_registered", "cachefs_peers_known") for name in alive]
                if sum(each.blocks for each in workers) == copies and all(
                    each == (1, len(alive) - 1) for each in known
                ):
                    epochs = [each.epoch for each in workers]
                    if epochs == before:
                        return
                    before = epochs
                    # None of them has lost its connection, and is about to notice.
                    await trio.testing.wait_all_tasks_blocked(0.05)
                await trio.sleep(0.02)

    def shows(self, name: str, *metrics: str) -> tuple[float, ...]:
        text = self.cluster.monitors[name].text().decode()
        values = {each.name: each.value for family in text_string_to_metric_families(text) for each in family.samples}
        return tuple(values[metric] for metric in metrics)


@asynccontextmanager
async def scene(
    tmp_path: Path, names: Iterable[str], capacity: int = 64 * MiB, files: dict[str, bytes] = FILES, **worker: object
) -> AsyncIterator[Scene]:
    data = tmp_path / "data"
    data.mkdir()
    for name, content in files.items():
        (data / name).write_bytes(content)
    worker = {"tiers": (TierConfig("ssd", str(tmp_path / "tier"), capacity),), "scrub_bytes_per_s": 0, **worker}
    async with (
        running_cluster(tmp_path, data.as_uri(), ufs_options=AT_ONCE, worker=worker) as cluster,
        AsyncExitStack() as stack,
    ):
        found = Scene(cluster, data)
        found.clients["worker"] = await stack.enter_async_context(cluster.client())
        for name in names:
            config = await cluster.add_worker(name)
            found.clients[name] = await stack.enter_async_context(cluster.client(worker_socket=config.socket))
        yield found


async def read(client: Client, attr: Attr) -> bytes:
    """As a mount reads: small ones whole, the others as they come."""
    if attr.size_bytes <= PAGE:
        await client.promote(attr.ino)
    reader = client.open_content(attr)
    try:
        return b"".join([bytes(await reader.read(at, 50_000)) for at in range(0, attr.size_bytes, 50_000)])
    finally:
        reader.close()


async def read_all(client: Client, files: dict[str, bytes], seed: int = 0) -> None:
    """Every byte, in an order of its own."""
    for name in random.Random(seed).sample(sorted(files), len(files)):
        assert await read(client, await client.metadata.resolve(f"/{name}")) == files[name], name


def damage(fd: int) -> None:
    """As its disk might."""
    with open(f"/proc/self/fd/{fd}", "r+b") as file:
        file.write(b"wrong")
    os.close(fd)


async def test_workers_that_start_cold_at_once_read_the_under_store_once(tmp_path: Path) -> None:
    async with scene(tmp_path, ["second", "third"]) as found:
        async with trio.open_nursery() as nursery:
            for seed, client in enumerate(found.clients.values()):
                nursery.start_soon(read_all, client, FILES, seed)
        assert await found.under_store_bytes() == TOTAL
        # Local-first: with room for it, each has all of it then, and reads it without anybody.
        await found.until_known(3 * len(FILES))
        for name in found.clients:
            status = await found.cluster.worker_status(name)
            assert status.counters.under_store_bytes + status.counters.peer_bytes == TOTAL
            assert status.tiers[0].blocks == len(FILES)


async def test_what_one_has_is_not_read_again_when_the_under_store_is_gone(tmp_path: Path) -> None:
    async with scene(tmp_path, ["second"]) as found:
        await read_all(found.clients["worker"], FILES)
        await found.until_known(len(FILES))
        attrs = {name: await found.clients["second"].metadata.resolve(f"/{name}") for name in FILES}
        for name in FILES:
            (found.data / name).unlink()
        for name, attr in attrs.items():
            assert await read(found.clients["second"], attr) == FILES[name]
        assert (await found.cluster.worker_status("second")).counters.under_store_bytes == 0


async def test_what_is_not_kept_is_read_from_who_has_it(tmp_path: Path) -> None:
    async with scene(tmp_path, ["second"]) as found:
        await read_all(found.clients["worker"], FILES)
        await found.until_known(len(FILES))
        async with found.cluster.client(
            worker_socket=found.cluster.workers["second"].socket, promote=Promote.NEVER
        ) as client:
            await read_all(client, FILES)
            # A few bytes somewhere, not the page they are in.
            before = (await found.cluster.worker_status()).counters.served_bytes
            reader = client.open_content(await client.metadata.resolve("/large0"))
            for at in (5 * PAGE + 7, 100, 8 * PAGE):
                assert bytes(await reader.read(at, 10)) == FILES["large0"][at : at + 10]
            reader.close()
        second = await found.cluster.worker_status("second")
        assert second.counters.under_store_bytes == 0 and second.tiers[0].blocks == 0
        assert (await found.cluster.worker_status()).counters.served_bytes - before <= 30


async def test_caches_that_together_are_large_enough_hold_all_of_it(tmp_path: Path) -> None:
    files = {f"f{number:03}": random.Random(number).randbytes(PAGE) for number in range(100)}
    held = 17 * 4096
    async with scene(tmp_path, ["b", "c", "d"], 30 * held + 8192, files) as found:
        fetched = []
        # What is shared is known a second or two later, in which on a fast machine an epoch or two are over.
        while len(fetched) < 2 or (fetched[-1] > 0.02 and len(fetched) < 8):
            before = await found.under_store_bytes()
            async with trio.open_nursery() as nursery:
                for number, client in enumerate(found.clients.values()):
                    nursery.start_soon(read_all, client, files, 10 * len(fetched) + number)
            fetched.append((await found.under_store_bytes() - before) / (len(files) * PAGE))
        # Without any sharing each would be read three times.
        assert fetched[0] <= 2.5 and fetched[-1] <= 0.02, fetched


async def test_a_worker_that_goes_away_costs_no_reader_his_bytes(tmp_path: Path) -> None:
    async with scene(tmp_path, ["second"]) as found:
        await read_all(found.clients["second"], FILES)
        await found.until_known(len(FILES))
        await found.cluster.stop("second")
        del found.clients["second"]
        await read_all(found.clients["worker"], FILES)
        assert await found.under_store_bytes() == TOTAL


@pytest.mark.expect_warnings("damaged bytes are worth one")
async def test_a_damaged_copy_is_dropped_where_it_is_and_read_elsewhere(tmp_path: Path) -> None:
    async with scene(tmp_path, ["second"]) as found:
        first, second = found.clients["worker"], found.clients["second"]
        await read_all(first, FILES)
        await found.until_known(len(FILES))
        for name in ("small00", "large0"):
            attr = await first.metadata.resolve(f"/{name}")
            fd = first.open_sealed(attr)
            assert fd is not None
            damage(fd)
        await read_all(second, FILES)
        with trio.fail_after(60):
            while (await found.cluster.worker_status()).tiers[0].blocks != len(FILES) - 2:
                await trio.sleep(0.02)


async def test_a_name_that_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cachefs.worker.master_link._NAME_TAKEN_S", 0.0)
    async with scene(tmp_path, []) as found:
        with pytest.raises(BaseExceptionGroup) as raised:
            await found.cluster.add_worker("worker", socket=str(tmp_path / "other"))
        leaf: BaseException = raised.value
        while isinstance(leaf, BaseExceptionGroup):
            leaf = leaf.exceptions[0]
        assert isinstance(leaf, ConfigError) and leaf.key == "--name"
        await read_all(found.clients["worker"], SMALL)


@pytest.mark.expect_warnings("a master that cannot write is worth some")
async def test_a_master_whose_disk_is_full_ends_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = True

    def report(*arguments: Any) -> Any:
        nonlocal refused
        if full:
            refused += 1
            raise sqlite3.OperationalError("database or disk is full")
        return written(*arguments)

    refused = 0
    written = MetaStore.report
    async with scene(tmp_path, ["second"]) as found:
        monkeypatch.setattr(MetaStore, "report", report)
        await read_all(found.clients["worker"], SMALL)
        # Reports are refused, and both go on.
        with trio.fail_after(60):
            while (await found.clients["worker"].master_status()).workers[1].epoch < 4:
                await trio.sleep(0.05)
        # Not faster and faster: three pauses of 0.4 s and more fit into this.
        before, began = refused, trio.current_time()
        await trio.sleep(1.5)
        assert refused - before <= 4 + 2 * (trio.current_time() - began) / 0.4
        full = False
        await found.until_known(len(SMALL))
        await read_all(found.clients["second"], SMALL)
        assert await found.under_store_bytes() == sum(map(len, SMALL.values()))


@pytest.mark.parametrize(
    "request_",
    [
        c.RegisterWorker("", "h:1", "", ""),
        c.RegisterWorker("two\nlines", "h:1", "", ""),
        c.RegisterWorker("w", "h:1", "", "", labels={"rack": "r" * 256}),
        c.RegisterWorker("w", "h:1", "", "", labels={str(number): "" for number in range(33)}),
    ],
    ids=["no name", "two lines", "a long label", "many labels"],
)
async def test_a_registration_that_would_harm_others_is_refused(tmp_path: Path, request_: c.RegisterWorker) -> None:
    async with (
        running_cluster(tmp_path, tmp_path.as_uri(), ufs_options=AT_ONCE) as cluster,
        open_peer(cluster.master_address, Hello("worker")) as peer,
    ):
        with pytest.raises(CachefsError, match="refused"):
            await peer.call(request_)
