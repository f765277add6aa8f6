"""A master that is started on a bad day of its under-store."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest
import trio

from cachefs.client import Client
from cachefs.fuse import probe
from cachefs.model import NotFoundError, UnavailableError
from cachefs.testing.cluster import TestCluster, running_cluster
from cachefs.testing.faulty_s3 import running_faulty_s3
from cachefs.testing.fixtures import Bucket
from cachefs.testing.processes import child_of, mountpoint_below, running


@pytest.mark.expect_warnings("the outage is told")
async def test_what_is_known_of_a_store_that_is_away_is_served(tmp_path: Path, s3_bucket: Bucket) -> None:
    content = b"content" * 1000
    s3_bucket.put({"dir/file": content})
    with trio.fail_after(60):
        with running_faulty_s3(s3_bucket.server.endpoint) as store:
            options = s3_bucket.options | {"endpoint_url": store.endpoint}
            async with (
                running_cluster(tmp_path, s3_bucket.url, ufs_options=options) as cluster,
                cluster.client() as client,
            ):
                attr = await client.metadata.resolve("/dir/file")
                assert await client.promote(attr.ino)
        options |= {"connect_timeout": "0.5", "deadline": "1"}
        async with running_cluster(tmp_path, s3_bucket.url, ufs_options=options) as cluster, cluster.client() as client:
            assert (await client.metadata.resolve("/dir/file")).ino == attr.ino
            assert b"".join([bytes(part) async for part in client.read_file("/dir/file", 100_000)]) == content
            with pytest.raises(UnavailableError):
                await client.metadata.resolve("/dir/another")


async def test_a_bucket_that_is_gone_is_told_even_if_it_is_known(tmp_path: Path, s3_bucket: Bucket) -> None:
    s3_bucket.client.create_bucket(Bucket="going")
    async with running_cluster(tmp_path, "s3://going", ufs_options=s3_bucket.options):
        pass
    s3_bucket.client.delete_bucket(Bucket="going")
    with pytest.raises(NotFoundError, match="going"):
        async with running_cluster(tmp_path, "s3://going", ufs_options=s3_bucket.options):
            pass


def made(directory: Path) -> Path:
    directory.mkdir()
    return directory


async def test_a_file_is_no_under_store(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    with pytest.raises(NotFoundError, match=r"cannot mount .*/file is a file; expected a directory"):
        async with running_cluster(tmp_path, (tmp_path / "file").as_uri()):
            pass


async def test_a_prefix_below_which_nothing_is_is_told_once(
    tmp_path: Path, s3_bucket: Bucket, caplog: pytest.LogCaptureFixture
) -> None:
    """It is no error: there may be something later."""
    s3_bucket.put({"train/file": b"content"})
    said = "nothing is there yet; is it the right URL?"
    with caplog.at_level("INFO"):
        url = f"{s3_bucket.url.rstrip('/')}/trian"
        async with (
            running_cluster(made(tmp_path / "a"), url, ufs_options=s3_bucket.options) as cluster,
            cluster.client() as client,
        ):
            await client.refresh("/")
            told = [each.getMessage() for each in caplog.records if said in each.getMessage()]
            assert [each.endswith("/trian") for each in told] == [True]
        caplog.clear()
        async with running_cluster(made(tmp_path / "b"), s3_bucket.url, ufs_options=s3_bucket.options):
            assert said not in caplog.text


async def test_a_store_that_was_never_mounted_must_answer(tmp_path: Path, s3_bucket: Bucket) -> None:
    with running_faulty_s3(s3_bucket.server.endpoint) as store:
        options = s3_bucket.options | {"endpoint_url": store.endpoint, "connect_timeout": "0.5", "deadline": "1"}
    with pytest.raises(UnavailableError, match="cannot mount"):
        async with running_cluster(tmp_path, s3_bucket.url, ufs_options=options):
            pass


# ---- a file system of this machine that hangs, and answers later ---------------------------------------------------


class FileServer:
    """A real mount of ours, whose server is stopped now and then."""

    def __init__(self, root: Path, pid: int) -> None:
        self.root = root
        self._pid = pid

    @contextmanager
    def hanging(self) -> Iterator[None]:
        os.kill(self._pid, signal.SIGSTOP)
        try:
            yield
        finally:
            self.go_on()

    def go_on(self) -> None:
        os.kill(self._pid, signal.SIGCONT)


@asynccontextmanager
async def file_server(directory: Path, files: dict[str, bytes]) -> AsyncIterator[FileServer]:
    """Of which the kernel believes nothing for longer than it is asked for."""
    source = directory / "source"
    for name, content in files.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(content)
    with mountpoint_below(directory) as mountpoint:
        flags = ["--attr-timeout", "0", "--entry-timeout", "0", "--hung-after", "10m", "--sync-interval", "0"]
        own = ["--state-dir", directory / "state", "--tier", f"ssd:{directory / 'inner'}:100M"]
        process = running("up", source.as_uri(), mountpoint, *own, *flags, "--ufs-option", "settle=0")
        started = await trio.to_thread.run_sync(process.__enter__)
        try:
            yield FileServer(mountpoint, child_of(started, "mount"))
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(process.__exit__, None, None, None)


FILES = {"dir/known": b"known" * 1000, "dir/new": b"new" * 2000}


async def read(client: Client, path: str) -> bytes:
    return b"".join([bytes(part) async for part in client.read_file(path, 100_000)])


async def open_again(client: Client, cluster: TestCluster, path: str) -> None:
    """It is served as if it had never been away, and nobody is told otherwise."""
    with trio.fail_after(30):
        while (failing := [each for each in (await client.master_status()).mounts if each.failing_s]) != []:
            assert [each.path for each in failing] == [path.rpartition("/dir")[0] or "/"]
            await trio.sleep(0.1)
        assert await read(client, f"{path}/new") == FILES["dir/new"]


@pytest.mark.skipif(not probe().can_mount, reason="needs root and /dev/fuse")
@pytest.mark.expect_warnings("a store that hangs is told by the master and the worker")
@pytest.mark.parametrize("by_hand", [False, True])
async def test_one_that_hangs_at_the_start_is_opened_once_it_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_hand: bool
) -> None:
    monkeypatch.setattr("cachefs.worker.stores._OPEN_S", 1.0)
    for name, seconds in (("_OPEN_S", 1.0), ("_MARGIN_S", 0.1), ("FIRST_CONTACT_S", 1.0)):
        monkeypatch.setattr(f"cachefs.master.attaching.{name}", seconds)
    (tmp_path / "plain").mkdir()
    with trio.fail_after(120):
        async with file_server(tmp_path, FILES) as server:
            store = server.root.as_uri()
            url, path = ((tmp_path / "plain").as_uri(), "/more/dir") if by_hand else (store, "/dir")
            outer = running_cluster(tmp_path, url, ufs_options={"settle": "0"})
            async with outer as cluster, cluster.client() as client:
                if by_hand:
                    await client.add_store("/more", store, {"settle": "0"})
                attr = await client.metadata.resolve(f"{path}/known")
                assert await client.promote(attr.ino)
                await cluster.stop("master")
                with server.hanging():
                    await cluster.start_master()
                    # What is known is served meanwhile, what is not is refused at once.
                    assert (await client.metadata.resolve(f"{path}/known")).ino == attr.ino
                    assert await read(client, f"{path}/known") == FILES["dir/known"]
                    with pytest.raises(UnavailableError, match="could not be opened"):
                        await client.metadata.resolve(f"{path}/new")
                await open_again(client, cluster, path)
                # It can be removed, as any other.
                if by_hand:
                    await client.remove_store("/more")


@pytest.mark.skipif(not probe().can_mount, reason="needs root and /dev/fuse")
@pytest.mark.expect_warnings("a store that hangs is told")
async def test_one_that_hangs_and_is_removed_meanwhile_stays_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, seconds in (("_OPEN_S", 1.0), ("_MARGIN_S", 0.1), ("FIRST_CONTACT_S", 1.0)):
        monkeypatch.setattr(f"cachefs.master.attaching.{name}", seconds)
    monkeypatch.setattr("cachefs.worker.stores._OPEN_S", 1.0)
    monkeypatch.setattr("cachefs.master.unopened._FIRST_PAUSE_S", 0.05)
    (tmp_path / "plain").mkdir()
    with trio.fail_after(120):
        async with file_server(tmp_path, FILES) as server:
            plain = (tmp_path / "plain").as_uri()
            outer = running_cluster(tmp_path, plain, ufs_options={"settle": "0"})
            async with outer as cluster, cluster.client() as client:
                await client.add_store("/more", server.root.as_uri(), {"settle": "0"})
                await cluster.stop("master")
                with server.hanging():
                    await cluster.start_master()
                    await trio.sleep(0.2)  # it is asked for by now, and hangs
                    await client.remove_store("/more")
                await trio.sleep(0.5)
                assert [each.path for each in (await client.master_status()).mounts] == ["/"]
                with pytest.raises(NotFoundError):
                    await client.metadata.resolve("/more/dir/new")


@pytest.mark.skipif(not probe().can_mount, reason="needs root and /dev/fuse")
async def test_one_that_hangs_and_was_never_mounted_must_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, seconds in (("_OPEN_S", 1.0), ("_MARGIN_S", 0.1)):
        monkeypatch.setattr(f"cachefs.master.attaching.{name}", seconds)
    with trio.fail_after(120):
        async with file_server(tmp_path, FILES) as server:
            with server.hanging(), pytest.raises(UnavailableError, match="no answer within"):
                async with running_cluster(tmp_path, server.root.as_uri(), ufs_options={"settle": "0"}):
                    pass
