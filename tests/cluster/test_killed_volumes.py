"""A real master that is killed between and during calls about volumes: each is there as a whole, or not at all."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import trio

from cachefs.client import Client, Volumes, open_volumes
from cachefs.model import KiB, MiB, volume_id
from cachefs.net import TcpAddress
from cachefs.testing.real_cluster import RealCluster, real_cluster
from cachefs.wire.quotas import ListQuotas

NAMES = [f"pvc-{number}" for number in range(12)]
CONTENT = b"content" * 1000


def of_volume(path: Path, name: str) -> dict[str, object]:
    """What every second is: an under-store, or a directory."""
    number = NAMES.index(name)
    if number % 2:
        return {"url": path.as_uri(), "options": {"settle": "0"}, "quota_bytes": MiB + number}
    return {"path": "/dir", "quota_bytes": MiB + number}


async def check_whole(client: Client, volumes: Volumes, made: set[str], gone: set[str]) -> set[str]:
    """The names of those that are there. `made` must be, `gone` must not."""
    listed = {each.name: each for each in (await volumes.list()).volumes}
    assert made <= listed.keys() and not gone & listed.keys()
    own = {each.path: each.quota_bytes for each in listed.values() if each.url}
    assert {each.path for each in (await client.master_status()).mounts} == {"/", *own}
    bound = {each.path: each.limit_bytes for each in (await client.ask(ListQuotas())).quotas}
    shared = [each.quota_bytes for each in listed.values() if not each.url]
    assert bound == {**own, **({"/dir": max(shared)} if shared else {})}
    for path in own:
        assert b"".join([bytes(part) async for part in client.read_file(f"{path}/file", 64 * KiB)]) == CONTENT
    return set(listed)


@pytest.mark.expect_warnings("a restart of the master may take longer than is told")
async def test_killed_between_and_during_calls_it_is_repaired_by_the_same_call(tmp_path: Path) -> None:
    for name in ("data/dir/file", "own/file"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(CONTENT)
    chance = random.Random("volumes")
    async with (
        real_cluster(tmp_path, (tmp_path / "data").as_uri(), workers=["w"], ufs_options={"settle": "0"}) as cluster,
        cluster.client("w") as client,
        open_volumes(TcpAddress("127.0.0.1", cluster.port), patience_s=60) as volumes,
    ):
        known: set[str] = set()
        interrupted = 0
        with trio.fail_after(240):
            for round_ in range(6):
                during = round_ != 0
                wanted = {name: chance.random() < 0.6 for name in NAMES}
                answered: set[str] = set()

                async def ask(name: str, make: bool, answered: set[str] = answered) -> None:
                    if make:
                        await volumes.create(name, **of_volume(tmp_path / "own", name))  # type: ignore[arg-type]
                    else:
                        await volumes.delete(volume_id(name))
                    answered.add(name)

                async with trio.open_nursery() as nursery:
                    for name, make in wanted.items():
                        nursery.start_soon(ask, name, make)
                    if during:
                        # Some are answered, others under way: all of them go on after the restart, as the same call.
                        some = chance.randrange(len(NAMES) // 2)
                        while len(answered) < some:
                            await trio.sleep(0.001)
                        interrupted += len(answered) < len(NAMES)
                        await kill_and_start(cluster)
                known = await check_whole(
                    client,
                    volumes,
                    {name for name, make in wanted.items() if make},
                    {name for name, make in wanted.items() if not make},
                )
                await kill_and_start(cluster)
                assert await check_whole(client, volumes, known, set()) == known
            assert interrupted >= 3
        assert (tmp_path / "own/file").read_bytes() == CONTENT


@pytest.mark.expect_warnings("the master is away for a moment")
async def test_killed_while_it_is_asked_and_not_asked_again_it_has_made_it_or_not(tmp_path: Path) -> None:
    for name in ("data/dir/file", "own/file"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(CONTENT)
    async with (
        real_cluster(tmp_path, (tmp_path / "data").as_uri(), workers=["w"], ufs_options={"settle": "0"}) as cluster,
        cluster.client("w", patience_s=60.0) as client,
        open_volumes(TcpAddress("127.0.0.1", cluster.port), patience_s=60) as volumes,
    ):
        with trio.fail_after(240):
            for round_ in range(5):
                # Of someone who gives up when the connection is lost.
                async with (
                    open_volumes(TcpAddress("127.0.0.1", cluster.port), patience_s=0) as hasty,
                    trio.open_nursery() as nursery,
                ):
                    made: set[str] = set()

                    async def ask(name: str, hasty: Volumes = hasty, made: set[str] = made) -> None:
                        await hasty.create(name, **of_volume(tmp_path / "own", name))  # type: ignore[arg-type]
                        made.add(name)

                    for name in NAMES:
                        nursery.start_soon(ask, name)
                    while len(made) < round_:
                        await trio.sleep(0.001)
                    nursery.cancel_scope.cancel()
                    process = cluster.processes["master"].process
                    process.kill()
                await cluster.kill("master")
                await cluster.start_master()
                left = await check_whole(client, volumes, made, set())
                for name in left:
                    await volumes.delete(volume_id(name))
                assert await check_whole(client, volumes, set(), set(NAMES)) == set()


async def kill_and_start(cluster: RealCluster) -> None:
    await cluster.kill("master")
    await cluster.start_master()
