"""file:// under the contract, and what only directories have."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from cachefs.model import ConfigError, ContentChangedError, DeniedError, NotFoundError, ObjectInfo
from cachefs.testing.understore_contract import UnderStoreContract, list_all, names
from cachefs.ufs import UnderStore, open_under_store
from cachefs.ufs.local import LocalStore
from cachefs.ufs.settle import Settling


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
    """Read at once, or each of its tests would wait for two seconds."""

    @pytest.fixture
    async def ufs(self, behind: Directory) -> AsyncIterator[UnderStore]:
        async with open_under_store(behind.root.as_uri(), {"settle": "0"}) as ufs:
            yield ufs


class TestYoungFiles:
    """What is younger than 2 s may change once more without its ctime telling. trio's time jumps over every sleep here,
    and the clock that file times are compared with goes with it."""

    @pytest.fixture
    def anyio_backend(self) -> tuple[str, dict[str, object]]:
        return "trio", {"clock": MockClock(autojump_threshold=0)}

    @staticmethod
    def store(behind: Directory, age_s: float, **settings: float) -> LocalStore:
        """To which "file" is of that age now."""
        began, ctime_ns = trio.current_time(), os.stat(behind.root / "file").st_ctime_ns

        def now_ns() -> int:
            return ctime_ns + round((age_s + trio.current_time() - began) * 1e9)

        return LocalStore(str(behind.root), Settling(now_ns=now_ns, **settings))

    @pytest.mark.parametrize(
        ("age_s", "waits_s"),
        [(3600.0, 0.0), (2.0, 0.0), (1.5, 0.5), (0.0, 2.0), (-3600.0, 2.0)],
    )
    async def test_a_read_waits_until_the_file_is_two_seconds_old(
        self, behind: Directory, age_s: float, waits_s: float
    ) -> None:
        """An age below zero: the clock of the file server is ahead of ours. The wait is once, not for each range."""
        behind.put({"file": b"content"})
        store = self.store(behind, age_s)
        info = await store.stat("file")
        began = trio.current_time()
        for _ in range(2):
            assert bytes(await store.read_range(info, 0, 7)) == b"content"
            assert trio.current_time() - began == pytest.approx(waits_s, abs=1e-6)

    async def test_the_wait_can_be_cancelled(self, behind: Directory) -> None:
        behind.put({"file": b"content"})
        store = self.store(behind, 0.0)
        info = await store.stat("file")
        with trio.move_on_after(0.5) as scope:
            await store.read_range(info, 0, 7)
        assert scope.cancelled_caught

    async def test_what_changed_already_is_told_without_waiting(self, behind: Directory) -> None:
        behind.put({"file": b"content"})
        store = self.store(behind, 0.0)
        info = await store.stat("file")
        behind.put({"file": b"other, longer"})
        began = trio.current_time()
        with pytest.raises(ContentChangedError):
            await store.read_range(info, 0, 7)
        assert trio.current_time() == began

    async def test_settle_says_how_long(self, behind: Directory) -> None:
        behind.put({"file": b"content"})
        store = self.store(behind, 0.0, settled_s=0.5)
        began = trio.current_time()
        await store.read_range(await store.stat("file"), 0, 7)
        assert trio.current_time() - began == pytest.approx(0.5, abs=1e-6)


@pytest.fixture
def coarse(tmp_path: Path) -> Iterator[Directory]:
    """A file system whose clock ticks once a second: ext2 with small inodes."""
    if os.geteuid() != 0 or shutil.which("mkfs.ext2") is None:
        pytest.skip("mounting a file system needs root and mkfs.ext2")
    image, root = tmp_path / "image", tmp_path / "coarse"
    root.mkdir()
    with image.open("wb") as file:
        file.truncate(2 << 20)
    subprocess.run(["mkfs.ext2", "-q", "-I", "128", image], check=True, stderr=subprocess.DEVNULL)
    subprocess.run(["mount", "-o", "loop", image, root], check=True)
    yield Directory(root)
    subprocess.run(["umount", root], check=True)


async def test_two_versions_with_one_ctime_are_never_mixed(coarse: Directory) -> None:
    """The file is rewritten in place between two reads, in the same second and with the same size."""
    async with open_under_store(coarse.root.as_uri(), {}) as ufs:
        while True:
            coarse.put({"file": b"a" * 1000})
            info = await ufs.stat("file")
            halves: list[bytes] = []

            async def read(info: ObjectInfo = info, halves: list[bytes] = halves) -> None:
                halves.append(bytes(await ufs.read_range(info, 0, 500)))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(read)
                with trio.move_on_after(0.1):
                    while not halves:
                        await trio.sleep(0.01)
                with (coarse.root / "file").open("r+b") as file:
                    file.write(b"b" * 1000)
                if await ufs.stat("file") == info:
                    break
                nursery.cancel_scope.cancel()  # the clock ticked meanwhile: again
        halves.append(bytes(await ufs.read_range(info, 500, 500)))
        assert b"".join(halves) == b"b" * 1000


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


@pytest.mark.parametrize(
    "url", ["file://host/path", "file://relative", "file:///x?y", "nosuch://host/x", "/path", "s3:x"]
)
async def test_wrong_urls(url: str) -> None:
    with pytest.raises(ConfigError, match="URL"):
        async with open_under_store(url, {}):
            pass


@pytest.mark.parametrize("options", [{"key": "secret"}, {"settle": "5"}, {"settle": "soon"}])
async def test_wrong_options(options: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="--ufs-option"):
        async with open_under_store("file:///", options):
            pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
async def test_what_may_not_be_read_is_denied(ufs: UnderStore, behind: Directory) -> None:
    behind.put({"file": b"x"})
    info = await ufs.stat("file")
    (behind.root / "file").chmod(0)
    with pytest.raises(DeniedError):
        await ufs.read_range(info, 0, 1)
