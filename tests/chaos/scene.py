"""A cluster to do harm to: a real S3 server behind a proxy, a master, three workers, disks of their own, two mounts."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import trio

from cachefs.model import KiB, MiB
from cachefs.testing.disks import small_disk
from cachefs.testing.faulty_s3 import FaultyS3, running_faulty_s3
from cachefs.testing.processes import END_TIMEOUT_S, mountpoint_below
from cachefs.testing.real_cluster import PAGE, RealCluster
from cachefs.testing.s3server import S3Server, running_s3_server
from tests.chaos import leaks
from tests.chaos.cables import Cable
from tests.chaos.contents import content
from tests.chaos.history import History

BUCKET, PREFIX = "chaos", "data"
DIRECTORIES = ("s", "l")
"""Of small and large objects."""
SMALL, LARGE = 40, 8
SYNC_S = 2
STORE_DEADLINE_S = 8
PATIENCE_S = 30
"""How long the rest waits for a master or worker: docs/operations.md."""
STALE_S = 2 * SYNC_S + 8.0
"""The master believes what it knows for --sync-interval, and a mount as long what it was told; the rest is for a busy
machine."""
GRACE_S = 10.0
_DISKS = {"a": 40 * MiB, "b": 24 * MiB}
_TIERS = {"a": "ssd:{}:16M", "b": "mem:{}:14M", "c": "ssd:{}:64M"}
REPOSITORY = Path(__file__).parents[2]


@dataclass
class Scene:
    directory: Path
    server: S3Server
    faulty: FaultyS3
    cluster: RealCluster
    history: History
    client: Any
    """To the bucket, past the proxy."""
    master_cables: dict[str, Cable]
    """Of workers and mounts -> on which they reach the master."""
    peer_cables: dict[str, Cable]
    """Of workers -> on which the others reach them."""
    tiers: dict[str, Path]
    disks: dict[str, Path]
    mountpoints: dict[str, Path]
    orphaned: set[str]
    """Mounts whose keeper was killed: another one took its place, which is no child of ours."""

    # ---- the bucket ------------------------------------------------------------------------------------------------

    async def put(self, name: str, size: int) -> None:
        version, began = self.history.next_version(name), time.monotonic()
        self.history.put(name, size, began, float("inf"))
        body = content(name, version, size)
        await trio.to_thread.run_sync(lambda: self.client.put_object(Bucket=BUCKET, Key=f"{PREFIX}/{name}", Body=body))
        self.history.put(name, size, began, time.monotonic())

    async def delete(self, name: str) -> None:
        began = time.monotonic()
        self.history.delete(name, began, float("inf"))
        await trio.to_thread.run_sync(lambda: self.client.delete_object(Bucket=BUCKET, Key=f"{PREFIX}/{name}"))
        self.history.delete(name, began, time.monotonic())

    # ---- processes -------------------------------------------------------------------------------------------------

    async def start_master(self) -> None:
        await self.cluster.start_master()
        for cable in self.master_cables.values():
            cable.target = ("127.0.0.1", self.cluster.port)

    async def start_worker(self, name: str) -> None:
        self.peer_cables[name].target = None
        tier = _TIERS[name].format(self.tiers[name])
        links = ("--master", self.master_cables[name].address, "--advertise", self.peer_cables[name].address)
        labels = ("--label", f"host=host-{name}")
        started = await self.cluster.start_worker(name, "--tier", tier, "--promote", "always", *links, *labels)
        host, _, port = started.facts["listen"].rpartition(":")
        self.peer_cables[name].target = (host, int(port))

    async def start_mount(self, name: str) -> None:
        worker = name.rpartition("-")[2]
        links = ("--master", self.master_cables[name].address, "--worker-socket", self.cluster.socket(worker))
        sizes = ("--open-wait", str(3 * PAGE), "--read-ahead", "128K", "--label", f"host=host-{worker}")
        await self.cluster.start_mount(name, self.mountpoints[name], *links, *sizes)

    def answering(self, mount: str) -> list[int]:
        """The processes that answer for a mount: its server below a keeper, or else the one that was started."""
        found = self.having("mount-server", mount)
        return found or [self.cluster.processes[mount].process.pid]

    def having(self, argument: str, mount: str) -> list[int]:
        """Processes with this in their command line, followed by the mountpoint."""
        return list(leaks.processes_with(f"{argument} {self.mountpoints[mount]}"))

    def descriptors(self) -> dict[str, Counter[str]]:
        """By name of a process."""
        found = {}
        for name, running in self.cluster.processes.items():
            pids = self.answering(name) if name in self.mountpoints else [running.process.pid]
            found[name] = sum((leaks.descriptors(pid) for pid in pids), Counter[str]())
        return found

    async def end_orphans(self) -> None:
        """As SIGTERM of their keepers does it. Raises AssertionError for those that do not end."""
        for name in self.orphaned & self.cluster.processes.keys():
            del self.cluster.processes[name]
            for pid in self.having("mount-keeper", name):
                os.kill(pid, signal.SIGTERM)
        for name in self.orphaned:
            with trio.move_on_after(END_TIMEOUT_S) as waiting:
                while self.having("mount-keeper", name) or self.having("mount-server", name):
                    await trio.sleep(0.1)
            assert not waiting.cancelled_caught, f"{name} does not end"

    # ---- readers ---------------------------------------------------------------------------------------------------

    def reader(self, mount: str, how: str, seed: int) -> list[str]:
        """The command line."""
        return [sys.executable, "-m", "tests.chaos.reader", str(self.mountpoints[mount]), how, str(seed), *DIRECTORIES]


@asynccontextmanager
async def open_scene(directory: Path, seed: int, left: list[str]) -> AsyncIterator[Scene]:
    """Root only. `left` is told at the end which files of the tiers nobody will ever look at.

    Raises AssertionError for processes that did not end cleanly, when all have ended.
    """
    rng = random.Random(f"objects {seed}")
    with ExitStack() as stack:
        server = stack.enter_context(running_s3_server(directory / "s3"))
        faulty = stack.enter_context(running_faulty_s3(server.endpoint))
        client = server.client()
        stack.callback(client.close)
        client.create_bucket(Bucket=BUCKET)
        (directory / "loop").mkdir()
        disks = {"a": stack.enter_context(small_disk(directory / "loop", _DISKS["a"]))}
        disks["b"] = stack.enter_context(_small_memory(directory / "memory", _DISKS["b"]))
        tiers = {name: disks.get(name, directory / name) / "tier" for name in _TIERS}
        mountpoints = {}
        for name in ("mount-a", "mount-b"):
            (directory / name).mkdir()
            mountpoints[name] = stack.enter_context(mountpoint_below(directory / name))
        options = {
            **replace(server, endpoint=faulty.endpoint).ufs_options,
            "deadline": str(STORE_DEADLINE_S),
            "read_timeout": "3",
        }
        async with trio.open_nursery() as nursery:
            master_cables = {name: await Cable.lay(nursery) for name in (*_TIERS, *mountpoints)}
            peer_cables = {name: await Cable.lay(nursery) for name in _TIERS}
            history = History(STALE_S, GRACE_S)
            flags = ("--sync-interval", f"{SYNC_S}s")
            cluster = RealCluster(
                directory, f"s3://{BUCKET}/{PREFIX}", options, 256 * MiB, "127.0.0.1", ("--insecure",), None, flags
            )
            scene = Scene(
                *(directory, server, faulty, cluster, history, client),
                *(master_cables, peer_cables, tiers, disks, mountpoints, set()),
            )
            try:
                async with trio.open_nursery() as putting:
                    putting.start_soon(scene.start_master)
                    for name in [f"s/{number}" for number in range(SMALL)] + [f"l/{number}" for number in range(LARGE)]:
                        putting.start_soon(scene.put, name, size_of(name, rng))
                async with trio.open_nursery() as starting:
                    for name in _TIERS:
                        starting.start_soon(scene.start_worker, name)
                async with trio.open_nursery() as starting:
                    for name in mountpoints:
                        starting.start_soon(scene.start_mount, name)
                yield scene
            finally:
                with trio.CancelScope(shield=True):
                    try:
                        await scene.end_orphans()
                        await trio.to_thread.run_sync(cluster.end_all)
                    finally:
                        for tier in tiers.values():
                            left += leaks.temporaries(tier)
                nursery.cancel_scope.cancel()


def size_of(name: str, rng: random.Random) -> int:
    pages = rng.choice([1, 1, 2, 3]) if name.startswith("s/") else rng.choice([16, 24, 40, 70])
    return pages * PAGE - rng.choice([0, 4 * KiB, 777])


@contextmanager
def _small_memory(directory: Path, size_bytes: int) -> Iterator[Path]:
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(directory)], check=True)
    try:
        yield directory
    finally:
        subprocess.run(["umount", "-l", str(directory)], check=True)
