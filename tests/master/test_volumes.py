"""Volumes: made, bounded and taken away by name, whatever is attached around them and however often it is asked."""

from __future__ import annotations

import json
import socket
import sqlite3
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
import trio.testing

from cachefs.client import Client, Volumes, open_volumes
from cachefs.master.volumes import with_credentials
from cachefs.meta import MetaStore, Volume, open_meta_store
from cachefs.model import (
    ROOT_INO,
    AuthenticationError,
    CachefsError,
    CapacityError,
    ConfigError,
    DeniedError,
    ExistsError,
    MiB,
    NotADirectory,
    NotFoundError,
    TransportError,
    UnavailableError,
    volume_id,
)
from cachefs.net import Role, Security, TcpAddress, Tokens
from cachefs.testing.cluster import TestCluster, running_cluster
from cachefs.testing.counting_s3 import running_counting_s3
from cachefs.testing.fixtures import Bucket
from cachefs.testing.hanging import hanging_directory
from cachefs.ufs import UnderStore, open_under_store
from cachefs.wire.quotas import ListQuotas, RemoveQuota, SetQuota

AT_ONCE = {"settle": "0"}
OWN = b"own" * 50_000
SECRET = "very-secret-password"


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """What a volume has as its under-store."""
    root = tmp_path / "own"
    (root / "deep").mkdir(parents=True)
    (root / "deep/file").write_bytes(OWN)
    return root


@asynccontextmanager
async def scene(
    tmp_path: Path, *at: str, security: Security | None = None, names: tuple[str, ...] = ("dir/file",)
) -> AsyncIterator[tuple[TestCluster, Client, Volumes]]:
    """With stores attached at the start, each with a file of some names."""
    told = []
    for number, path in enumerate(at):
        root = tmp_path / f"store{number}"
        for name in names:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(b"data")
        told.append((path, root.as_uri()))
    async with (
        running_cluster(
            tmp_path, "", ufs_options=AT_ONCE, master={"mounts": tuple(told)}, security=security
        ) as cluster,
        cluster.client() as client,
        open_volumes(cluster.master_address, security and security.presenting(Role.ADMIN), patience_s=10) as volumes,
    ):
        yield cluster, client, volumes


async def read(client: Client, path: str) -> bytes:
    return b"".join([bytes(part) async for part in client.read_file(path, 100_000)])


async def attached(client: Client) -> list[str]:
    return sorted(each.path for each in (await client.master_status()).mounts)


async def quotas(client: Client) -> dict[str, int]:
    return {each.path: each.limit_bytes for each in (await client.ask(ListQuotas())).quotas}


RESTARTS = pytest.mark.expect_warnings("a restart of the master may take longer than is told")


async def restart(cluster: TestCluster) -> None:
    await cluster.stop("master")
    await cluster.start_master()


# ---- one volume ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "around", [(), ("/",), ("/data",), ("/", "/more"), ("/volumes",), ("/", "/volumes"), ("/volumes/vol-other",)]
)
@RESTARTS
async def test_a_volume_is_made_read_kept_over_a_restart_and_removed_whatever_is_around(
    tmp_path: Path, own: Path, around: tuple[str, ...]
) -> None:
    async with scene(tmp_path, *around) as (cluster, client, volumes):
        # Believed to be missing, until it is there.
        assert "/" not in around or await client.metadata.lookup(ROOT_INO, "volumes") is None or "/volumes" in around
        context = {"storage": "class"}
        made = await volumes.create("pvc-1", url=own.as_uri(), options=AT_ONCE, quota_bytes=10 * MiB, context=context)
        path = f"/volumes/{volume_id('pvc-1')}"
        assert (made.id, made.name, made.path, made.url) == (volume_id("pvc-1"), "pvc-1", path, own.as_uri())
        assert (made.quota_bytes, made.used_bytes, made.context) == (10 * MiB, 0, context)
        assert await attached(client) == sorted([*around, path]) and await quotas(client) == {path: 10 * MiB}
        with trio.fail_after(60):
            while await client.metadata.lookup(ROOT_INO, "volumes") is None:
                await trio.sleep(0.01)
        assert await read(client, f"{path}/deep/file") == OWN
        assert await client.promote((await client.metadata.resolve(f"{path}/deep/file")).ino)
        with trio.fail_after(60):
            while (told := await volumes.get(made.id)).used_bytes < len(OWN):
                await trio.sleep(0.05)
        for each in around:
            assert await read(client, f"{each.rstrip('/')}/dir/file") == b"data"
        await restart(cluster)
        again = await volumes.create("pvc-1", url=own.as_uri(), options=AT_ONCE, quota_bytes=10 * MiB, context=context)
        assert again.created_s == told.created_s == made.created_s and again.path == path
        assert await read(client, f"{path}/deep/file") == OWN
        # What it takes is heard from the workers again.
        (listed,) = (await volumes.list()).volumes
        forgotten = msgspec.structs.replace(listed, used_bytes=0)
        assert forgotten == msgspec.structs.replace(await volumes.get(made.id), used_bytes=0)
        for _ in range(2):
            await volumes.delete(made.id)
        await restart(cluster)
        assert await attached(client) == sorted(around) and await quotas(client) == {}
        assert (await volumes.list()).volumes == []
        with pytest.raises(NotFoundError):
            await client.metadata.resolve(f"{path}/deep/file")
        with pytest.raises(NotFoundError, match="there is no volume"):
            await volumes.get(made.id)
        assert (own / "deep/file").read_bytes() == OWN
        for each in around:
            assert await read(client, f"{each.rstrip('/')}/dir/file") == b"data"


