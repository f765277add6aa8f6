"""What a worker sends to others, asked over a real connection."""

from __future__ import annotations

import errno
import os
import random
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from cachefs.model import Attr, BlockMissingError
from cachefs.net import Peer, Session, UnixAddress, open_peer
from cachefs.net.payloads import Room
from cachefs.store import Partial, reader, sums
from cachefs.store import partial as partial_module
from cachefs.testing.cluster import PAGE, TestCluster, running_cluster
from cachefs.wire import Hello
from cachefs.wire.cluster import ReadBlock
from cachefs.wire.messages import Fetch

CONTENT = random.Random(1).randbytes(3 * PAGE)


@asynccontextmanager
async def scene(tmp_path: Path) -> AsyncIterator[tuple[TestCluster, Peer, Attr]]:
    """A worker that holds a file of one block, and who asks it."""
    data = tmp_path / "data"
    data.mkdir()
    (data / "file").write_bytes(CONTENT)
    options = {"settle": "0"}
    async with (
        running_cluster(tmp_path, data.as_uri(), ufs_options=options, worker={"scrub_bytes_per_s": 0}) as cluster,
        cluster.client() as client,
        open_peer(cluster.worker_address, Hello("worker")) as peer,
    ):
        attr = await client.metadata.resolve("/file")
        assert await client.promote(attr.ino)
        yield cluster, peer, attr


async def test_parts_of_pages_wait_for_room_and_give_it_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken, left = list[int](), list[Room]()
    room_for_payload, give_back = Session.room_for_payload, Room.give_back

    async def spy(session: Session, count: int) -> Room:
        taken.append(count)
        return await room_for_payload(session, count)

    def spied(room: Room) -> None:
        left.append(room)
        give_back(room)

    monkeypatch.setattr(Session, "room_for_payload", spy)
    monkeypatch.setattr(Room, "give_back", spied)
    async with scene(tmp_path) as (_, peer, attr):
        for offset, length in ((PAGE + 10, 100), (0, PAGE), (5, 200)):
            answer = await peer.call(ReadBlock(attr.key, 0, offset, length, "held"))
            assert answer.payload == CONTENT[offset : offset + length]
        # A whole page goes from the file to the socket, and takes none.
        assert taken == [100, 200]
        with trio.fail_after(60):
            while len(left) < len(taken):
                await trio.lowlevel.checkpoint()


async def test_a_page_of_a_block_that_is_sealed_while_it_is_compared_is_given_and_costs_no_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "file").write_bytes(CONTENT)
    comparing, go_on, compare = threading.Event(), threading.Event(), Partial.compare

    def slowly(partial: Partial, page: int) -> bool:
        comparing.set()
        assert go_on.wait(60)
        return compare(partial, page)

    options, quiet = {"settle": "0"}, {"scrub_bytes_per_s": 0}
    async with (
        running_cluster(tmp_path, data.as_uri(), ufs_options=options, worker=quiet) as cluster,
        cluster.client() as client,
        open_peer(cluster.worker_address, Hello("worker")) as peer,
    ):
        attr = await client.metadata.resolve("/file")
        reader = client.open_content(attr)
        assert bytes(await reader.read(2 * PAGE, 10)) == CONTENT[2 * PAGE :][:10]
        reader.close()
        monkeypatch.setattr(Partial, "compare", slowly)
        monkeypatch.setattr(partial_module, "_FRESH_S", -1.0)
        try:
            async with trio.open_nursery() as nursery:

                async def ask() -> None:
                    answer = await peer.call(ReadBlock(attr.key, 0, 2 * PAGE, PAGE, "held"))
                    assert answer.payload == CONTENT[2 * PAGE :]

                nursery.start_soon(ask)
                assert await trio.to_thread.run_sync(comparing.wait, 60)
                assert await client.promote(attr.ino)
                go_on.set()
        finally:
            go_on.set()
        status = await cluster.worker_status()
        assert (status.counters.corrupt, status.tiers[0].blocks) == (0, 1)


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
async def test_a_lack_of_descriptors_or_memory_costs_no_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    class Lacking:
        def open(self, *args: object, **kwargs: object) -> int:
            raise OSError(code, os.strerror(code))

        def __getattr__(self, name: str) -> object:
            return getattr(os, name)

    async with scene(tmp_path) as (cluster, peer, attr):
        request = ReadBlock(attr.key, 0, 0, PAGE, "held")
        with monkeypatch.context() as patch:
            patch.setattr(sums, "os", Lacking())
            with pytest.raises(BlockMissingError, match="cannot be read now"):
                await peer.call(request)
        with monkeypatch.context() as patch:
            patch.setattr(reader, "os", Lacking())
            # A mount gets the bytes themselves.
            async with open_peer(UnixAddress(cluster.worker_config.socket), Hello("client")) as mount:
                assert (await mount.call(Fetch(attr.ino, 0, 0, PAGE, 0))).payload == CONTENT[:PAGE]
        assert (await peer.call(request)).payload == CONTENT[:PAGE]
        # From here, not fetched again.
        assert (await cluster.worker_status()).counters.blocks_sealed == 1
