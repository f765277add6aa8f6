"""file:// under the contract, and what only directories have."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import pytest

from cachefs.model import ConfigError, ContentChangedError, DeniedError, NotFoundError
from cachefs.testing.understore_contract import UnderStoreContract, list_all, names
from cachefs.ufs import UnderStore, open_under_store


class Directory:
    def __init__(self, root: Path) -> None:
        self.root = root

    def put(self, objects: Mapping[str, bytes]) -> None:
        for key, content in objects.items():
            path = self.root / key
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)

    def delete(self, *keys: str) -> None:
        for key in keys:
            (self.root / key).unlink()


@pytest.fixture
def behind(tmp_path: Path) -> Directory:
    root = tmp_path / "root with späces"
    root.mkdir()
    return Directory(root)


@pytest.fixture
async def ufs(behind: Directory) -> AsyncIterator[UnderStore]:
    async with open_under_store(behind.root.as_uri(), {}) as ufs:
        yield ufs


class TestLocal(UnderStoreContract):
    pass


async def test_what_is_no_file_is_hidden_and_counted(ufs: UnderStore, behind: Directory) -> None:
    behind.put({"file": b"x", "dir/x": b"y"})
    os.mkfifo(behind.root / "pipe")
    (behind.root / "dangling").symlink_to("nowhere")
    (behind.root / "loop").symlink_to("loop")
    (behind.root / "link").symlink_to("file")
    (behind.root / "dirlink").symlink_to("dir")
    (Path(os.fsdecode(os.fsencode(behind.root) + b"/\xff"))).write_bytes(b"")
    assert names(await list_all(ufs, "")) == ["dir/", "dirlink/", "file", "link"]
    assert ufs.hidden_keys == 4
    with pytest.raises(NotFoundError):
        await ufs.stat("pipe")


async def test_a_file_written_in_place_is_noticed(ufs: UnderStore, behind: Directory) -> None:
    behind.put({"file": b"before"})
    info = await ufs.stat("file")
    stamp = os.stat(behind.root / "file").st_mtime_ns
    with (behind.root / "file").open("r+b") as file:
        file.write(b"after!")
    os.utime(behind.root / "file", ns=(stamp, stamp))
    with pytest.raises(ContentChangedError):
        await ufs.read_range(info, 0, 6)


@pytest.mark.parametrize("url", ["file://host/path", "file://relative", "file:///x?y", "ftp://host/x", "/path", "s3:x"])
async def test_wrong_urls(url: str) -> None:
    with pytest.raises(ConfigError, match="URL"):
        async with open_under_store(url, {}):
            pass


async def test_there_are_no_options() -> None:
    with pytest.raises(ConfigError, match="--ufs-option"):
        async with open_under_store("file:///", {"key": "secret"}):
            pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
async def test_what_may_not_be_read_is_denied(ufs: UnderStore, behind: Directory) -> None:
    behind.put({"file": b"x"})
    info = await ufs.stat("file")
    (behind.root / "file").chmod(0)
    with pytest.raises(DeniedError):
        await ufs.read_range(info, 0, 1)