async def test_a_name_that_is_taken_by_another_one_says_what_differs_and_nothing_secret(
    tmp_path: Path, own: Path
) -> None:
    async with scene(tmp_path, "/") as (_, client, volumes):
        before = await volumes.create("a", url="memory://", options={"password": SECRET}, context={"key": "one"})
        for other, says in (
            ({"url": own.as_uri()}, "url is memory://, not file://"),
            ({"options": {}}, "differs: option password"),
            ({"options": {"password": "other-secret", "more": "hush-hush"}}, "option more, option password"),
            ({"quota_bytes": MiB}, "quota is 0 bytes, not 1048576 bytes"),
            ({"context": {"key": "two", "more": ""}}, "context key, context more"),
            ({"url": "", "path": "/dir", "options": {}}, "it is an under-store, not a directory"),
        ):
            asked = {"url": "memory://", "options": {"password": SECRET}, "context": {"key": "one"}, **other}
            with pytest.raises(ExistsError, match=says) as caught:
                await volumes.create("a", **asked)  # type: ignore[arg-type]
            assert not any(secret in str(caught.value) for secret in (SECRET, "other-secret", "hush-hush"))
        assert await volumes.get(before.id) == before
        made = await volumes.create("b", path="/dir/")
        assert made.path == "/dir" and made.url == ""
        with pytest.raises(ExistsError, match="path is /dir, not /"):
            await volumes.create("b", path="/")
        assert await volumes.create("b", path="//dir") == made
        assert await attached(client) == ["/", before.path]


async def test_what_will_not_do_is_refused_with_what_is_accepted_and_changes_nothing(tmp_path: Path, own: Path) -> None:
    async with scene(tmp_path, "/") as (_, client, volumes):
        for asked, error, says in (
            ({"name": ""}, ConfigError, "name: '' is not accepted; expected 1 to 1024 bytes"),
            ({"name": "x" * 1025}, ConfigError, "1 to 1024 bytes of printable text"),
            ({"name": "a\nb"}, ConfigError, "printable"),
            ({}, ConfigError, "one of the two"),
            ({"url": own.as_uri(), "path": "/dir"}, ConfigError, "one of the two"),
            ({"path": "/dir", "options": {"secret": SECRET}}, ConfigError, "options: 'secret'.*none for a directory"),
            ({"path": "dir"}, ConfigError, "path: 'dir' .*an absolute path"),
            ({"path": "/dir/../x"}, ConfigError, "an absolute path"),
            ({"path": "/nothing"}, NotFoundError, "/nothing: no such"),
            ({"path": "/dir/file"}, NotADirectory, "this is a file"),
            ({"url": "bucket"}, ConfigError, "a URL such as"),
            ({"url": "nosuch://bucket"}, ConfigError, "with a scheme of"),
            ({"url": f"s3://user:{SECRET}@bucket"}, ConfigError, "credentials and endpoint are options"),
            ({"url": own.as_uri(), "options": {"colour": SECRET}}, ConfigError, "'colour' is not accepted"),
            ({"url": f"{own.as_uri()}/nowhere"}, NotFoundError, "cannot attach"),
            ({"path": "/dir", "context": {"key": "x" * 20_000}}, ConfigError, "context: .* at most 16"),
        ):
            with pytest.raises(error, match=says) as caught:
                await volumes.create(**{"name": "x", **asked})  # type: ignore[arg-type]
            assert SECRET not in str(caught.value)
        with pytest.raises(NotFoundError, match="there is no volume 'vol-x'"):
            await volumes.set_quota("vol-x", 5)
        await volumes.delete("vol-x")
        assert await attached(client) == ["/"] and await quotas(client) == {}
        assert (await volumes.list()).volumes == []
        # None of them is in the way of one that will do, of the longest name.
        assert (await volumes.create("x", url=own.as_uri(), options=AT_ONCE)).name == "x"
        assert (await volumes.create("ä" * 512, path="/dir")).id == volume_id("ä" * 512)


