"""Readers of an under-store that answers, while many wait for one that does not."""

from __future__ import annotations

import json
import mmap
import os
import random
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest
import trio

from cachefs.fuse import probe
from cachefs.model import MiB
from cachefs.testing.faulty_s3 import FaultyS3, running_faulty_s3
from cachefs.testing.fixtures import Bucket
from cachefs.testing.processes import mountpoint_below
from cachefs.testing.real_cluster import PAGE, RealCluster, real_cluster

pytestmark = pytest.mark.skipif(not probe().can_mount, reason="needs root and /dev/fuse")

WAITING = 48
"""Readers of MiB each: more than there is room for in answers, and more than there are slots."""
SILENT = {f"silent/{number}": bytes([number]) * MiB for number in range(WAITING)}
SMALL = {f"well/small/{number}": random.Random(number).randbytes(5000 + number) for number in range(12)}
LARGE = {f"well/large/{number}": random.Random(-number).randbytes(20 * PAGE + number) for number in range(4)}
LIMIT_S = 40.0
"""Less than the deadline of the store that does not answer, which is when those who wait for it make room."""


@contextmanager
def waiting(root: Path, store: FaultyS3) -> Iterator[list[threading.Thread]]:
    """As many readers of all files that the silent store has as there are, each waiting; they end with the block."""
    errors: list[str] = []

    def read(name: str) -> None:
        # In one piece, whatever the kernel would read ahead.
        fd = os.open(root / name, os.O_RDONLY | os.O_DIRECT)
        try:
            with mmap.mmap(-1, MiB) as memory:
                if os.preadv(fd, [memory], 0) != MiB or memory[:] != SILENT[name]:
                    errors.append(name)
        finally:
            os.close(fd)

    store.inject("stall", times=10**9)
    readers = [threading.Thread(target=read, args=(name,), daemon=True) for name in SILENT]
    for each in readers:
        each.start()
    try:
        yield readers
    finally:
        store.forget()
        store.release()
        for each in readers:
            each.join(60)
    assert errors == []


@asynccontextmanager
async def scene(tmp_path: Path, bucket: Bucket, store: FaultyS3, *flags: str) -> AsyncIterator[RealCluster]:
    """At /silent what comes by way of `store`, at /well what does not."""
    bucket.put(SILENT | SMALL | LARGE)
    options = {**bucket.options, "endpoint_url": store.endpoint}
    async with real_cluster(tmp_path, f"{bucket.url}/silent", ufs_options=options, at="/silent") as cluster:
        command = [sys.executable, "-m", "cachefs", "ufs", "add", "/well", f"{bucket.url}/well"]
        command += ["--master", f"127.0.0.1:{cluster.port}", "--insecure"]
        environment = {**os.environ, "CACHEFS_UFS_OPTIONS": json.dumps(bucket.options)}
        await trio.run_process(command, env=environment, capture_stdout=True, capture_stderr=True)
        await cluster.start_worker("a", *flags)
        yield cluster


async def check(root: Path, *names: str) -> None:
    for name in names:
        read = (root / name).read_bytes
        assert await trio.to_thread.run_sync(read, abandon_on_cancel=True) == (SMALL | LARGE)[name], name


@pytest.mark.parametrize("promote", ["never", "if-space"])
async def test_readers_of_another_store_go_on(tmp_path: Path, s3_bucket: Bucket, promote: str) -> None:
    """By the same mount, and by one that has nothing else to wait for."""
    (tmp_path / "second").mkdir()
    with (
        running_faulty_s3(s3_bucket.server.endpoint) as store,
        mountpoint_below(tmp_path) as root,
        mountpoint_below(tmp_path / "second") as other,
    ):
        async with scene(tmp_path, s3_bucket, store, "--promote", promote) as cluster:
            for name, mountpoint in (("mount", root), ("other", other)):
                await cluster.start_mount(name, mountpoint, "--worker-socket", cluster.socket("a"))
                assert len(os.listdir(mountpoint / "silent")) == WAITING
            with waiting(root, store) as readers:
                # Until every slot is taken, all that is wanted of the store is under way, and answers have no room.
                await trio.to_thread.run_sync(store.wait_stalled, 16, abandon_on_cancel=True)
                with trio.fail_after(LIMIT_S):
                    await check(other, *SMALL, *LARGE)
                    await check(root, *SMALL, *LARGE)
                assert all(each.is_alive() for each in readers)
            await check(root, *SMALL)
