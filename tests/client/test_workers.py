"""Clients without a worker of their own: they read through the nearest one, and through another when it is lost."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

import pytest
import trio

from cachefs.client import Client, ranked
from cachefs.meta import MetaStore
from cachefs.model import BlockId, CapacityError, TransportError
from cachefs.net import Role, Security, Session, TcpAddress, UnixAddress, open_peer
from cachefs.testing.cluster import PAGE, TestCluster, running_cluster
from cachefs.testing.processes import running
from cachefs.wire import Hello, Tokens
from cachefs.wire.messages import Fetch, ListWorkers, OpenCounts, Opened, OpenedReply, Promote, WorkerInfo
from cachefs.worker.worker import Worker

LIMIT_S = 60.0
LARGE = random.Random(1).randbytes(5 * PAGE + 123)
SMALL = random.Random(2).randbytes(1000)
BOOT = "boot-id-of-this-host"


def info(name: str, **changes: object) -> WorkerInfo:
    known = WorkerInfo(name, f"{name}:7001", f"/run/{name}.sock", "another", True, 0, 0)
    return WorkerInfo(**{field: changes.get(field, getattr(known, field)) for field in known.__struct_fields__})


# ---- the order -----------------------------------------------------------------------------------------------------


def test_that_of_the_host_comes_first_then_the_nearest_by_labels() -> None:
    workers = [
        info("zone", labels={"rack": "2", "zone": "a"}),
        info("far", labels={"rack": "1", "zone": "b"}),
        info("dead", connected=False, labels={"rack": "1", "zone": "a"}, host_boot_id=BOOT),
        info("rack", labels={"rack": "1", "zone": "a"}),
        info("mine", host_boot_id=BOOT),
    ]
    found = ranked(workers, {"rack": "1", "zone": "a"}, BOOT, anywhere=True)
    assert found[0].address == UnixAddress("/run/mine.sock")
    assert [each.name for each in found[1:4]] == ["rack", "zone", "far"] or found[3].name == "mine"
    assert [each.distance for each in found[1:3]] == [1, 2]
    # By TCP as well: its socket may be out of reach, in a container.
    assert {each.name for each in found[3:]} == {"far", "mine"}
    assert ranked(workers, {}, BOOT, anywhere=False) == found[:1]


def test_a_drained_one_comes_last_and_one_without_a_port_not_at_all() -> None:
    near = {"rack": "1"}
    workers = [info("drained", state="drained", labels=near), info("far"), info("nowhere", address="nowhere:0")]
    assert [each.name for each in ranked(workers, near, BOOT, anywhere=True)] == ["far", "drained"]


def test_mounts_of_several_hosts_spread_over_equally_near_workers() -> None:
    workers = [info(name) for name in "abcd"]
    firsts = {ranked(workers, {"host": f"n{number}"}, BOOT, anywhere=True)[0].name for number in range(40)}
    assert firsts == set("abcd")


# ---- at work -------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def cluster_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **changes: object) -> AsyncIterator[TestCluster]:
    """Its worker is on another host than the clients, as they see it, and so are those that are added."""
    root = tmp_path / "data"
    root.mkdir()
    (root / "large").write_bytes(LARGE)
    (root / "small").write_bytes(SMALL)
    monkeypatch.setattr("cachefs.worker.worker.running_boot_id", lambda: "boot-id-of-another-host")
    async with running_cluster(
        tmp_path,
        root.as_uri(),
        ufs_options={"settle": "0"},
        **changes,  # type: ignore[arg-type]
    ) as cluster:
        yield cluster


def away(cluster: TestCluster, **changes: object) -> dict[str, object]:
    """Of a client without a worker on its host."""
    return {"worker_socket": None, "anywhere": True, "look_again_s": 0.05, **changes}


async def contents(client: Client, path: str, size: int) -> bytes:
    reader = client.open_content(await client.metadata.resolve(path))
    try:
        with trio.fail_after(LIMIT_S):
            return bytes(await reader.read(0, size))
    finally:
        reader.close()


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(LIMIT_S):
        while not condition():
            await trio.sleep(0.01)


def worker_of(client: Client) -> str:
    assert client.workers.chosen is not None
    return client.workers.chosen.candidate.name


async def test_over_tcp_come_the_right_bytes_of_what_is_kept_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cluster_of(tmp_path, monkeypatch) as cluster, cluster.client(**away(cluster)) as client:
        assert (client.tiers, client.workers.why_no_tiers()) == ((), "the worker is on another host")
        for _ in range(2):
            assert await contents(client, "/large", len(LARGE)) == LARGE
            assert await contents(client, "/small", len(SMALL)) == SMALL
        attr = await client.metadata.resolve("/large")
        assert client.open_sealed(attr) is None
        reader = client.open_content(attr)
        with pytest.raises(trio.WouldBlock):
            reader.read_nowait(0, 100)
        assert bytes(await reader.read(3 * PAGE - 10, PAGE)) == LARGE[3 * PAGE - 10 : 4 * PAGE - 10]
        reader.close()
        counters = (await cluster.worker_status()).counters
        assert counters.served_reads == 5
        # It was read from the under-store once, and kept.
        assert counters.under_store_bytes == len(LARGE) + len(SMALL)


async def test_what_is_not_kept_there_is_read_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with (
        cluster_of(tmp_path, monkeypatch) as cluster,
        cluster.client(**away(cluster, promote="never")) as client,
    ):
        assert await contents(client, "/large", len(LARGE)) == LARGE
        assert (await cluster.worker_status()).tiers[0].blocks == 0


async def test_promoted_it_is_kept_there_and_nothing_can_be_opened_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cluster_of(tmp_path, monkeypatch) as cluster, cluster.client(**away(cluster)) as client:
        large, small = [await client.metadata.resolve(path) for path in ("/large", "/small")]
        assert not await client.promote(large.ino)
        # Who only wants it kept is told when it is.
        assert await client.view.promote(small.ino, background=True)
        with trio.fail_after(LIMIT_S):
            while (await cluster.worker_status()).tiers[0].blocks < 2:
                await trio.sleep(0.01)
        assert client.open_sealed(large) is None


async def test_opens_are_counted_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with cluster_of(tmp_path, monkeypatch) as cluster, cluster.client(**away(cluster)) as client:
        client.count_open(await client.metadata.resolve("/large"), passthrough=False)
        with trio.fail_after(LIMIT_S):
            while not (await cluster.worker_status()).opens.cached:
                await trio.sleep(0.01)


async def test_a_worker_that_refuses_to_hear_of_opens_harms_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = trio.Event()
    hear = Worker.opened

    def refuse(self: Worker, request: Opened, session: Session) -> OpenedReply:
        if not refused.is_set():
            refused.set()
            raise CapacityError("it has no memory for that")
        return hear(self, request, session)

    monkeypatch.setattr(Worker, "opened", refuse)
    monkeypatch.setattr("cachefs.client.client._OPENED_EVERY_S", 0.01)
    async with cluster_of(tmp_path, monkeypatch) as cluster, cluster.client() as client:
        attr = await client.metadata.resolve("/small")
        client.count_open(attr, passthrough=False)
        with trio.fail_after(LIMIT_S):
            await refused.wait()
        assert await contents(client, "/small", len(SMALL)) == SMALL
        # The next ones are told all the same.
        client.count_open(attr, passthrough=False)
        with trio.fail_after(LIMIT_S):
            while (await cluster.worker_status()).opens.cached != 1:
                await trio.sleep(0.01)


async def test_looking_for_workers_counts_nothing_in_the_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The master itself counts once for its monitoring, when it starts, and not again.
    monkeypatch.setattr("cachefs.master.metrics.COUNTED_EVERY_S", 3600.0)
    count, counted = MetaStore.replica_totals, 0

    def counting(self: MetaStore) -> dict[str, tuple[int, int]]:
        nonlocal counted
        counted += 1
        return count(self)

    async with cluster_of(tmp_path, monkeypatch) as cluster, cluster.client(**away(cluster)) as client:
        await client.master_status()
        monkeypatch.setattr(MetaStore, "replica_totals", counting)
        async with cluster.client(**away(cluster)) as other:
            assert worker_of(other) == "worker"
            assert other.workers.chosen is not None and await other.workers._is_alive(other.workers.chosen)
        (told,) = (await client.ask(ListWorkers())).workers
        assert counted == 0
        (known,) = (await client.master_status()).workers
        assert counted == 1
        assert (told.name, told.address, told.connected) == (known.name, known.address, True)
        assert (told.socket, told.host_boot_id) == (known.socket, known.host_boot_id)


async def test_a_client_may_ask_over_tcp_with_its_token_and_cannot_read_as_a_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    security = Security(Tokens({role: f"{role}-".ljust(40, "x") for role in Role}))
    async with cluster_of(tmp_path, monkeypatch, security=security) as cluster:
        async with cluster.client(**away(cluster)) as client:
            assert await contents(client, "/large", len(LARGE)) == LARGE
            attr = await client.metadata.resolve("/small")
            hello = Hello("client", namespace_id=client.cluster.namespace_id)
        presenting = security.presenting(Role.CLIENT)
        async with open_peer(cluster.worker_address, hello, security=presenting) as peer:
            assert not (await peer.call(Promote(attr.ino))).message.sealed
            answer = await peer.call(Fetch(attr.ino, 0, 0, len(SMALL), held=0))
            assert (answer.message.serial, answer.fds, bytes(answer.payload)) == (0, (), SMALL)  # type: ignore[arg-type]
            assert (await peer.call(Opened([], OpenCounts(0, 0)))).message.down == []


# ---- one is lost ---------------------------------------------------------------------------------------------------


@pytest.mark.expect_warnings("a worker is lost")
async def test_when_it_stops_the_next_nearest_goes_on_in_the_same_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cluster_of(tmp_path, monkeypatch) as cluster:
        await cluster.add_worker("near", labels={"rack": "1", "zone": "a"})
        await cluster.add_worker("zone", labels={"rack": "2", "zone": "a"})
        async with cluster.client(**away(cluster, labels={"rack": "1", "zone": "a"})) as client:
            assert worker_of(client) == "near"
            reader = client.open_content(await client.metadata.resolve("/large"))
            assert bytes(await reader.read(0, PAGE)) == LARGE[:PAGE]
            await cluster.stop("near")
            with trio.fail_after(LIMIT_S):
                assert bytes(await reader.read(0, len(LARGE))) == LARGE
            reader.close()
            assert worker_of(client) == "zone"
            assert (await cluster.worker_status("zone")).counters.served_reads >= 1
            # It is preferred again once it is back.
            monkeypatch.setattr("cachefs.client.workers._AVOIDED_S", 0.0)
            client.workers._avoided_until.clear()
            await cluster.start_again("near")
            await until(lambda: worker_of(client) == "near")
            assert await contents(client, "/large", len(LARGE)) == LARGE


@pytest.mark.expect_warnings("a worker is lost")
async def test_one_that_hangs_without_dying_is_left_when_the_master_misses_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cachefs.client.workers.running_boot_id", lambda: "boot-id-of-a-third-host")
    monkeypatch.setattr("cachefs.client.workers._SLOW_S", 3600.0)  # not asked itself
    monkeypatch.setattr("cachefs.client.workers._STUCK_S", 0.2)
    with ExitStack() as processes:
        async with cluster_of(tmp_path, monkeypatch) as cluster:
            arguments = (
                *("worker", "--name", "near", "--master", str(cluster.master_address), "--listen", "127.0.0.1:0"),
                *("--socket", tmp_path / "near.sock", "--tier", f"ssd:{tmp_path}/near.tier:100M"),
                *("--label", "rack=1", "--insecure"),
            )
            near = await trio.to_thread.run_sync(processes.enter_context, running(*arguments))
            async with cluster.client(**away(cluster, labels={"rack": "1"}, look_again_s=3600.0)) as client:
                assert worker_of(client) == "near"
                reader = client.open_content(await client.metadata.resolve("/large"))
                assert bytes(await reader.read(0, PAGE)) == LARGE[:PAGE]
                near.process.send_signal(signal.SIGSTOP)
                monkeypatch.setattr("cachefs.master.workers.DEAD_AFTER_S", 3.0)
                try:
                    with trio.fail_after(LIMIT_S):
                        assert bytes(await reader.read(0, len(LARGE))) == LARGE
                    assert worker_of(client) == "worker"
                finally:
                    near.process.send_signal(signal.SIGCONT)
                reader.close()
            await trio.to_thread.run_sync(near.end)


@pytest.mark.expect_warnings("a worker is lost")
async def test_the_only_one_hangs_and_it_is_an_error_after_patience_whoever_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cachefs.client.workers._STUCK_S", 0.2)
    with ExitStack() as processes:
        async with cluster_of(tmp_path, monkeypatch) as cluster:
            await cluster.stop("worker")
            arguments = (
                *("worker", "--name", "only", "--master", str(cluster.master_address), "--listen", "127.0.0.1:0"),
                *("--socket", tmp_path / "only.sock", "--tier", f"ssd:{tmp_path}/only.tier:100M", "--insecure"),
            )
            only = await trio.to_thread.run_sync(processes.enter_context, running(*arguments))
            async with (
                cluster.client(**away(cluster, patience_s=0.3)) as anywhere,
                cluster.client(worker_socket=str(tmp_path / "only.sock"), patience_s=0.3) as here,
            ):
                for client in (anywhere, here):
                    assert worker_of(client) == "only"
                    assert await contents(client, "/small", len(SMALL)) == SMALL
                only.process.send_signal(signal.SIGSTOP)
                monkeypatch.setattr("cachefs.master.workers.DEAD_AFTER_S", 0.5)
                try:
                    for client in (anywhere, here):
                        with pytest.raises(TransportError, match=r"worker only .* does not answer"):
                            await contents(client, "/large", len(LARGE))
                    attr = await here.metadata.resolve("/small")
                    with pytest.raises(TransportError, match="worker only of this host does not answer"):
                        await here.free([BlockId(attr.key, 0)])
                finally:
                    only.process.send_signal(signal.SIGCONT)
            await trio.to_thread.run_sync(only.end)


async def test_without_any_worker_it_is_an_error_after_patience_and_one_that_comes_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cluster_of(tmp_path, monkeypatch) as cluster:
        await cluster.stop("worker")
        async with cluster.client(**away(cluster, patience_s=0.3, look_again_s=3600.0)) as client:
            assert client.workers.why_no_tiers() == "there is no worker on this node"
            attr = await client.metadata.resolve("/")
            assert attr.is_dir
            with pytest.raises(TransportError, match="no worker is alive"):
                await client.view.promote(attr.ino)
            await cluster.start_worker()
            with trio.fail_after(LIMIT_S):
                while True:
                    try:
                        assert await contents(client, "/large", len(LARGE)) == LARGE
                        break
                    except TransportError:
                        continue


async def test_a_worker_that_comes_to_this_host_is_used_and_its_files_are_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cluster_of(tmp_path, monkeypatch) as cluster, cluster.client(**away(cluster)) as client:
        assert await contents(client, "/small", len(SMALL)) == SMALL
        chosen: list[str] = []
        client.workers.on_chosen = lambda: chosen.append(worker_of(client))
        monkeypatch.undo()
        mine = await cluster.add_worker("mine")
        await until(lambda: worker_of(client) == "mine")
        assert chosen == ["mine"]
        assert client.tiers == (mine.tiers[0].path,)
        attr = await client.metadata.resolve("/small")
        assert await client.promote(attr.ino)
        fd = client.open_sealed(attr)
        assert fd is not None
        try:
            assert os.pread(fd, len(SMALL) + 1, 0) == SMALL
        finally:
            os.close(fd)


@pytest.mark.expect_warnings("a worker is lost")
async def test_when_that_of_the_host_stays_away_another_is_read_through_and_what_it_sealed_is_still_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cluster_of(tmp_path, monkeypatch) as cluster:
        monkeypatch.undo()
        await cluster.add_worker("mine")
        async with cluster.client(**away(cluster, patience_s=3.0, look_again_s=3600.0)) as client:
            assert worker_of(client) == "mine"
            small = await client.metadata.resolve("/small")
            assert await client.promote(small.ino)
            reader = client.open_content(await client.metadata.resolve("/large"))
            assert bytes(await reader.read(0, PAGE)) == LARGE[:PAGE]
            await cluster.stop("mine")
            with trio.fail_after(LIMIT_S):
                assert bytes(await reader.read(0, len(LARGE))) == LARGE
            reader.close()
            assert worker_of(client) == "worker"
            fd = client.open_sealed(small)
            assert fd is not None
            try:
                assert os.pread(fd, len(SMALL) + 1, 0) == SMALL
            finally:
                os.close(fd)


async def test_a_named_one_goes_before_that_of_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with cluster_of(tmp_path, monkeypatch) as cluster:
        monkeypatch.undo()
        await cluster.add_worker("mine")
        async with cluster.client(**away(cluster, worker_address=cluster.worker_address)) as client:
            assert worker_of(client) == "worker"
            assert await contents(client, "/large", len(LARGE)) == LARGE
        assert (await cluster.worker_status("mine")).counters.served_reads == 0
        nobody = TcpAddress("127.0.0.1", 1)
        with pytest.raises(TransportError, match=r"127\.0\.0\.1:1"):
            async with cluster.client(**away(cluster, worker_address=nobody, first_contact_s=0.2)):
                pass


# ---- between workers -----------------------------------------------------------------------------------------------


async def test_of_two_workers_that_have_it_the_nearer_one_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cluster_of(tmp_path, monkeypatch, worker={"labels": {"host": "n1", "rack": "1"}}) as cluster:
        far = await cluster.add_worker("far", labels={"host": "n2", "rack": "2"})
        asker = await cluster.add_worker("asker", labels={"host": "n3", "rack": "2"})
        for socket in (cluster.worker_config.socket, far.socket):
            async with cluster.client(worker_socket=socket) as client:
                assert await client.promote((await client.metadata.resolve("/large")).ino)
        async with cluster.client(worker_socket=asker.socket) as client:
            attr = await client.metadata.resolve("/large")
            with trio.fail_after(LIMIT_S):
                while len(await client.holders(attr, 0)) < 2:
                    await trio.sleep(0.01)
            before = (await cluster.worker_status()).counters.served_reads
            assert await client.promote(attr.ino)
        assert (await cluster.worker_status("asker")).counters.under_store_bytes == 0
        assert (await cluster.worker_status("far")).counters.served_reads == 6
        assert (await cluster.worker_status()).counters.served_reads == before
