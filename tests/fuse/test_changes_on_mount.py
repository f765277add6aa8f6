"""A real mount of a real cluster while the namespace changes under it. Whoever reads is another process."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from cachefs.client import ClientConfig
from cachefs.fuse import Mount, MountConfig, OperationsConfig, probe, run_mount
from cachefs.net import open_background
from cachefs.testing.cluster import PAGE, TestCluster, running_cluster
from cachefs.testing.processes import mountpoint_below

pytestmark = pytest.mark.skipif(not probe().can_mount, reason="needs root and /dev/fuse")

LIMIT_S = 30.0


class Scene:
    def __init__(self, cluster: TestCluster, data: Path, mountpoint: Path) -> None:
        self.cluster = cluster
        self.data = data
        self.mountpoint = mountpoint

    async def sh(self, script: str) -> str:
        """Output of a shell that stands in the mount."""
        command = ["sh", "-c", f"cd '{self.mountpoint}' && {script}"]
        with trio.fail_after(LIMIT_S):
            done = await trio.run_process(command, capture_stdout=True, capture_stderr=True, check=False)
        return (done.stdout + done.stderr).decode().strip()

    async def sh_until(self, script: str, expected: str) -> None:
        with trio.fail_after(LIMIT_S):
            while (found := await self.sh(script)) != expected:
                await trio.sleep(0.02)
                assert trio.current_effective_deadline() > trio.current_time(), found


@asynccontextmanager
async def scene(tmp_path: Path, files: dict[str, bytes], open_wait_bytes: int = PAGE) -> AsyncIterator[Scene]:
    """Names are believed for an hour."""
    data = tmp_path / "data"
    for name, content in files.items():
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).write_bytes(content)
    with mountpoint_below(tmp_path) as mountpoint:
        async with (
            running_cluster(tmp_path, data.as_uri(), master={"sync_interval_s": 3600}) as cluster,
            open_background() as nursery,
        ):
            config = MountConfig(
                mountpoint=str(mountpoint),
                client=ClientConfig(cluster.master_address, cluster.worker_config.socket),
                operations=OperationsConfig(open_wait_bytes=open_wait_bytes),
            )

            async def serve(task_status: trio.TaskStatus[None]) -> None:
                def ready(mounted: Mount, passthrough: bool) -> None:
                    task_status.started()

                await run_mount(config, ready)

            await nursery.start(serve)
            yield Scene(cluster, data, mountpoint)


@asynccontextmanager
async def holding(it: Scene, name: str, first: int) -> AsyncIterator[trio.Process]:
    """A process that has read the first bytes of a file, and copies the rest to its output once it gets a line."""
    script = f'exec 3<"$1"; dd bs={first} count=1 iflag=fullblock <&3 2>/dev/null; read go; cat <&3 2>&1'
    process = await trio.lowlevel.open_process(
        ["sh", "-c", script, "sh", str(it.mountpoint / name)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        yield process
    finally:
        process.kill()
        await process.wait()


async def receive(process: trio.Process, count: int) -> bytes:
    assert process.stdout is not None
    data = b""
    while len(data) < count and (more := await process.stdout.receive_some()):
        data += more
    return data


async def the_rest(process: trio.Process) -> bytes:
    assert process.stdin is not None
    await process.stdin.send_all(b"go\n")
    with trio.fail_after(LIMIT_S):
        return await receive(process, 1 << 40)


@pytest.mark.expect_warnings("another namespace is worth a warning")
async def test_a_mount_survives_the_loss_of_the_masters_database(tmp_path: Path) -> None:
    small, large = b"small" * 1000, b"large" * 8 * PAGE
    names = {f"dir/{number:02}": b"x" * (100 + number) for number in range(20)}
    async with scene(tmp_path, {"small": small, "large": large, "other": b"other", **names}) as it:
        assert len((await it.sh("ls -l dir")).splitlines()) == 21
        for name in ("large", "small", "other"):
            await it.sh(f"stat {name}")
        async with holding(it, "small", 5) as passed, holding(it, "large", 5) as cached:
            assert await receive(passed, 5) == b"small" and await receive(cached, 5) == b"large"
            standing = await trio.lowlevel.open_process(
                ["sh", "-c", "read go; ls; stat -c %s 00 2>&1"],
                cwd=it.mountpoint / "dir",
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            await it.cluster.stop("master")
            shutil.rmtree(it.cluster.master_config.data_dir)
            await it.cluster.start_master()
            # Numbers are given in another order now; every name has its own size and bytes all the same.
            await it.sh_until("stat -c %s other", "5")
            await it.sh_until("ls dir | head -1", "00")
            listed = await it.sh("for name in dir/*; do stat -c '%n %s' $name; done")
            assert listed.splitlines() == [f"{name} {len(content)}" for name, content in sorted(names.items())]
            assert await it.sh("cat small | sha256sum") == await it.sh("cat ../data/small | sha256sum")
            assert await it.sh("cat large | sha256sum") == await it.sh("cat ../data/large | sha256sum")
            # Who stands in a directory of before is told so.
            assert (await the_rest(standing)).count(b"Stale file handle") >= 1
            await standing.wait()
            # Files open by passthrough go on; in cached mode, what was confirmed, and then an error, never other bytes.
            assert await the_rest(passed) == small[5:]
            rest = await the_rest(cached)
            read, _, error = rest.partition(b"cat: ")
            assert large[5:].startswith(read) and (read == large[5:] or b"Stale file handle" in error)
        # Inode numbers of the new namespace are not those of the old one.
        assert int(await it.sh("stat -c %i small")) >> 48 == 1
