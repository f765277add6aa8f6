"""Bits that flip in what a worker keeps: nobody it answers gets them, and what is damaged is fetched again."""

from __future__ import annotations

import os
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from cachefs.client import Client, ContentReader
from cachefs.model import Attr, BlockMissingError, RemoteProtocolError
from cachefs.net import Answer, UnixAddress, open_peer
from cachefs.policy import Promote
from cachefs.store import TierConfig, open_store, page_checksum
from cachefs.store import partial as partial_module
from cachefs.store.layout import SUMS_SUFFIX
from cachefs.testing.blocks import CLUSTER, GEOMETRY, block, content, seal, sealed_path
from cachefs.testing.blocks import PAGE as STORE_PAGE
from cachefs.testing.cluster import BLOCK, PAGE, TestCluster, running_cluster
from cachefs.testing.disks import medium_of, small_disk
from cachefs.wire import Hello
from cachefs.wire.cluster import DoubtBlock, ReadBlock
from cachefs.wire.messages import Fetch, FetchReply

CONTENT = random.Random(1).randbytes(9 * PAGE + 123)
LIMIT_S = 60

pytestmark = pytest.mark.expect_warnings("damage is told")


@asynccontextmanager
async def scene(tmp_path: Path, **worker: object) -> AsyncIterator[tuple[TestCluster, Client, Attr]]:
    data = tmp_path / "data"
    data.mkdir()
    (data / "file").write_bytes(CONTENT)
    quiet = {"scrub_bytes_per_s": 0, **worker}
    with trio.fail_after(LIMIT_S):
        async with (
            running_cluster(tmp_path, data.as_uri(), ufs_options={"settle": "0"}, worker=quiet) as cluster,
            cluster.client() as client,
        ):
            yield cluster, client, await client.metadata.resolve("/file")


def the_file(tmp_path: Path, kind: str) -> Path:
    (file,) = [each for each in (tmp_path / "tier" / kind).glob("??/*") if not each.name.endswith(SUMS_SUFFIX)]
    return file


def flip(file: Path, at: int) -> None:
    with file.open("r+b") as data:
        data.seek(at)
        (byte,) = data.read(1)
        data.seek(at)
        data.write(bytes([byte ^ 16]))


async def corrupt(cluster: TestCluster) -> int:
    return (await cluster.worker_status()).counters.corrupt


async def fetched_bytes(cluster: TestCluster) -> int:
    return (await cluster.worker_status()).counters.under_store_bytes


async def read(reader: ContentReader, chunk: int = 50_000) -> bytes:
    return b"".join([bytes(await reader.read(at, chunk)) for at in range(0, len(CONTENT), chunk)])


async def hold_two_pages(client: Client, attr: Attr) -> ContentReader:
    """Of the file in part; its reader, who has the descriptor. Nothing is fetched ahead once it returns."""
    reader = client.open_content(attr)
    assert bytes(await reader.read(4 * PAGE, 10)) == CONTENT[4 * PAGE :][:10]
    return reader


# ---- given to other workers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("known", [False, True])
async def test_a_part_of_a_damaged_page_is_not_given_to_another_worker(tmp_path: Path, known: bool) -> None:
    """Whether the page was compared before, however shortly, or not."""
    async with scene(tmp_path) as (cluster, client, attr):
        assert await client.promote(attr.ino)
        async with open_peer(cluster.worker_address, Hello("worker")) as peer:
            part = ReadBlock(attr.key, 0, 2 * PAGE + 100, 1000, "held")
            if known:
                assert (await peer.call(part)).payload == CONTENT[2 * PAGE + 100 :][:1000]
            file = the_file(tmp_path, "sealed")
            flip(file, 2 * PAGE + 500)
            with pytest.raises(BlockMissingError):
                await peer.call(part)
        assert not file.exists() and await corrupt(cluster) == 1
        assert await client.promote(attr.ino)
        assert await read(client.open_content(attr)) == CONTENT


async def test_who_reads_parts_from_another_worker_gets_the_right_bytes(tmp_path: Path) -> None:
    async with scene(tmp_path) as (cluster, client, attr):
        assert await client.promote(attr.ino)
        other = await cluster.add_worker("other", promote=Promote.NEVER)
        async with cluster.client(worker_socket=other.socket) as elsewhere:
            while sum(each.blocks for each in (await client.master_status()).workers) != 1:
                await trio.sleep(0.02)
            file = the_file(tmp_path, "sealed")
            flip(file, 5 * PAGE + 77)
            rng = random.Random(3)
            reader = elsewhere.open_content(attr)
            for _ in range(40):
                at, length = rng.randrange(len(CONTENT)), rng.randrange(1, PAGE)
                assert bytes(await reader.read(at, length)) == CONTENT[at : at + length]
            assert bytes(await reader.read(5 * PAGE + 70, 20)) == CONTENT[5 * PAGE + 70 :][:20]
            reader.close()
            assert (await cluster.worker_status("other")).counters.peer_bytes > 0
        assert await corrupt(cluster) == 1


