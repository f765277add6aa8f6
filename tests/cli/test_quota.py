"""`cachefs quota`, asked of a cluster in this process: what it takes, refuses and shows; and what others say of it."""

from __future__ import annotations

import json
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from click.testing import CliRunner, Result
from prometheus_client.parser import text_string_to_metric_families

from cachefs.cli.main import main
from cachefs.client import Client
from cachefs.testing.cluster import PAGE, TestCluster, running_cluster

FILES = {f"bound/{number}": random.Random(number).randbytes(PAGE) for number in range(6)} | {"else": b"else"}
TAKES = PAGE + 4096


@asynccontextmanager
async def scene(tmp_path: Path) -> AsyncIterator[tuple[TestCluster, Client]]:
    data = tmp_path / "data"
    for name, content in FILES.items():
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).write_bytes(content)
    settings = {"files_ahead": 0}
    async with (
        running_cluster(tmp_path, data.as_uri(), ufs_options={"settle": "0"}, worker=settings) as cluster,
        cluster.client() as client,
    ):
        yield cluster, client


async def cachefs(cluster: TestCluster, *arguments: str) -> Result:
    command = [*arguments, "--master", str(cluster.master_address)]
    return await trio.to_thread.run_sync(lambda: CliRunner().invoke(main, command))


async def facts(cluster: TestCluster, *arguments: str) -> Any:
    done = await cachefs(cluster, *arguments, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


async def test_a_quota_is_set_listed_reported_changed_and_removed(tmp_path: Path) -> None:
    async with scene(tmp_path) as (cluster, client):
        assert await facts(cluster, "quota", "list") == []
        # As a program would: the same again is no change.
        for _ in range(2):
            info = await facts(cluster, "quota", "set", "bound/", "256K")
            assert (info["path"], info["limit_bytes"], info["unconfirmed"]) == ("/bound", 256 << 10, [])
        for name in FILES:
            await client.promote((await client.metadata.resolve(f"/{name}")).ino)
        with trio.fail_after(20):
            while (listed := await facts(cluster, "quota", "list"))[0]["refused"] < 3:
                pass
        assert [(each["path"], each["used_bytes"], each["exists"]) for each in listed] == [("/bound", 3 * TAKES, True)]
        table = (await cachefs(cluster, "quota", "list")).stdout
        assert "/bound" in table and "256.0 KiB" in table and "204.0 KiB" in table and "80%" in table
        shown = (await cachefs(cluster, "report")).stdout
        assert "quotas" in shown and "204.0 KiB" in shown
        reported = await facts(cluster, "report")
        assert reported["quotas"][0]["used_bytes"] == 3 * TAKES
        assert reported["workers"][0]["status"]["counters"]["not_admitted"] >= 3
        samples = {
            (each.name, each.labels.get("path")): each.value
            for role in ("master", "worker")
            for family in text_string_to_metric_families(cluster.monitors[role].text().decode())
            for each in family.samples
        }
        assert samples["cachefs_quota_limit_bytes", "/bound"] == 256 << 10
        assert samples["cachefs_quota_used_bytes", "/bound"] == 3 * TAKES
        assert samples["cachefs_quota_refused_blocks", "/bound"] == listed[0]["refused"]
        assert samples["cachefs_quota_refused_total", None] == listed[0]["refused"]

        done = await cachefs(cluster, "quota", "set", "/bound", "100K")
        assert "/bound: at most 100.0 KiB in all caches, 204.0 KiB used" in done.stdout
        assert "104.0 KiB over it: nothing new is kept there until it is less" in done.stdout
        assert "would have no quota" in (await cachefs(cluster, "quota", "remove", "/bound", "--dry-run")).stdout
        assert (await facts(cluster, "quota", "list"))[0]["limit_bytes"] == 100 << 10
        done = await cachefs(cluster, "quota", "remove", "/bound")
        assert done.stdout == "/bound: has no quota any more; it was 100.0 KiB\n"
        assert await facts(cluster, "quota", "list") == [] and "quotas" not in (await cachefs(cluster, "report")).stdout
        for name in FILES:
            assert await client.promote((await client.metadata.resolve(f"/{name}")).ino)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("set", "/bound", "much"), "'much' is not accepted; expected a size such as 4096, 128K, 8M, 1.5G or 2TiB"),
        (("set", "/bound", "-1"), "No such option"),
        (("set", "/bound", "99999999T"), "is not accepted; expected at most 4194304.0 TiB"),
        (("set", "/bound"), "Missing argument 'SIZE'"),
        (("set",), "Missing argument 'PATH'"),
        (("set", "/nowhere", "1G"), "/nowhere: no such file or directory"),
        (("set", "/bound/0/x", "1G"), "/bound/0/x: a quota is of a directory, and something above it is none"),
        (("set", "/else", "1G"), "/else: a quota is of a directory, for all that is below it; this is a file"),
        (("set", "/../etc", "1G"), "PATH: '/../etc' is not accepted; expected an absolute path of the namespace"),
        (("remove", "/bound"), "/bound: it has no quota of its own; no directory above it has one"),
        (("remove", "/nowhere"), "/nowhere: it has no quota of its own"),
        (("frob",), "No such command 'frob'"),
    ],
)
async def test_wrong_calls_say_what_is_accepted(tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    async with scene(tmp_path) as (cluster, _):
        done = await cachefs(cluster, "quota", *arguments)
        assert done.exit_code != 0 and "Traceback" not in done.output
        assert said in " ".join(done.output.replace("│", " ").split()), done.output
        assert await facts(cluster, "quota", "list") == []


async def test_loading_and_pinning_more_than_a_quota_say_why(tmp_path: Path) -> None:
    async with scene(tmp_path) as (cluster, _):
        await facts(cluster, "quota", "set", "/bound", "256K")
        said = "/bound has a quota of 256.0 KiB; 6 files of 384.0 KiB that were to be loaded there take 408.0 KiB"
        done = await cachefs(cluster, "load", "/bound", "--spread", "--dry-run")
        assert done.exit_code == 1 and f"Error: {said} on disk. Nothing was loaded" in done.output
        job = await facts(cluster, "load", "/bound", "--spread", "--background")
        with trio.fail_after(20):
            while (job := await facts(cluster, "job", "show", str(job["job_id"])))["state"] != "failed":
                pass
        assert job["failures"] == [{"path": "load", "reason": f"{said} on disk. Nothing was loaded"}]
        done = await cachefs(cluster, "replicate", "/bound", "--replicas", "1", "--dry-run")
        assert done.exit_code == 1 and "Nothing was loaded" in done.output