@RESTARTS
async def test_a_store_that_denies_or_is_not_there_is_told_as_that_and_leaves_nothing(
    tmp_path: Path, s3_bucket: Bucket
) -> None:
    s3_bucket.put({"file": b"content"})
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        gone = {**s3_bucket.options, "endpoint_url": f"http://127.0.0.1:{nobody.getsockname()[1]}"}
        async with scene(tmp_path, "/") as (cluster, client, volumes):
            with pytest.raises(DeniedError, match=r"cannot attach .*access denied") as caught:
                await volumes.create("a", url=s3_bucket.url, options={**s3_bucket.options, "secret": SECRET})
            assert SECRET not in str(caught.value)
            with pytest.raises(UnavailableError, match="cannot attach"):
                await volumes.create("a", url=s3_bucket.url, options=gone, quota_bytes=MiB)
            for _ in range(2):
                assert await attached(client) == ["/"] and await quotas(client) == {}
                assert (await volumes.list()).volumes == []
                await restart(cluster)
            made = await volumes.create("a", url=s3_bucket.url, options=s3_bucket.options)
            assert await read(client, f"{made.path}/file") == b"content"


async def test_a_store_that_does_not_answer_keeps_no_other_volume_waiting(tmp_path: Path, own: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        options = {"endpoint_url": f"http://127.0.0.1:{silent.getsockname()[1]}", "key": "k", "secret": "s"}
        async with scene(tmp_path, "/") as (_, client, volumes), trio.open_nursery() as nursery:
            failed = False

            async def hang() -> None:
                nonlocal failed
                with pytest.raises(UnavailableError, match="cannot attach"):
                    await volumes.create("hangs", url="s3://bucket", options=options)
                failed = True

            nursery.start_soon(hang)
            # The master has asked it.
            (connection, _) = await trio.to_thread.run_sync(silent.accept)
            with connection:
                made = await volumes.create("a", url=own.as_uri(), options=AT_ONCE)
                assert await read(client, f"{made.path}/deep/file") == OWN
                await volumes.delete(made.id)
                assert not failed
                nursery.cancel_scope.cancel()
        assert not failed


@RESTARTS
async def test_names_of_the_store_around_are_never_hidden(tmp_path: Path, own: Path) -> None:
    async with scene(tmp_path, "/", names=("dir/file", "volumes/mine")) as (cluster, client, volumes):
        with pytest.raises(ConfigError, match=r"has the name /volumes, which would be hidden; attached at /volumes by"):
            await volumes.create("a", url=own.as_uri(), options=AT_ONCE)
        assert await read(client, "/volumes/mine") == b"data" and await attached(client) == ["/"]
        # As the error says.
        root = tmp_path / "store0"
        await cluster.stop("master")
        told = (("/", root.as_uri()), ("/volumes", f"{root.as_uri()}/volumes"))
        cluster.master_config = replace(cluster.master_config, mounts=told)
        await cluster.start_master()
        made = await volumes.create("a", url=own.as_uri(), options=AT_ONCE)
        assert await read(client, f"{made.path}/deep/file") == OWN
        assert await read(client, "/volumes/mine") == b"data"


async def test_what_the_store_around_gets_later_of_that_name_is_hidden_and_seen_again_after_the_last_volume(
    tmp_path: Path, own: Path
) -> None:
    async with scene(tmp_path, "/") as (_, client, volumes):
        one = await volumes.create("one", url=own.as_uri(), options=AT_ONCE)
        two = await volumes.create("two", url=own.as_uri(), options=AT_ONCE)
        (tmp_path / "store0/volumes").mkdir()
        (tmp_path / "store0/volumes/mine").write_bytes(b"mine")
        await client.refresh("/", recursive=True)
        with pytest.raises(NotFoundError):
            await client.metadata.resolve("/volumes/mine")
        await volumes.delete(one.id)
        assert await read(client, f"{two.path}/deep/file") == OWN
        await volumes.delete(two.id)
        await client.refresh("/", recursive=True)
        assert await read(client, "/volumes/mine") == b"mine"
        with pytest.raises(ConfigError, match="would be hidden"):
            await volumes.create("one", url=own.as_uri(), options=AT_ONCE)


async def test_the_store_of_a_volume_goes_with_it_alone_and_what_is_around_may_go(tmp_path: Path, own: Path) -> None:
    async with scene(tmp_path, "/", "/more") as (_, client, volumes):
        made = await volumes.create("a", url=own.as_uri(), options=AT_ONCE)
        with pytest.raises(ConfigError, match=f"cachefs volume remove {made.id}"):
            await client.remove_store(made.path)
        await client.remove_store("/more")
        with pytest.raises(ConfigError, match="nothing is attached at"):
            await client.add_store(made.path, own.as_uri(), AT_ONCE)
        await client.add_store(f"{made.path}/inner", own.as_uri(), AT_ONCE)
        with pytest.raises(ConfigError, match=f"remove {made.path}/inner first"):
            await volumes.delete(made.id)
        assert (await volumes.get(made.id)).path == made.path
        await client.remove_store(f"{made.path}/inner")
        await client.remove_store("/")
        assert await attached(client) == [made.path] and await read(client, f"{made.path}/deep/file") == OWN
        # The last one, too.
        await volumes.delete(made.id)
        assert await attached(client) == []


async def test_no_object_is_touched_and_removing_asks_the_store_nothing(tmp_path: Path, s3_bucket: Bucket) -> None:
    s3_bucket.put({"a/file": b"content", "b/file": b"content"})
    before = s3_bucket.contents()
    with running_counting_s3(s3_bucket.options["endpoint_url"]) as counting:
        options = {**s3_bucket.options, "endpoint_url": counting.endpoint}
        async with scene(tmp_path, "/") as (_, client, volumes):
            made = await volumes.create("a", url=f"{s3_bucket.url}/a", options=options, quota_bytes=MiB)
            await volumes.create("dir", path=f"{made.path}")
            assert await read(client, f"{made.path}/file") == b"content"
            with trio.fail_after(60):
                while counting.under_way:
                    await trio.sleep(0.01)
            asked = counting.requests()
            assert asked.keys() <= {"GET", "HEAD"}
            await volumes.set_quota(made.id, 2 * MiB)
            for name in ("dir", "a", "a"):
                await volumes.delete(volume_id(name))
            assert counting.requests() == asked
        assert counting.requests().keys() <= {"GET", "HEAD"}
    assert s3_bucket.contents() == before


@RESTARTS
async def test_secrets_are_in_the_database_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture, own: Path) -> None:
    caplog.set_level("DEBUG")
    async with scene(tmp_path, "/") as (cluster, client, volumes):
        options = {"password": SECRET}
        told = [await volumes.create("a", url="memory://", options=options) for _ in range(2)]
        await restart(cluster)
        shown = [told, await volumes.list(), await volumes.get(told[0].id), await volumes.set_quota(told[0].id, MiB)]
        shown += [await client.master_status(), await volumes.delete(told[0].id)]
        assert SECRET not in repr(shown) + caplog.text
    files = list((tmp_path / "master").iterdir())
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}


