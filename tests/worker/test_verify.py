"""`cachefs verify` on a real worker, whose files are damaged behind its back."""

from __future__ import annotations

import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from cachefs.model import ROOT_INO
from cachefs.testing.cluster import TestCluster, running_cluster

CONTENTS = {str(number): bytes([number]) * (70_000 + number) for number in range(4)}
LIMIT_S = 60


@asynccontextmanager
async def scene(tmp_path: Path) -> AsyncIterator[tuple[TestCluster, dict[str, Path]]]:
    """Four cached files, and where each is on the tier. Nothing is looked at but by `verify`."""
    data = tmp_path / "data"
    data.mkdir()
    for name, content in CONTENTS.items():
        (data / name).write_bytes(content)
    with trio.fail_after(LIMIT_S):
        quiet = {"scrub_bytes_per_s": 0}
        async with running_cluster(tmp_path, data.as_uri(), worker=quiet) as cluster, cluster.client() as client:
            where = {}
            for name in CONTENTS:
                attr = await client.metadata.lookup(ROOT_INO, name)
                assert attr is not None and await client.promote(attr.ino)
                (where[name],) = [
                    each
                    for each in (tmp_path / "tier").rglob(f"*{attr.key.hex()}*")
                    if each.stat().st_size == attr.size_bytes
                ]
            yield cluster, where


async def verify(cluster: TestCluster, *arguments: str) -> tuple[int, str, str]:
    asked = [sys.executable, "-m", "cachefs", "verify", "--worker-socket", cluster.worker_config.socket, *arguments]
    done = await trio.run_process(asked, capture_stdout=True, capture_stderr=True, check=False)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def damage(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(66_000)
        file.write(b"!")


async def test_all_is_well(tmp_path: Path) -> None:
    async with scene(tmp_path) as (cluster, _):
        code, output, errors = await verify(cluster)
        assert code == 0 and output.startswith("4 of 4 blocks") and "0 damaged" in output, errors


async def test_damage_is_told_and_left(tmp_path: Path) -> None:
    async with scene(tmp_path) as (cluster, where):
        damage(where["1"])
        for _ in range(2):
            code, output, errors = await verify(cluster, "--json")
            facts = json.loads(output)
            assert code == 1 and facts["blocks"] == 4 and not facts["repaired"]
            (name,) = facts["damaged"]
            assert name in where["1"].name or where["1"].name in name
            assert f"{name}: damaged" in errors
        assert where["1"].exists()


async def test_repair_drops_what_is_damaged_and_it_is_fetched_again(tmp_path: Path) -> None:
    async with scene(tmp_path) as (cluster, where):
        damage(where["1"])
        where["2"].write_bytes(where["2"].read_bytes()[:-1])
        code, output, _ = await verify(cluster, "--repair")
        assert code == 0 and "2 damaged and dropped" in output
        code, output, _ = await verify(cluster)
        assert code == 0 and output.startswith("2 of 2 blocks")
        async with cluster.client() as client:
            for name, content in CONTENTS.items():
                pieces = [bytes(each) async for each in client.read_file(f"/{name}", 1 << 20)]
                assert b"".join(pieces) == content


async def test_without_a_worker(tmp_path: Path) -> None:
    async with scene(tmp_path) as (cluster, _):
        await cluster.stop("worker")
        code, _, errors = await verify(cluster)
        assert code == 1 and errors.startswith("Error: ") and cluster.worker_config.socket in errors
