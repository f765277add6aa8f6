"""Volumes on a node, in the order in which kubelet asks and in others: with real mounts of a real cluster."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import AsyncIterator, Mapping
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

import pytest
import trio
from cachefs_csi.binding import bind
from cachefs_csi.node_volumes import InUseError, NodeVolumes, NotStagedError

from cachefs.fuse import all_mounts, find_mount, is_dead, open_mount, probe, unmount
from cachefs.model import ConfigError, ExistsError, NotFoundError
from cachefs.testing.processes import Running, child_of, kill_mount, running
from cachefs.testing.real_cluster import RealCluster, real_cluster
from cachefs.wire.mounts import MountState

pytestmark = pytest.mark.skipif(not probe().can_mount, reason="needs root and /dev/fuse")


class Processes:
    """Each mount is a real `cachefs mount`, as the service of a node runs them."""

    def __init__(self, cluster: RealCluster, stack: ExitStack) -> None:
        self._cluster = cluster
        self._stack = stack
        self.running: dict[str, Running] = {}
        self.asked: dict[str, MountState] = {}

    async def ensure(self, mount_id: str, mountpoint: str, path: str, options: Mapping[str, str] | None = None) -> None:
        self.asked[mountpoint] = MountState(mount_id, mountpoint, path, dict(options or {}), "serving")
        found = find_mount(mountpoint)
        if found is not None:
            if not await trio.to_thread.run_sync(is_dead, found):
                return
            unmount(mountpoint, lazy=True)
        os.makedirs(mountpoint, exist_ok=True)
        flags = [each for key, value in (options or {}).items() for each in (f"--{key}", value)]
        master = ("--master", f"127.0.0.1:{self._cluster.port}", "--insecure", "--path", path)
        started = running("mount", mountpoint, *master, *flags)
        self.running[mountpoint] = await trio.to_thread.run_sync(self._stack.enter_context, started)

    async def list(self) -> list[MountState]:
        return list(self.asked.values())

    async def remove(self, mountpoint: str) -> None:
        self.asked.pop(mountpoint, None)
        process = self.running.pop(mountpoint, None)
        if process is not None:
            await trio.to_thread.run_sync(process.end)
        if find_mount(mountpoint) is not None:
            unmount(mountpoint, lazy=True)


class Node:
    def __init__(self, directory: Path, mounts: Processes) -> None:
        self.mounts = mounts
        self.own = directory / "own"
        self.own.mkdir()
        self.volumes = self.plugin()
        self.staging = str(directory / "staging")
        self._directory = directory

    def plugin(self) -> NodeVolumes:
        """One that knows nothing, as after a crash."""
        return NodeVolumes(self.mounts, str(self.own))

    def target(self, name: str) -> str:
        return str(self._directory / name)

    async def stage(self) -> None:
        await self.volumes.stage("v", "/dir", {}, self.staging)

    async def publish(self, name: str) -> str:
        target = self.target(name)
        await self.volumes.publish("v", self.staging, target)
        return target


@asynccontextmanager
async def a_node(directory: Path) -> AsyncIterator[Node]:
    """Whose cluster has a file in each of two directories."""
    for name in ("dir", "other"):
        (directory / "data" / name).mkdir(parents=True)
        (directory / "data" / name / "file").write_bytes(name.encode())
    url, options = (directory / "data").as_uri(), {"settle": "0"}
    async with real_cluster(directory, url, workers=["w"], ufs_options=options) as cluster:
        with ExitStack() as stack, trio.fail_after(120):
            try:
                yield Node(directory, Processes(cluster, stack))
            finally:
                for each in reversed([each.mountpoint for each in all_mounts()]):
                    if each.startswith(str(directory)):
                        unmount(each, lazy=True)


def shown(target: str) -> bytes:
    return Path(target, "file").read_bytes()


def mounted_below(directory: Path) -> list[str]:
    return [each.mountpoint for each in all_mounts() if each.mountpoint.startswith(str(directory))]


async def test_the_sequence_of_kubelet_each_step_twice_and_by_a_new_plugin(tmp_path: Path) -> None:
    async with a_node(tmp_path) as node:
        for _ in range(2):
            await node.stage()
            node.volumes = node.plugin()
        first, second = node.target("first"), node.target("second")
        for name in ("first", "second", "first", "second"):
            assert shown(await node.publish(name)) == b"dir"
            node.volumes = node.plugin()
        assert sorted(mounted_below(tmp_path)) == sorted([node.staging, first, second])
        usage = await node.volumes.usage(first)
        assert not usage.why_abnormal and usage.total_inodes >= usage.free_inodes
        with pytest.raises(InUseError, match="first"):
            await node.volumes.unstage("v", node.staging)
        assert shown(first) == b"dir"
        for target in (first, first, second, second):
            await node.volumes.unpublish("v", target)
            node.volumes = node.plugin()
            assert not os.path.lexists(target)
        for _ in range(2):
            await node.volumes.unstage("v", node.staging)
        assert mounted_below(tmp_path) == []
        with pytest.raises(NotFoundError):
            await node.volumes.usage(first)


async def test_the_same_at_once_is_done_once(tmp_path: Path) -> None:
    async with a_node(tmp_path) as node:
        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(node.stage)
        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(node.publish, "target")
        assert sorted(mounted_below(tmp_path)) == [node.staging, node.target("target")]
        assert len(node.mounts.running) == 1


async def test_what_is_not_staged_is_not_published(tmp_path: Path) -> None:
    async with a_node(tmp_path) as node:
        with pytest.raises(NotStagedError):
            await node.publish("target")
        assert not os.path.lexists(node.target("target"))


async def test_a_mount_that_died_is_replaced_at_publish_and_for_those_who_had_it(tmp_path: Path) -> None:
    async with a_node(tmp_path) as node:
        await node.stage()
        first = await node.publish("first")
        await trio.to_thread.run_sync(kill_mount, node.mounts.running[node.staging])
        while not (await node.volumes.usage(first)).why_abnormal:
            await trio.sleep(0.01)
        assert "cannot be read" in (await node.volumes.usage(first)).why_abnormal
        second = await node.publish("second")
        assert shown(first) == shown(second) == b"dir"
        assert not (await node.volumes.usage(first)).why_abnormal
        assert sorted(mounted_below(tmp_path)) == sorted([node.staging, first, second])


async def test_a_dead_mount_is_unstaged_with_what_pods_had_of_it(tmp_path: Path) -> None:
    async with a_node(tmp_path) as node:
        await node.stage()
        first = await node.publish("first")
        await trio.to_thread.run_sync(kill_mount, node.mounts.running[node.staging])
        while not (await node.volumes.usage(first)).why_abnormal:
            await trio.sleep(0.01)
        await node.volumes.unstage("v", node.staging)
        assert mounted_below(tmp_path) == [] and not os.path.lexists(first)


async def test_one_that_hangs_is_abnormal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cachefs_csi.node_volumes.STATISTICS_S", 0.3)
    async with a_node(tmp_path) as node:
        await node.stage()
        server = child_of(node.mounts.running[node.staging], "mount")
        os.kill(server, signal.SIGSTOP)
        try:
            # However often it is looked at: in one thread, and other calls do not wait for it.
            for _ in range(4):
                with trio.fail_after(20):
                    assert "did not answer within 0.3 s" in (await node.volumes.usage(node.staging)).why_abnormal
            names = [each.name for each in threading.enumerate()]
            assert names.count("does the mount answer") == 1
        finally:
            os.kill(server, signal.SIGCONT)


async def test_a_target_of_another_volume_is_not_taken(tmp_path: Path) -> None:
    async with a_node(tmp_path) as node:
        await node.stage()
        await node.volumes.stage("w", "/other", {}, node.target("staging-w"))
        target = await node.publish("target")
        with pytest.raises(ExistsError, match="another volume"):
            await node.volumes.publish("w", node.target("staging-w"), target)
        assert shown(target) == b"dir"


async def test_a_corrupted_target_is_replaced(tmp_path: Path) -> None:
    async with a_node(tmp_path) as node:
        await node.stage()
        target = Path(node.target("target"))
        target.mkdir()
        fd, _ = open_mount(target, "dead")
        os.close(fd)
        with pytest.raises(OSError, match="not connected"):
            target.stat()
        assert shown(await node.publish("target")) == b"dir"


async def test_a_bind_mount_that_was_left_without_flags_is_made_again(tmp_path: Path) -> None:
    async with a_node(tmp_path) as node:
        await node.stage()
        target = node.target("target")
        os.mkdir(target)
        await trio.run_process(["mount", "--bind", node.staging, target])
        await trio.run_process(["mount", "-o", "remount,bind,rw,dev,suid", target])
        await node.publish("target")
        found = find_mount(target)
        assert found is not None and {"ro", "nosuid", "nodev"} <= found.options


async def test_a_volume_of_one_pod_has_its_own_mount_and_leaves_nothing(tmp_path: Path) -> None:
    async with a_node(tmp_path) as node:
        first, second = node.target("first"), node.target("second")
        for _ in range(2):
            await node.volumes.publish_alone("csi-1", "/dir", {}, first)
            node.volumes = node.plugin()
        await node.volumes.publish_alone("csi-2", "/other", {}, second)
        assert (shown(first), shown(second)) == (b"dir", b"other")
        assert len(list(node.own.iterdir())) == 2
        await trio.to_thread.run_sync(kill_mount, node.mounts.running[next(iter(node.mounts.running))])
        await node.volumes.publish_alone("csi-1", "/dir", {}, first)
        assert (shown(first), shown(second)) == (b"dir", b"other")
        for _ in range(2):
            await node.volumes.unpublish("csi-1", first)
        assert shown(second) == b"other"
        await node.volumes.unpublish("csi-2", second)
        assert mounted_below(tmp_path) == [] and list(node.own.iterdir()) == []


async def test_an_own_mount_that_a_killed_plugin_left_goes_with_the_next_unpublish(tmp_path: Path) -> None:
    async with a_node(tmp_path) as node:
        target = node.target("target")
        await node.volumes.publish_alone("csi-1", "/dir", {}, target)
        # As if it was killed between its two steps.
        unmount(target)
        os.rmdir(target)
        await node.plugin().unpublish("csi-1", target)
        assert mounted_below(tmp_path) == [] and list(node.own.iterdir()) == []


async def test_cancelled_anywhere_the_same_call_again_does_the_rest(tmp_path: Path) -> None:
    async with a_node(tmp_path) as node:
        await node.stage()
        for delay_s in (0.0, 0.001, 0.003, 0.01):
            for call in (node.publish, lambda name: node.volumes.unpublish("v", node.target(name))):
                with trio.move_on_after(delay_s):
                    await call("target")
            assert shown(await node.publish("target")) == b"dir"
            assert sorted(mounted_below(tmp_path)) == [node.staging, node.target("target")]


@pytest.mark.parametrize("path", ["", "relative", "/a/../b", "/a//b", "/nul\0", "/" + "x" * 300])
async def test_paths_that_will_not_do_are_refused(tmp_path: Path, path: str) -> None:
    volumes = NodeVolumes(Processes(None, ExitStack()), str(tmp_path))  # type: ignore[arg-type]
    for call in (
        lambda: volumes.stage("v", "/dir", {}, path),
        lambda: volumes.unstage("v", path),
        lambda: volumes.publish("v", path, "/target"),
        lambda: volumes.publish("v", str(tmp_path), path),
        lambda: volumes.publish_alone("v", "/dir", {}, path),
        lambda: volumes.unpublish("v", path),
        lambda: volumes.usage(path),
    ):
        with pytest.raises(ConfigError, match="_path"):
            await call()


async def test_links_are_refused(tmp_path: Path) -> None:
    async with a_node(tmp_path) as node:
        await node.stage()
        os.symlink(tmp_path / "own", node.target("link"))
        for call in (lambda: node.publish("link"), lambda: node.volumes.unpublish("v", node.target("link"))):
            with pytest.raises(ConfigError, match="symbolic link"):
                await call()
        os.symlink(node.staging, node.target("to-staging"))
        with pytest.raises(ConfigError, match="symbolic link"):
            await node.volumes.unstage("v", node.target("to-staging"))
        assert shown(node.staging) == b"dir"


async def test_a_mount_made_by_hand_is_told_from_a_volume(tmp_path: Path) -> None:
    """Of another kind: neither shown, nor taken away."""
    async with a_node(tmp_path) as node:
        await node.stage()
        target = node.target("target")
        os.mkdir(target)
        await trio.run_process(["mount", "-t", "tmpfs", "others", target])
        for call in (lambda: node.publish("target"), lambda: node.volumes.unpublish("v", target)):
            with pytest.raises(ConfigError, match="tmpfs"):
                await call()
        with pytest.raises(NotFoundError):
            await node.volumes.usage(target)
        assert bind(node.staging, node.target("free"))