async def test_who_may_do_what(tmp_path: Path, own: Path) -> None:
    security = Security(Tokens({role: f"{role}-".ljust(40, "x") for role in Role}))
    async with scene(tmp_path, "/", security=security) as (cluster, client, volumes):
        made = await volumes.create("a", path="/dir", quota_bytes=MiB)
        async with open_volumes(cluster.master_address, security.presenting(Role.CLIENT)) as of_client:
            assert await of_client.get(made.id) == made and (await of_client.list()).volumes == [made]
            for ask in (
                lambda: of_client.create("b", path="/dir"),
                lambda: of_client.delete(made.id),
                lambda: of_client.set_quota(made.id, 1),
                lambda: of_client.renew(made.id, {"key": "k"}),
            ):
                with pytest.raises(AuthenticationError):
                    await ask()
        assert (await volumes.list()).volumes == [made] and await quotas(client) == {"/dir": MiB}


# ---- quotas --------------------------------------------------------------------------------------------------------


async def test_volumes_of_one_directory_have_the_largest_quota_of_them(tmp_path: Path) -> None:
    async with scene(tmp_path, "/") as (_, client, volumes):
        small = await volumes.create("small", path="/dir", quota_bytes=1 * MiB)
        large = await volumes.create("large", path="/dir", quota_bytes=3 * MiB)
        none = await volumes.create("none", path="/dir")
        assert await quotas(client) == {"/dir": 3 * MiB}
        assert [(await volumes.get(each.id)).quota_bytes for each in (small, large, none)] == [1 * MiB, 3 * MiB, 0]
        assert (await volumes.set_quota(small.id, 5 * MiB)).quota_bytes == 5 * MiB
        assert await quotas(client) == {"/dir": 5 * MiB}
        await volumes.delete(small.id)
        assert await quotas(client) == {"/dir": 3 * MiB}
        await volumes.delete(none.id)
        assert await quotas(client) == {"/dir": 3 * MiB}
        assert (await volumes.set_quota(large.id, 0)).quota_bytes == 0
        assert await quotas(client) == {}
        await volumes.set_quota(large.id, 2 * MiB)
        assert await quotas(client) == {"/dir": 2 * MiB}
        await volumes.delete(large.id)
        assert await quotas(client) == {}


@RESTARTS
async def test_a_quota_that_was_set_by_hand_stays_as_it_is(tmp_path: Path) -> None:
    async with scene(tmp_path, "/") as (cluster, client, volumes):
        await client.ask(SetQuota("/dir", 7 * MiB))
        made = await volumes.create("a", path="/dir", quota_bytes=MiB)
        await restart(cluster)
        assert (await volumes.set_quota(made.id, 2 * MiB)).quota_bytes == 2 * MiB
        assert await quotas(client) == {"/dir": 7 * MiB}
        await volumes.delete(made.id)
        assert await quotas(client) == {"/dir": 7 * MiB}
        # One of a volume that was removed by hand is back when the volume is given one, and no error when it goes.
        await client.ask(RemoveQuota("/dir"))
        made = await volumes.create("a", path="/dir", quota_bytes=MiB)
        await client.ask(RemoveQuota("/dir"))
        await volumes.set_quota(made.id, 3 * MiB)
        assert await quotas(client) == {"/dir": 3 * MiB}
        await client.ask(RemoveQuota("/dir"))
        await volumes.delete(made.id)
        assert await quotas(client) == {} and (await volumes.list()).volumes == []