async def test_a_page_of_an_incomplete_file_is_compared_before_it_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partial_module, "_FRESH_S", -1.0)
    async with scene(tmp_path) as (cluster, client, attr):
        reader = await hold_two_pages(client, attr)
        async with open_peer(
            cluster.worker_address, Hello("worker", namespace_id=client.metadata.namespace_id)
        ) as peer:
            for offset, length in ((4 * PAGE, PAGE), (4 * PAGE + 9, 100)):
                right = CONTENT[offset : offset + length]
                held = ReadBlock(attr.key, 0, offset, length, "held")
                assert (await peer.call(held)).payload == right
                flip(the_file(tmp_path, "partial"), 4 * PAGE + 50)
                with pytest.raises(BlockMissingError):
                    await peer.call(held)
                # Fetched again, into the same file.
                fetched = ReadBlock(attr.key, 0, offset, length, "origin", attr.ino)
                answer = await peer.call(fetched)
                assert answer.payload == right and answer.message.checksum == page_checksum(right)
                assert bytes(await reader.read(offset, length)) == right
        assert await corrupt(cluster) == 2
        reader.close()


async def test_what_a_worker_said_of_a_page_that_it_got_is_looked_at_before_the_next_gets_it(tmp_path: Path) -> None:
    """A page that came a moment ago goes out without being compared again, with its checksum: whoever gets it finds out
    that it is damaged, and says so.
    """
    async with scene(tmp_path) as (cluster, client, attr):
        reader = await hold_two_pages(client, attr)
        flip(the_file(tmp_path, "partial"), 4 * PAGE)
        async with open_peer(cluster.worker_address, Hello("worker")) as peer:
            held = ReadBlock(attr.key, 0, 4 * PAGE, PAGE, "held")
            answer = await peer.call(held)
            assert page_checksum(answer.payload) != answer.message.checksum
            await peer.call(DoubtBlock(attr.key, 0))
            with pytest.raises(BlockMissingError):
                await peer.call(held)
        assert await corrupt(cluster) == 1
        reader.close()


