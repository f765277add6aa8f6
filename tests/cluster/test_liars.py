"""A worker that says it holds what others want, and answers with something else."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from cachefs.model import BlockMissingError, UnderStoreError
from cachefs.net import Address, Answer, Hello, Peer, Service, Session, TcpAddress, open_background, open_peer, serve
from cachefs.store import page_checksum
from cachefs.testing.cluster import PAGE, TestCluster, running_cluster
from cachefs.testing.real_cluster import promoted, read_all
from cachefs.wire.cluster import (
    BlockBytes,
    DoubtBlock,
    HeldBlock,
    ReadBlock,
    RegisterWorker,
    ReportBlocks,
    WatchMembers,
)
from cachefs.wire.messages import Done

CONTENTS = {
    "small": random.Random(1).randbytes(PAGE // 3),
    "large": random.Random(2).randbytes(6 * PAGE + 7),
}
Lie = Callable[[ReadBlock, bytes], Answer[BlockBytes]]
"""What is answered instead of these bytes."""


def other_bytes(request: ReadBlock, right: bytes) -> Answer[BlockBytes]:
    return Answer(BlockBytes(page_checksum(right)), bytes(len(right)))


def another_checksum(request: ReadBlock, right: bytes) -> Answer[BlockBytes]:
    return Answer(BlockBytes(page_checksum(right) ^ 1), right)


def too_few(request: ReadBlock, right: bytes) -> Answer[BlockBytes]:
    return Answer(BlockBytes(page_checksum(right[:-1])), right[:-1])


def too_many(request: ReadBlock, right: bytes) -> Answer[BlockBytes]:
    return Answer(BlockBytes(page_checksum(right + b"x")), right + b"x")


def nothing(request: ReadBlock, right: bytes) -> Answer[BlockBytes]:
    return Answer(BlockBytes(0))


def soon_for_ever(request: ReadBlock, right: bytes) -> Answer[BlockBytes]:
    return Answer(BlockBytes(0, pending=True))


def not_here(request: ReadBlock, right: bytes) -> Answer[BlockBytes]:
    raise BlockMissingError("not here")


def a_failure_of_the_store(request: ReadBlock, right: bytes) -> Answer[BlockBytes]:
    raise UnderStoreError("the store is on fire")


NOTICED = (other_bytes, another_checksum)
"""Those that only the checksum gives away: the liar is told."""


class Liar:
    def __init__(self, peer: Peer, lie: Lie) -> None:
        self.lie = lie
        self.asked = 0
        self.doubted = 0
        self.held: dict[bytes, bytes] = {}
        self._peer = peer

    async def read_block(self, request: ReadBlock, session: Session) -> Answer[BlockBytes]:
        self.asked += 1
        await trio.sleep(0.001)
        right = self.held[request.key][request.offset :][: request.length]
        return self.lie(request, right)

    async def doubt_block(self, request: DoubtBlock, session: Session) -> Done:
        self.doubted += 1
        return Done()

    async def join(self, address: Address, held: list[HeldBlock]) -> None:
        registered = (await self._peer.call(RegisterWorker("liar", str(address), "/nowhere", "boot", 1 << 30))).message
        await self._peer.call(ReportBlocks(registered.epoch, held, [], full=True))

    async def stay(self) -> None:
        """Being told who else there is keeps nobody alive; this is for the connection."""
        async with self._peer.stream(WatchMembers()) as members:
            async for _ in members:
                pass


@asynccontextmanager
async def lying(cluster: TestCluster, lie: Lie, keys: dict[bytes, bytes]) -> AsyncIterator[Liar]:
    """A worker that claims to hold these contents."""
    async with (
        open_peer(cluster.master_address, Hello("worker", name="liar")) as peer,
        open_background() as nursery,
    ):
        liar = Liar(peer, lie)
        liar.held = keys
        service = Service()
        service.on(ReadBlock, liar.read_block)
        service.on(DoubtBlock, liar.doubt_block)

        async def run(task_status: trio.TaskStatus[list[Address]]) -> None:
            await serve(service, [TcpAddress("127.0.0.1", 0)], hello=Hello("worker"), task_status=task_status)

        (address,) = await nursery.start(run)
        nursery.start_soon(liar.stay)
        await liar.join(address, [HeldBlock(key, 0, len(content)) for key, content in keys.items()])  # type: ignore[arg-type]
        yield liar


@pytest.mark.expect_warnings("damaged bytes are worth one")
@pytest.mark.parametrize("promote", [None, "never"])
@pytest.mark.parametrize(
    "lie",
    [
        *(other_bytes, another_checksum, too_few, too_many, nothing),
        *(soon_for_ever, not_here, a_failure_of_the_store),
    ],
)
async def test_nobody_reads_a_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lie: Lie, promote: str | None
) -> None:
    """Right bytes come from the under-store, soon, and whoever sent wrong ones is told."""
    monkeypatch.setattr("cachefs.worker.supply._PATIENCE_S", 0.1)
    (tmp_path / "data").mkdir()
    for name, content in CONTENTS.items():
        (tmp_path / "data" / name).write_bytes(content)
    async with (
        running_cluster(tmp_path, (tmp_path / "data").as_uri(), ufs_options={"settle": "0"}) as cluster,
        cluster.client(promote=promote) as client,
    ):
        keys = {(await client.metadata.resolve(f"/{name}")).key: content for name, content in CONTENTS.items()}
        async with lying(cluster, lie, keys) as liar:
            with trio.fail_after(60):
                while b"\ncachefs_peers_known 1.0\n" not in cluster.monitors["worker"].text():
                    await trio.sleep(0.15)
                for name, content in CONTENTS.items():
                    assert await (read_all if promote else promoted)(client, f"/{name}") == content
            counters = (await cluster.worker_status()).counters
            assert liar.asked >= len(CONTENTS)
            assert counters.under_store_bytes >= sum(map(len, CONTENTS.values()))
            assert bool(liar.doubted) is (lie in NOTICED) is bool(counters.corrupt)