async def test_a_quota_below_what_is_pinned_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    async with scene(tmp_path, "/") as (_, client, volumes):
        await client.metadata.resolve("/dir/file")
        await client.pin(["/dir"])
        with pytest.raises(CapacityError, match="are pinned there"):
            await volumes.create("a", path="/dir", quota_bytes=1)
        assert (await volumes.list()).volumes == []
        made = await volumes.create("a", path="/dir", quota_bytes=MiB)
        with pytest.raises(CapacityError, match="are pinned there"):
            await volumes.set_quota(made.id, 1)
        assert (await volumes.get(made.id)).quota_bytes == MiB and await quotas(client) == {"/dir": MiB}


# ---- many ----------------------------------------------------------------------------------------------------------


async def test_volumes_are_listed_in_portions_by_id(tmp_path: Path) -> None:
    async with scene(tmp_path, "/") as (_, _, volumes):
        large = {"key": "x" * 16_000}
        made = [await volumes.create(f"pvc-{number}", path="/dir", context=large) for number in range(40)]
        ids = sorted(each.id for each in made)
        found: list[str] = []
        after, parts = "", 0
        while True:
            part = await volumes.list(after, 7)
            assert len(part.volumes) <= 7
            found += [each.id for each in part.volumes]
            parts += 1
            if not part.next:
                break
            after = part.next
        assert found == ids and parts == 6
        # One that was removed is a place to go on from; and no answer is larger than what one may be.
        await volumes.delete(ids[6])
        assert (await volumes.list(ids[6], 1)).volumes[0].id == ids[7]
        everything = await volumes.list()
        assert 20 < len(everything.volumes) < 39 and everything.next == everything.volumes[-1].id
        rest = await volumes.list(everything.next)
        assert len(everything.volumes) + len(rest.volumes) == 39 and rest.next == ""


async def test_the_same_at_the_same_time_is_one_and_others_at_the_same_time_are_refused(
    tmp_path: Path, own: Path
) -> None:
    async with scene(tmp_path, "/") as (_, client, volumes):
        found = []
        refused = []

        async def create(quota_bytes: int) -> None:
            try:
                found.append(await volumes.create("a", url=own.as_uri(), options=AT_ONCE, quota_bytes=quota_bytes))
            except ExistsError as error:
                refused.append(error)

        async with trio.open_nursery() as nursery:
            for number in range(16):
                nursery.start_soon(create, MiB * (1 + number % 2))
        assert len(found) == len(refused) == 8 and len({each.quota_bytes for each in found}) == 1
        assert len(await attached(client)) == 2
        assert list((await quotas(client)).values()) == [found[0].quota_bytes]
        async with trio.open_nursery() as nursery:
            for _ in range(8):
                nursery.start_soon(volumes.delete, found[0].id)
        assert await attached(client) == ["/"] and await quotas(client) == {}


@RESTARTS
async def test_many_volumes_at_once(tmp_path: Path, own: Path) -> None:
    async with scene(tmp_path, "/") as (cluster, client, volumes):

        async def make(number: int) -> None:
            made = await volumes.create(f"{number}", url=own.as_uri(), options=AT_ONCE, quota_bytes=MiB + number)
            if number % 3 == 0:
                await volumes.delete(made.id)

        for _ in range(2):
            async with trio.open_nursery() as nursery:
                for number in range(24):
                    nursery.start_soon(make, number)
            left = sorted(f"/volumes/{volume_id(str(number))}" for number in range(24) if number % 3)
            assert await attached(client) == ["/", *left] and sorted(await quotas(client)) == left
            await restart(cluster)
        text = cluster.monitors["master"].text().decode()
        assert f"cachefs_volumes{{}} {len(left)}" in text or f"cachefs_volumes {len(left)}.0" in text


async def test_an_asker_that_leaves_finds_it_done_or_not_when_it_asks_again(tmp_path: Path, own: Path) -> None:
    async with scene(tmp_path, "/") as (_, client, volumes):
        for number in range(30):
            with trio.move_on_after(number * 0.0005):
                await volumes.create("a", url=own.as_uri(), options=AT_ONCE, quota_bytes=MiB)
            if number % 3:
                made = await volumes.create("a", url=own.as_uri(), options=AT_ONCE, quota_bytes=MiB)
                assert await attached(client) == ["/", made.path] and await quotas(client) == {made.path: MiB}
                assert await read(client, f"{made.path}/deep/file") == OWN
            with trio.move_on_after((30 - number) * 0.0005):
                await volumes.delete(volume_id("a"))
            await volumes.delete(volume_id("a"))
            assert await attached(client) == ["/"] and await quotas(client) == {}


async def test_what_an_asker_that_left_has_set_counts_for_who_comes_next(tmp_path: Path) -> None:
    async with scene(tmp_path, "/") as (_, client, volumes):
        for number in range(40):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(partial(volumes.create, "large", path="/dir", quota_bytes=3 * MiB))
                await trio.sleep(number * 0.0002)
                nursery.cancel_scope.cancel()
            await volumes.create("small", path="/dir", quota_bytes=MiB)
            largest = max(each.quota_bytes for each in (await volumes.list()).volumes)
            assert await quotas(client) == {"/dir": largest}
            for name in ("large", "small"):
                await volumes.delete(volume_id(name))
            assert await quotas(client) == {}