def test_a_page_cache_that_is_wrong_where_the_medium_is_right_is_found_for_whom_it_was_wrong(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting disks needs root")
    with small_disk(tmp_path, 32 << 20) as disk:
        tier = TierConfig("ssd", str(disk / "tier"), 64 * STORE_PAGE)
        with open_store((tier,), GEOMETRY, CLUSTER) as store:
            seal(store, block(1), content(1, 3 * STORE_PAGE))
            file = sealed_path(tier.path, block(1))
            with medium_of(tmp_path, file) as image:
                right = image.read(10)
                image.rewrite(bytes(10))
                assert not store.check(block(1)), "the page cache is right, the medium is not"
                image.drop_cache()
                assert file.read_bytes()[:10] == bytes(10)
                image.rewrite(right)
                assert store.check(block(1)) and not store.check(block(1), as_read=True)
                assert file.read_bytes()[:10] == bytes(10)


# ---- given to mounts of other hosts --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sealed", "partial"])
async def test_a_mount_of_another_host_gets_the_right_bytes(tmp_path: Path, kind: str) -> None:
    async with scene(tmp_path) as (cluster, client, attr):
        if kind == "sealed":
            assert await client.promote(attr.ino)
        else:
            (await hold_two_pages(client, attr)).close()
        async with cluster.client(worker_socket=None, worker_address=cluster.worker_address) as elsewhere:
            reader = elsewhere.open_content(attr)
            flip(the_file(tmp_path, kind), 4 * PAGE + 3)
            assert bytes(await reader.read(4 * PAGE - 10, 100)) == CONTENT[4 * PAGE - 10 :][:100]
            assert await corrupt(cluster) == 1
            assert await read(reader) == CONTENT
            reader.close()


async def test_what_is_sent_to_a_mount_of_another_host_has_a_checksum(tmp_path: Path) -> None:
    async with scene(tmp_path) as (cluster, client, attr):
        async with open_peer(
            cluster.worker_address, Hello("client", namespace_id=client.metadata.namespace_id)
        ) as mount:
            for promote in ("never", "always"):
                answer = await mount.call(Fetch(attr.ino, 0, PAGE - 5, 3 * PAGE, 0, promote=promote))
                right = CONTENT[PAGE - 5 :][: 3 * PAGE]
                assert answer.payload == right and answer.message.checksum == page_checksum(right)
        async with open_peer(UnixAddress(cluster.worker_config.socket), Hello("client")) as mount:
            answer = await mount.call(Fetch(attr.ino, 0, 0, 100, 0, promote="never"))
            assert answer.message.checksum is None


@pytest.mark.parametrize("times", [1, 99])
async def test_what_arrives_damaged_at_a_mount_of_another_host_is_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    """A bit flips on the way, past the checksum of TCP: the right bytes, or an error if it is so again and again."""
    async with scene(tmp_path) as (cluster, client, attr):
        assert await client.promote(attr.ino)
        async with cluster.client(worker_socket=None, worker_address=cluster.worker_address) as elsewhere:
            reader = elsewhere.open_content(attr)
            fetch, asked = reader._fetch, 0

            async def damaging(request: Fetch) -> Answer[FetchReply]:
                nonlocal asked
                answer = await fetch(request)
                asked += 1
                if asked > times:
                    return answer
                payload = bytearray(answer.payload)  # type: ignore[arg-type]
                payload[len(payload) // 2] ^= 1
                return Answer(answer.message, bytes(payload), answer.fds)

            monkeypatch.setattr(reader, "_fetch", damaging)
            if times == 1:
                assert bytes(await reader.read(PAGE - 7, 1000)) == CONTENT[PAGE - 7 :][:1000] and asked == 2
            else:
                with pytest.raises(RemoteProtocolError, match="damaged again and again"):
                    await reader.read(PAGE - 7, 1000)
                assert asked == 3
            reader.close()
        assert await corrupt(cluster) == 0


@pytest.mark.parametrize("asks", ["worker", "mount"])
async def test_a_damaged_checksum_of_one_page_costs_the_block_once(tmp_path: Path, asks: str) -> None:
    """It is not remembered beside the file that comes in the place of the one it belonged to."""
    async with scene(tmp_path) as (cluster, client, attr):
        assert await client.promote(attr.ino)
        file = the_file(tmp_path, "sealed")
        sums = file.with_name(file.name + SUMS_SUFFIX)
        flip(sums, sums.stat().st_size - 5)
        if asks == "mount":
            async with cluster.client(worker_socket=None, worker_address=cluster.worker_address) as elsewhere:
                reader = elsewhere.open_content(attr)
                assert bytes(await reader.read(9 * PAGE, 100)) == CONTENT[9 * PAGE :][:100]
                reader.close()
            while await corrupt(cluster) == 0 or file.exists():
                await trio.sleep(0.01)
        async with open_peer(cluster.worker_address, Hello("worker")) as peer:
            part = ReadBlock(attr.key, 0, 9 * PAGE + 10, 50, "held")
            with pytest.raises(BlockMissingError):
                await peer.call(part)
            assert not file.exists() and await corrupt(cluster) == 1
            assert await client.promote(attr.ino)
            assert (await peer.call(part)).payload == CONTENT[9 * PAGE + 10 :][:50]
        assert await corrupt(cluster) == 1


# ---- given to mounts of this host ----------------------------------------------------------------------------------


async def test_who_opens_an_incomplete_file_reads_what_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page that came some time ago is compared before it is said to be readable; only what is damaged is fetched."""
    async with scene(tmp_path) as (cluster, client, attr):
        first = await hold_two_pages(client, attr)
        monkeypatch.setattr(partial_module, "_FRESH_S", -1.0)
        flip(the_file(tmp_path, "partial"), 4 * PAGE + 3)
        before = await fetched_bytes(cluster)
        second = client.open_content(attr)
        assert bytes(await second.read(4 * PAGE, 100)) == CONTENT[4 * PAGE :][:100]
        # Written into the same file: who was told before reads the right bytes too.
        assert bytes(await first.read(4 * PAGE, 100)) == CONTENT[4 * PAGE :][:100]
        assert await corrupt(cluster) == 1 and await fetched_bytes(cluster) <= before + 2 * PAGE
        assert await read(second) == CONTENT
        for reader in (first, second):
            reader.close()


async def test_only_what_is_damaged_is_fetched_again_for_the_seal(tmp_path: Path) -> None:
    async with scene(tmp_path) as (cluster, client, attr):
        reader = await hold_two_pages(client, attr)
        flip(the_file(tmp_path, "partial"), 4 * PAGE + 3)
        # Whoever reads on makes the worker fill the file; whoever reads all of it sees it sealed in the end.
        await reader.read(0, 3 * PAGE)
        while (await cluster.worker_status()).tiers[0].blocks == 0:
            await trio.sleep(0.01)
        assert await corrupt(cluster) == 1 and await fetched_bytes(cluster) == len(CONTENT) + PAGE
        assert the_file(tmp_path, "sealed").read_bytes() == CONTENT
        assert await read(reader) == CONTENT
        reader.close()


def test_blocks_are_of_several_pages() -> None:
    assert PAGE < len(CONTENT) < BLOCK
