"""`cachefs volume`, asked of a cluster in this process: what it shows, removes and refuses."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from click.testing import CliRunner, Result

from cachefs.cli.main import main
from cachefs.client import Client, Volumes, open_volumes
from cachefs.fuse import probe
from cachefs.model import MiB, volume_id
from cachefs.net import parse_address
from cachefs.testing.cluster import TestCluster, running_cluster
from cachefs.testing.processes import mountpoint_below, running
from cachefs.wire import volumes as messages

AT_ONCE = {"settle": "0"}
SECRET = "very-secret-password"


@asynccontextmanager
async def scene(tmp_path: Path) -> AsyncIterator[tuple[TestCluster, Client, Volumes]]:
    for name in ("data/dir/file", "own/file"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(b"content")
    async with (
        running_cluster(tmp_path, (tmp_path / "data").as_uri(), ufs_options=AT_ONCE) as cluster,
        cluster.client() as client,
        open_volumes(cluster.master_address) as volumes,
    ):
        yield cluster, client, volumes


async def cachefs(cluster: TestCluster, *arguments: str) -> Result:
    command = [*arguments, "--master", str(cluster.master_address)]
    done = await trio.to_thread.run_sync(lambda: CliRunner().invoke(main, command))
    assert SECRET not in done.output
    return done


async def facts(cluster: TestCluster, *arguments: str) -> Any:
    done = await cachefs(cluster, *arguments, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


async def test_volumes_are_listed_shown_and_removed(tmp_path: Path) -> None:
    async with scene(tmp_path) as (cluster, client, volumes):
        assert await facts(cluster, "volume", "list") == []
        own = (tmp_path / "own").as_uri()
        one = await volumes.create(
            "pvc-1", url=own, options=AT_ONCE, quota_bytes=2 * MiB, context={"namespace": "team"}
        )
        two = await volumes.create("pvc-2", path="/dir")
        hush = await volumes.create("pvc-3", url="memory://", options={"password": SECRET})
        listed = await facts(cluster, "volume", "list")
        assert [each["id"] for each in listed] == sorted(each.id for each in (one, two, hush))
        text = (await cachefs(cluster, "volume", "list")).stdout
        for part in (one.id, "pvc-1", one.path, own, "2.0 MiB", "pvc-2", "/dir", "none"):
            assert part in text
        for name in (one.id, "pvc-1"):
            shown = await facts(cluster, "volume", "show", name)
            assert (shown["id"], shown["quota_bytes"], shown["context"]) == (one.id, 2 * MiB, {"namespace": "team"})
        text = (await cachefs(cluster, "volume", "show", "pvc-1")).stdout
        assert "quota: 2.0 MiB, 0 B used" in text and "context namespace: team" in text
        assert "under-store: none of its own" in (await cachefs(cluster, "volume", "show", two.id)).stdout
        assert "memory://" in (await cachefs(cluster, "volume", "show", hush.id)).stdout

        dry = await facts(cluster, "volume", "remove", "pvc-1", "--dry-run")
        assert (dry["id"], dry["dry_run"]) == (one.id, True) and len(await facts(cluster, "volume", "list")) == 3
        done = await cachefs(cluster, "volume", "remove", "pvc-2", "--dry-run")
        assert f"{two.id} (pvc-2, /dir, a directory of the namespace) would be removed" in done.stdout
        done = await cachefs(cluster, "volume", "remove", one.id, "--yes")
        assert done.exit_code == 0 and "is removed; no object is touched" in done.stdout
        assert (await facts(cluster, "volume", "remove", "pvc-2", "--yes"))["dry_run"] is False
        assert [each["name"] for each in await facts(cluster, "volume", "list")] == ["pvc-3"]
        assert {each.path for each in (await client.master_status()).mounts} == {"/", hush.path}
        assert (tmp_path / "own/file").read_bytes() == (tmp_path / "data/dir/file").read_bytes() == b"content"


async def test_wrong_calls_say_what_is_accepted_and_remove_nothing(tmp_path: Path) -> None:
    async with scene(tmp_path) as (cluster, _, volumes):
        made = await volumes.create("pvc-1", path="/dir")
        for arguments, says in (
            (["show", "pvc-x"], f"there is no volume '{volume_id('pvc-x')}'"),
            (["remove", "pvc-x", "--yes"], "there is no volume"),
            (["remove", "vol-1", "--dry-run"], "there is no volume"),
            (["remove", "pvc-1"], "--yes, as there is no terminal to ask at"),
        ):
            done = await cachefs(cluster, "volume", *arguments)
            assert done.exit_code == 1 and says in done.output, (arguments, done.output)
        assert (await volumes.list()).volumes == [made]


async def test_more_than_one_answer_holds_are_all_listed(tmp_path: Path) -> None:
    async with scene(tmp_path) as (cluster, _, volumes):
        for number in range(45):
            await volumes.create(f"pvc-{number}", path="/dir", context={"key": "x" * 15_000})
        assert len((await volumes.list()).volumes) < 45 < messages.MOST_LISTED
        listed = await facts(cluster, "volume", "list")
        assert len({each["id"] for each in listed}) == len(listed) == 45


@pytest.mark.skipif(not probe().can_mount, reason="needs root and /dev/fuse")
def test_a_mount_shows_a_volume_within_moments_and_no_more_when_it_is_removed(tmp_path: Path) -> None:
    for name in ("data/dir/file", "own/deep/file"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(b"content")
    path = f"volumes/{volume_id('pvc-1')}"
    with mountpoint_below(tmp_path) as mountpoint, (tmp_path / "log").open("ab") as log:
        arguments = [(tmp_path / "data").as_uri(), mountpoint, "--state-dir", tmp_path / "state"]
        arguments += ["--tier", f"ssd:{tmp_path / 'tier'}:1G", "--ufs-option", "settle=0"]
        with running("up", *arguments, stderr=log) as process:

            async def ask(make: bool) -> None:
                async with open_volumes(parse_address(process.facts["master"])) as volumes:
                    if make:
                        await volumes.create("pvc-1", url=(tmp_path / "own").as_uri(), options=AT_ONCE)
                    else:
                        await volumes.delete(volume_id("pvc-1"))

            def out(*command: str | Path) -> str:
                """By another process: ours must not wait for itself."""
                return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout

            def until(shown: bool) -> None:
                """The mount is told by the master, a moment after who asked has the answer."""
                limit = time.monotonic() + 30
                while out("ls", mountpoint).split() != (["dir", "volumes"] if shown else ["dir"]):
                    assert time.monotonic() < limit
                    time.sleep(0.02)

            for _ in range(2):
                # The kernel believes for a minute that there is no such name, and what there is.
                until(False)
                assert out("cat", mountpoint / path / "deep/file") == ""
                trio.run(ask, True)
                until(True)
                assert out("cat", mountpoint / path / "deep/file") == "content"
                assert out("ls", mountpoint / "volumes").split() == [volume_id("pvc-1")]
                trio.run(ask, False)
            until(False)
            assert (tmp_path / "own/deep/file").read_bytes() == b"content"