@RESTARTS
async def test_a_volume_whose_store_was_displaced_is_repaired_by_the_same_call(tmp_path: Path, own: Path) -> None:
    async with scene(tmp_path, "/") as (cluster, client, volumes):
        made = await volumes.create("a", url=own.as_uri(), options=AT_ONCE, quota_bytes=MiB)
        told = cluster.master_config.mounts
        for mounts in ((*told, (made.path, (tmp_path / "store0").as_uri())), told):
            await cluster.stop("master")
            cluster.master_config = replace(cluster.master_config, mounts=mounts)
            await cluster.start_master()
        assert await attached(client) == ["/"]
        assert await volumes.create("a", url=own.as_uri(), options=AT_ONCE, quota_bytes=MiB) == made
        assert await read(client, f"{made.path}/deep/file") == OWN
        await volumes.delete(made.id)
        assert await attached(client) == ["/"] and await quotas(client) == {}


async def test_a_volume_that_another_one_is_in_is_removed_after_it(tmp_path: Path, own: Path) -> None:
    async with scene(tmp_path, "/") as (_, client, volumes):
        outer = await volumes.create("outer", url=own.as_uri(), options=AT_ONCE)
        inner = await volumes.create("inner", path=f"{outer.path}/deep", quota_bytes=MiB)
        with pytest.raises(ConfigError, match=f"remove {inner.id}"):
            await volumes.delete(outer.id)
        assert await read(client, f"{inner.path}/file") == OWN and await quotas(client) == {inner.path: MiB}
        await volumes.delete(inner.id)
        await volumes.delete(outer.id)
        assert await attached(client) == ["/"] and await quotas(client) == {}


class FullDisk:
    """Of the database: what is made of `MetaStore.NAME` fails while `is_full`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        self.is_full = True
        written = getattr(MetaStore, name)

        def write(*arguments: Any) -> Any:
            if self.is_full:
                raise sqlite3.OperationalError("database or disk is full")
            return written(*arguments)

        monkeypatch.setattr(MetaStore, name, write)


@pytest.mark.expect_warnings("a master that cannot write is worth an error")
async def test_a_volume_that_could_not_be_removed_is_there_and_removed_whole_when_it_is_asked_again(
    tmp_path: Path, own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with scene(tmp_path, "/") as (cluster, client, volumes):
        made = await volumes.create("a", url=own.as_uri(), options=AT_ONCE, quota_bytes=MiB)
        disk = FullDisk(monkeypatch, "remove_mount")
        for _ in range(2):
            with pytest.raises(CachefsError):
                await volumes.delete(made.id)
            assert await attached(client) == ["/", made.path] and await quotas(client) == {made.path: MiB}
        assert await read(client, f"{made.path}/deep/file") == OWN
        disk.is_full = False
        await volumes.delete(made.id)
        assert await attached(client) == ["/"] and await quotas(client) == {}
        await restart(cluster)
        assert await attached(client) == ["/"]


@pytest.mark.expect_warnings("a master that cannot write is worth an error")
async def test_a_volume_that_could_not_be_made_leaves_no_store_open(
    tmp_path: Path, own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_now = 0

    @asynccontextmanager
    async def counted(url: str, options: Mapping[str, str]) -> AsyncIterator[UnderStore]:
        nonlocal open_now
        async with open_under_store(url, options) as store:
            open_now += 1
            try:
                yield store
            finally:
                open_now -= 1

    monkeypatch.setattr("cachefs.master.mounted.open_under_store", counted)
    async with scene(tmp_path, "/") as (_, client, volumes):
        disk = FullDisk(monkeypatch, "add_mount")
        for _ in range(3):
            with pytest.raises(CachefsError):
                await volumes.create("a", url=own.as_uri(), options=AT_ONCE)
        with trio.fail_after(60):
            while open_now > 1:
                await trio.sleep(0.01)
        assert await attached(client) == ["/"] and open_now == 1
        disk.is_full = False
        made = await volumes.create("a", url=own.as_uri(), options=AT_ONCE)
        assert open_now == 2
        await volumes.delete(made.id)
        with trio.fail_after(60):
            while open_now > 1:
                await trio.sleep(0.01)
        assert open_now == 1


async def test_more_stores_than_workers_can_be_told_of_are_refused(
    tmp_path: Path, own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cachefs.master.attaching.MOST_TOLD_BYTES", 1000)
    async with scene(tmp_path, "/") as (_, client, volumes):
        made = 0
        with pytest.raises(CapacityError, match=r"under-stores are attached; with this one.*can be told to workers"):
            for made in range(10):
                await volumes.create(f"{made}", url=own.as_uri(), options=AT_ONCE)
        assert len(await attached(client)) == 1 + made > 2 and len((await volumes.list()).volumes) == made


@pytest.mark.expect_warnings("that stores are away is told")
async def test_stores_that_are_away_do_not_hold_up_a_start_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cachefs.master.attaching.FIRST_CONTACT_S", 4.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        options = {"endpoint_url": f"http://127.0.0.1:{silent.getsockname()[1]}", "key": "k", "secret": "s"}
        with open_meta_store(str(tmp_path / "master")) as meta:
            meta.attach([])
            for number in range(10):
                meta.add_mount(f"/volumes/{number}", f"s3://{number}", f"s3://{number}", options)
        began = trio.current_time()
        async with scene(tmp_path, "/") as (_, client, _):
            assert 3.9 < trio.current_time() - began < 38  # ten of them would be 40
            assert len(await attached(client)) == 11


@pytest.mark.expect_warnings("a store that hangs is told by the master and the worker")
async def test_a_file_server_that_hangs_holds_up_neither_a_start_nor_others(
    tmp_path: Path, own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cachefs.worker.stores._OPEN_S", 2.0)
    for name, seconds in (("_OPEN_S", 2.0), ("_MARGIN_S", 0.1), ("FIRST_CONTACT_S", 2.0)):
        monkeypatch.setattr(f"cachefs.master.attaching.{name}", seconds)
    with hanging_directory(tmp_path / "hanging") as hanging:
        with open_meta_store(str(tmp_path / "master")) as meta:
            meta.attach([])
            meta.add_mount("/volumes/hangs", hanging.as_uri(), hanging.as_uri(), AT_ONCE)
        with trio.fail_after(60):
            async with scene(tmp_path, "/") as (_, client, volumes):
                assert await attached(client) == ["/", "/volumes/hangs"]
                async with trio.open_nursery() as nursery:

                    async def refused() -> None:
                        with pytest.raises(UnavailableError, match="no answer within"):
                            await volumes.create("hangs too", url=hanging.as_uri(), options=AT_ONCE)

                    nursery.start_soon(refused)
                    made = await volumes.create("a", url=own.as_uri(), options=AT_ONCE)
                    assert await read(client, f"{made.path}/deep/file") == OWN
                await volumes.delete(made.id)
        async with open_under_store(own.as_uri(), AT_ONCE) as store:
            own.rename(tmp_path / "elsewhere")
            own.symlink_to(hanging)
            with trio.move_on_after(0.2) as scope:
                await store.stat("")
            assert scope.cancelled_caught


@RESTARTS
async def test_a_master_that_restarts_is_waited_for_and_one_that_is_gone_is_not_for_ever(tmp_path: Path) -> None:
    async with scene(tmp_path, "/") as (cluster, _, volumes):
        await cluster.stop("master")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(volumes.create, "a")
            nursery.cancel_scope.cancel()
        made = []

        async def create() -> None:
            made.append(await volumes.create("a", path="/dir"))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(create)
            await trio.testing.wait_all_tasks_blocked(0.05)
            await cluster.start_master()
        assert made[0].path == "/dir"
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        async with open_volumes(TcpAddress(*nobody.getsockname()), patience_s=0.2) as volumes:
            with pytest.raises(TransportError):
                await volumes.get("vol-x")


# ---- renewed credentials -------------------------------------------------------------------------------------------


@RESTARTS
async def test_renewed_credentials_are_put_in_place_and_read_with_by_who_had_the_revoked_ones(
    tmp_path: Path, s3_bucket: Bucket
) -> None:
    s3_bucket.put({"before": OWN, "after": OWN[::-1]})
    with running_counting_s3(s3_bucket.server.endpoint) as proxy:
        first = {**s3_bucket.options, "endpoint_url": proxy.endpoint}
        renewed = {**s3_bucket.server.new_ufs_options, "endpoint_url": proxy.endpoint}
        async with scene(tmp_path, "/") as (cluster, client, volumes):
            made = await volumes.create("a", url=s3_bucket.url, options=first, quota_bytes=10 * MiB)
            assert await read(client, f"{made.path}/before") == OWN
            # The same is nothing new, and who does not ask for it does not get it.
            assert await volumes.create(
                "a", url=s3_bucket.url, options=first, quota_bytes=10 * MiB, replaces_options=True
            )
            with pytest.raises(ExistsError, match="option key, option secret"):
                await volumes.create("a", url=s3_bucket.url, options=renewed, quota_bytes=10 * MiB)
            proxy.revoked = {first["key"]}
            info = await volumes.create(
                "a", url=s3_bucket.url, options=renewed, quota_bytes=10 * MiB, replaces_options=True
            )
            assert (info.id, info.path, info.created_s) == (made.id, made.path, made.created_s)
            with trio.fail_after(60):
                # The worker holds the old ones until it is refused.
                assert await read(client, f"{made.path}/after") == OWN[::-1]
            assert await quotas(client) == {made.path: 10 * MiB}
            await restart(cluster)
            assert await read(client, f"{made.path}/before") == OWN
            s3_bucket.put({"later": b"later"})
            await client.refresh(made.path)
            assert await read(client, f"{made.path}/later") == b"later"
            again = await volumes.create("a", url=s3_bucket.url, options=renewed, quota_bytes=10 * MiB)
            assert again.created_s == made.created_s


@RESTARTS
async def test_wrong_new_credentials_are_refused_and_the_old_ones_stay_in_force(
    tmp_path: Path, s3_bucket: Bucket
) -> None:
    s3_bucket.put({"file": OWN})
    with running_counting_s3(s3_bucket.server.endpoint) as proxy:
        options = {**s3_bucket.options, "endpoint_url": proxy.endpoint}
        wrong = {**options, "key": "revoked", "secret": SECRET}
        elsewhere = {**options, "endpoint_url": s3_bucket.server.endpoint}
        proxy.revoked = {"revoked"}
        async with scene(tmp_path, "/") as (cluster, client, volumes):
            made = await volumes.create("a", url=s3_bucket.url, options=options)
            for other, error, says in (
                (wrong, DeniedError, "cannot attach"),
                (elsewhere, ExistsError, "with these options it is"),
                ({**options, "colour": SECRET}, ConfigError, "'colour' is not accepted"),
            ):
                with pytest.raises(error, match=says) as caught:
                    await volumes.create("a", url=s3_bucket.url, options=other, replaces_options=True)
                assert SECRET not in str(caught.value)
            with pytest.raises(ExistsError, match="quota is"):
                await volumes.create("a", url=s3_bucket.url, options=wrong, quota_bytes=1, replaces_options=True)
            assert await read(client, f"{made.path}/file") == OWN
            await restart(cluster)
            assert await volumes.create("a", url=s3_bucket.url, options=options) == await volumes.get(made.id)
            s3_bucket.put({"later": b"later"})
            await client.refresh(made.path)
            assert await read(client, f"{made.path}/later") == b"later"


@RESTARTS
async def test_other_credentials_of_a_volume_are_put_in_place_by_its_id_and_nothing_else_of_it_changes(
    tmp_path: Path, s3_bucket: Bucket
) -> None:
    s3_bucket.put({"before": OWN, "after": OWN[::-1]})
    with running_counting_s3(s3_bucket.server.endpoint) as proxy:
        options = {**s3_bucket.options, "endpoint_url": proxy.endpoint}
        renewed = {name: s3_bucket.server.new_ufs_options[name] for name in ("key", "secret")}
        async with scene(tmp_path, "/") as (cluster, client, volumes):
            directory = await volumes.create("directory", path="/dir")
            made = await volumes.create("a", url=s3_bucket.url, options=options, quota_bytes=10 * MiB)
            assert await read(client, f"{made.path}/before") == OWN
            proxy.revoked = {options["key"], "revoked"}
            for of_id, other, error, says in (
                (made.id, {"key": "revoked", "secret": SECRET}, DeniedError, "cannot attach"),
                (made.id, {**renewed, "endpoint_url": s3_bucket.server.endpoint}, ExistsError, "option endpoint_url;"),
                (made.id, {**renewed, "colour": SECRET}, ExistsError, "option colour;"),
                (made.id, {**renewed, "monkey": SECRET}, ConfigError, "'monkey' is not accepted"),
                (directory.id, renewed, ConfigError, "an under-store of its own"),
                ("vol-x", renewed, NotFoundError, "vol-x"),
            ):
                with pytest.raises(error, match=says) as caught:
                    await volumes.renew(of_id, other)
                assert SECRET not in str(caught.value)
            assert options_in_database(cluster, made.id) == options
            info = await volumes.renew(made.id, {**renewed, "endpoint_url": proxy.endpoint})
            assert (info.id, info.path, info.created_s) == (made.id, made.path, made.created_s)
            with trio.fail_after(30):
                assert await read(client, f"{made.path}/after") == OWN[::-1]
            assert await quotas(client) == {made.path: 10 * MiB}
            # The same again asks no store, which may be away.
            before = proxy.requests()
            assert (await volumes.renew(made.id, renewed)).id == (await volumes.renew(made.id, {})).id == made.id
            assert proxy.requests() == before
            assert options_in_database(cluster, made.id) == {**options, **renewed}


def options_in_database(cluster: TestCluster, of_id: str) -> dict[str, str]:
    with closing(sqlite3.connect(f"file:{cluster.master_config.data_dir}/namespace.db?mode=ro", uri=True)) as db:
        (text,) = db.execute("SELECT options FROM volumes WHERE volume_id = ?", (of_id,)).fetchone()
    found: dict[str, str] = json.loads(text)
    return found


def test_a_token_of_a_session_goes_with_the_key_that_it_is_of() -> None:
    volume = Volume("vol-1", "a", "/volumes/vol-1", "s3://b", {"key": "1", "secret": "1", "token": "1"}, 0, False, {})
    for given, becomes in (
        ({"key": "2", "secret": "2"}, {"key": "2", "secret": "2"}),
        ({"key": "2", "secret": "2", "token": "2"}, {"key": "2", "secret": "2", "token": "2"}),
        ({"token": "2"}, {"key": "1", "secret": "1", "token": "2"}),
        ({}, volume.options),
    ):
        assert with_credentials(volume, given) == becomes
