"""Each setting of a mount, and what it changes: in what the kernel asks, and in what its readers see."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import sys
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio

from cachefs.client import ClientConfig, Timeouts, View
from cachefs.fuse import (
    CacheOperations,
    ChosenMode,
    Driver,
    Mount,
    MountConfig,
    MountOptions,
    OpenMode,
    Operations,
    OperationsConfig,
    SessionOptions,
    find_mount,
    max_read_limit,
    mounting,
    probe,
    run_mount,
    service,
    why_no_pyfuse3,
)
from cachefs.fusewire import InitFlag, InitOptions, Opcode
from cachefs.model import ConfigError, Ino, MiB
from cachefs.net import TcpAddress, open_background
from cachefs.store import TierConfig, running_boot_id
from cachefs.testing.cluster import PAGE, TestCluster, running_cluster
from cachefs.testing.disks import overlay
from cachefs.testing.processes import mountpoint_below

pytestmark = pytest.mark.skipif(not probe().can_mount, reason="needs root and /dev/fuse")

LIMIT_S = 30.0
LARGE = random.Random(1).randbytes(12 * PAGE + 17)
SMALL = random.Random(2).randbytes(PAGE // 2)


class Scene:
    def __init__(self, cluster: TestCluster, mountpoint: Path) -> None:
        self.cluster = cluster
        self.mountpoint = mountpoint
        self.chosen: ChosenMode
        self.mounted: Mount
        self.session: Any
        self.reads: list[int] = []
        """Bytes asked for by each READ."""

    @property
    def asked(self) -> Counter[int]:
        return self.session.requests

    async def sh(self, script: str) -> str:
        """Output of a shell that stands in the mount."""
        command = ["sh", "-c", f"cd '{self.mountpoint}' && {script}"]
        with trio.fail_after(LIMIT_S):
            done = await trio.run_process(command, capture_stdout=True, capture_stderr=True, check=False)
        return (done.stdout + done.stderr).decode().strip()

    async def read(self, name: str) -> bytes:
        with trio.fail_after(LIMIT_S):
            return (await trio.run_process(["cat", str(self.mountpoint / name)], capture_stdout=True)).stdout

    def promoted(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """Inodes that the mount, from now on, waits for to be local."""
        asked: list[int] = []
        promote = View.promote

        async def noted(view: View, ino: Ino, **how: Any) -> bool:
            asked.append(ino)
            return await promote(view, ino, **how)

        monkeypatch.setattr(View, "promote", noted)
        return asked

    async def drop_pages(self, *names: str) -> None:
        """What the kernel has of these files in its page cache."""
        for name in names:
            assert await self.sh(f"dd if={name} iflag=nocache count=0 status=none") == ""


@asynccontextmanager
async def scene(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    files: dict[str, bytes] | None = None,
    operations: OperationsConfig | None = None,
    driver: Driver = Driver.KERNEL,
    options: MountOptions | None = None,
    timeouts: Timeouts | None = None,
    init: InitOptions | None = None,
    promote: str | None = None,
    threads: int = 32,
    xattr: bool = False,
    open_wait: int = PAGE,
    worker: dict[str, object] | None = None,
    elsewhere: bool = False,
) -> AsyncIterator[Scene]:
    """`elsewhere`: the mount finds its worker by itself, of whatever host."""
    operations = operations or OperationsConfig()
    data = tmp_path / "data"
    for name, content in (files or {"large": LARGE, "small": SMALL}).items():
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).write_bytes(content)
        os.utime(data / name, (1e9, 1e9))
    with mountpoint_below(tmp_path) as mountpoint:
        async with (
            running_cluster(
                tmp_path,
                data.as_uri(),
                master={"sync_interval_s": 3600},
                ufs_options={"settle": "0"},
                worker=worker,
            ) as cluster,
            open_background() as nursery,
        ):
            it = Scene(cluster, mountpoint)
            made = service._session
            read_nowait = CacheOperations.read_nowait

            def make(config: MountConfig, fd: int, operations: Operations, *others: Any) -> Any:
                it.session = made(config, fd, operations, *others)
                return it.session

            def read(self: CacheOperations, fh: int, offset: int, size: int) -> object:
                it.reads.append(size)
                return read_nowait(self, fh, offset, size)

            monkeypatch.setattr(service, "_session", make)
            monkeypatch.setattr(CacheOperations, "read_nowait", read)
            config = MountConfig(
                mountpoint=str(mountpoint),
                client=ClientConfig(
                    cluster.master_address,
                    None if elsewhere else cluster.worker_config.socket,
                    anywhere=elsewhere,
                    look_again_s=0.05,
                    timeouts=timeouts or Timeouts(),
                    promote=promote,  # type: ignore[arg-type]
                ),
                options=options or MountOptions(),
                operations=operations if driver is Driver.PYFUSE3 else replace(operations, open_wait_bytes=open_wait),
                driver=driver,
                session=SessionOptions(init or InitOptions(), xattr=xattr),
                threads=threads,
            )

            async def serve(task_status: trio.TaskStatus[None]) -> None:
                def ready(mounted: Mount, chosen: ChosenMode) -> None:
                    it.mounted, it.chosen = mounted, chosen
                    task_status.started()

                await run_mount(config, ready)

            await nursery.start(serve)
            yield it


# ---- without a worker on the host ----------------------------------------------------------------------------------


async def test_a_mount_reads_through_a_worker_of_another_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, driver: Driver
) -> None:
    monkeypatch.setattr("cachefs.worker.worker.running_boot_id", lambda: "boot-id-of-another-host")
    async with scene(tmp_path, monkeypatch, driver=driver, elsewhere=True) as it:
        assert it.chosen.mode is OpenMode.CACHED
        assert it.chosen.notes[-1].startswith("what is read comes over the network: worker worker at 127.0.0.1:")
        for _ in range(2):
            assert (await it.read("small"), await it.read("large")) == (SMALL, LARGE)
        counters = (await it.cluster.worker_status()).counters
        assert counters.served_reads > 0
        assert counters.under_store_bytes == len(SMALL) + len(LARGE)
        if driver is Driver.KERNEL:
            assert it.chosen.why == "the worker is on another host"
            # A worker comes to this host: from now on its files are handed to the kernel.
            monkeypatch.setattr("cachefs.worker.worker.running_boot_id", running_boot_id)
            mine = await it.cluster.add_worker("mine")
            with trio.fail_after(LIMIT_S):
                while not (await it.cluster.worker_status("mine")).opens.passthrough:
                    assert await it.read("small") == SMALL
            assert (await it.cluster.worker_status("mine")).tiers[0].path == mine.tiers[0].path


# ---- --open-mode ---------------------------------------------------------------------------------------------------


async def test_auto_reads_sealed_files_by_passthrough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with scene(tmp_path, monkeypatch) as it:
        assert it.chosen.mode is OpenMode.PASSTHROUGH
        assert it.chosen.why == "the kernel reads cached files by itself"
        assert await it.read("small") == SMALL
        assert it.reads == []


async def test_cached_mode_asks_for_what_the_kernel_has_not_got(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, driver: Driver
) -> None:
    async with scene(
        tmp_path, monkeypatch, driver=driver, operations=OperationsConfig(open_mode=OpenMode.CACHED)
    ) as it:
        assert (it.chosen.mode, it.chosen.why) == (OpenMode.CACHED, "as asked for")
        assert await it.read("small") == SMALL
        assert it.reads != []
        asked = len(it.reads)
        assert await it.read("small") == SMALL
        assert len(it.reads) == asked, "the kernel keeps the pages between opens"


async def test_no_open_mode_opens_nothing_and_keeps_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"large": LARGE, **{f"small/{number}": bytes([number]) * (1000 + number) for number in range(50)}}
    async with scene(tmp_path, monkeypatch, files=files, operations=OperationsConfig(open_mode=OpenMode.NO_OPEN)) as it:
        assert it.chosen.mode is OpenMode.NO_OPEN
        for _ in range(2):
            for name, content in files.items():
                assert await it.read(name) == content
        # The first one is how the kernel finds out.
        assert it.asked[Opcode.OPEN] == 1 and it.asked[Opcode.RELEASE] == 0
        reads = len(it.reads)
        assert await it.sh("cat small/* | wc -c") == str(sum(1000 + number for number in range(50)))
        assert len(it.reads) == reads
        assert it.asked[Opcode.OPEN] == 1
        # What was promoted meanwhile is read from its sealed file.
        await it.drop_pages(*files)
        for name, content in files.items():
            assert await it.read(name) == content
        assert len(it.reads) > reads


async def test_no_open_mode_gives_descriptors_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {str(number): bytes([number]) * 2000 for number in range(20)} | {"large": LARGE}

    def cached_files() -> int:
        return sum(_link(fd).startswith(f"{tmp_path / 'tier' / 'sealed'}/") for fd in os.listdir("/proc/self/fd"))

    async with scene(tmp_path, monkeypatch, files=files, operations=OperationsConfig(open_mode=OpenMode.NO_OPEN)) as it:
        most = 0
        for name, content in files.items():
            assert await it.read(name) == content
            most = max(most, cached_files())
        assert most > 0
        with trio.fail_after(LIMIT_S):
            while cached_files():
                await trio.sleep(0.05)
        await it.drop_pages("large")
        assert await it.read("large") == LARGE


def _link(fd: str) -> str:
    """What a descriptor is of; empty when it was closed meanwhile."""
    with suppress(OSError):
        return os.readlink(f"/proc/self/fd/{fd}")
    return ""


async def test_auto_where_one_tier_cannot_do_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with overlay(tmp_path / "stacked") as merged:
        tiers = (
            TierConfig("ssd", str(merged / "tier"), 64 * MiB),
            TierConfig("ssd", str(tmp_path / "plain"), 64 * MiB),
        )
        async with scene(tmp_path, monkeypatch, worker={"tiers": tiers}) as it:
            assert it.chosen.mode is OpenMode.PASSTHROUGH
            assert it.chosen.tiers == (str(tmp_path / "plain"),)
            assert f"except of {merged / 'tier'}: the file lies on a stacked file system" in it.chosen.why
            # It goes to the first tier, and is served from there all the same.
            assert await it.read("small") == SMALL
            assert it.reads != []


async def test_where_no_tier_can_do_it_auto_is_cached_and_passthrough_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with overlay(tmp_path / "stacked") as merged:
        worker: dict[str, object] = {"tiers": (TierConfig("ssd", str(merged / "tier"), 64 * MiB),)}
        async with scene(tmp_path, monkeypatch, worker=worker) as it:
            assert it.chosen.mode is OpenMode.CACHED and "stacked file system" in it.chosen.why
            assert await it.read("small") == SMALL
        with pytest.RaisesGroup(
            pytest.RaisesExc(ConfigError, match=r"open_mode.*auto or cached.*stacked"), flatten_subgroups=True
        ):
            async with scene(
                tmp_path, monkeypatch, worker=worker, operations=OperationsConfig(open_mode=OpenMode.PASSTHROUGH)
            ):
                pass
        assert find_mount(it.mountpoint) is None


async def test_a_kernel_without_passthrough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with scene(tmp_path, monkeypatch, init=InitOptions(ignored=InitFlag.PASSTHROUGH)) as it:
        assert it.chosen.mode is OpenMode.CACHED
        assert it.chosen.why.startswith("the kernel does not offer passthrough")
        assert await it.read("small") == SMALL and it.reads != []


async def test_a_kernel_without_no_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.RaisesGroup(
        pytest.RaisesExc(ConfigError, match="does not open files by itself"), flatten_subgroups=True
    ):
        async with scene(
            tmp_path,
            monkeypatch,
            operations=OperationsConfig(open_mode=OpenMode.NO_OPEN),
            init=InitOptions(passthrough=False, ignored=InitFlag.NO_OPEN_SUPPORT),
        ):
            pass


async def test_pyfuse3_reads_everything_through_us(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if (reason := why_no_pyfuse3()) is not None:
        pytest.skip(reason)
    async with scene(tmp_path, monkeypatch, driver=Driver.PYFUSE3) as it:
        assert it.chosen.mode is OpenMode.CACHED
        assert it.chosen.why == "pyfuse3 cannot hand files to the kernel: every READ comes to us"
        for name, content in (("small", SMALL), ("large", LARGE)):
            for _ in range(2):
                assert await it.read(name) == content
        assert it.reads != []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"operations": OperationsConfig(open_mode=OpenMode.PASSTHROUGH)}, "open_mode: 'passthrough'.*auto or cached"),
        ({"operations": OperationsConfig(open_mode=OpenMode.NO_OPEN)}, "open_mode: 'no-open'.*auto or cached"),
        ({"operations": OperationsConfig(open_wait_bytes=1)}, "open_wait: 1 .*default"),
        ({"session": SessionOptions(InitOptions(max_background=9))}, "max_background: 9 .*64"),
        ({"session": SessionOptions(InitOptions(ignored=InitFlag.PASSTHROUGH))}, "ignore_kernel_feature"),
        ({"options": MountOptions(max_read=max_read_limit() // 2)}, None),
    ],
)
def test_what_pyfuse3_cannot_do_is_refused(changes: dict[str, Any], said: str | None) -> None:
    def configured() -> MountConfig:
        client = ClientConfig(TcpAddress("127.0.0.1", 1), None)
        return MountConfig(mountpoint="/mnt", client=client, driver=Driver.PYFUSE3, **changes)

    if said is None:
        assert configured().driver is Driver.PYFUSE3
        return
    with pytest.raises(ConfigError, match=f"{said}.*pyfuse3"):
        configured()


@pytest.mark.usefixtures("raised_page_limit")
def test_pyfuse3_reads_a_mebibyte_at_most() -> None:
    with pytest.raises(ConfigError, match=r"max_read: 2097152.*4096 to 1048576 bytes with the driver pyfuse3"):
        MountConfig(
            mountpoint="/mnt",
            client=ClientConfig(TcpAddress("127.0.0.1", 1), None),
            options=MountOptions(max_read=2 * MiB),
            driver=Driver.PYFUSE3,
        )


# ---- --open-wait ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [OpenMode.PASSTHROUGH, OpenMode.NO_OPEN])
@pytest.mark.parametrize("open_wait", [0, len(SMALL) - 1, len(SMALL), len(LARGE)])
async def test_files_up_to_open_wait_are_local_before_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: OpenMode, open_wait: int
) -> None:
    async with scene(tmp_path, monkeypatch, operations=OperationsConfig(open_mode=mode), open_wait=open_wait) as it:
        for name, content in (("small", SMALL), ("large", LARGE)):
            asked = it.promoted(monkeypatch)
            it.reads.clear()
            assert await it.read(name) == content
            waits = len(content) <= open_wait
            assert len(asked) == waits
            # Without an open there is nothing that could wait but the first READ.
            assert (it.reads == []) == (waits and mode is OpenMode.PASSTHROUGH)


# ---- sizes and counts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_read", [4096, 64 << 10, 256 << 10])
async def test_max_read_bounds_every_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, driver: Driver, max_read: int
) -> None:
    async with scene(tmp_path, monkeypatch, driver=driver, options=MountOptions(max_read=max_read)) as it:
        assert await it.read("large") == LARGE
        assert max(it.reads) == max_read


def test_max_read_out_of_range(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    setting = tmp_path / "max_pages_limit"
    monkeypatch.setattr(mounting, "_MAX_PAGES_LIMIT", setting)
    for pages in (256, 1024):
        setting.write_text(f"{pages}\n")
        limit = pages * 4096
        for wrong in (4095, limit + 1):
            with pytest.raises(ConfigError, match=rf"max_read.*{wrong}.*4096 to {limit}"):
                MountOptions(max_read=wrong)
        assert MountOptions(max_read=limit).max_read == limit


@pytest.fixture
def raised_page_limit() -> Iterator[None]:
    """All of the machine sees it: no other test asks what the limit is. Those that raise it do so one after the other,
    or one would put back what another has raised, or raises yet.
    """
    setting = Path("/proc/sys/fs/fuse/max_pages_limit")
    if not setting.exists():
        pytest.skip("this kernel has no such setting")
    with setting.open("r+") as raised:
        fcntl.flock(raised, fcntl.LOCK_EX)
        before = setting.read_text()
        setting.write_text("1024")
        try:
            yield
        finally:
            setting.write_text(before)


@pytest.mark.usefixtures("raised_page_limit")
async def test_max_read_goes_as_far_as_the_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = random.Random(3).randbytes(9 * MiB)
    options = MountOptions(max_read=4 * MiB, read_ahead_kb=8192)
    async with scene(tmp_path, monkeypatch, files={"file": content}, options=options) as it:
        assert await it.read("file") == content
        assert MiB < max(it.reads) <= 4 * MiB


@pytest.mark.parametrize("read_ahead_kb", [0, 128, 512])
async def test_read_ahead_is_how_far_the_kernel_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, driver: Driver, read_ahead_kb: int
) -> None:
    async with scene(tmp_path, monkeypatch, driver=driver, options=MountOptions(read_ahead_kb=read_ahead_kb)) as it:
        # One byte at the start: everything else that is asked for is read ahead.
        assert await it.sh("head -c 4096 large | wc -c") == "4096"
        assert (read_ahead_kb == 0) == (sum(it.reads) <= 4096)
        assert sum(it.reads) <= max(4, read_ahead_kb) * 1024
        assert Path(f"/sys/class/bdi/{it.mounted.device}/read_ahead_kb").read_text().strip() == str(read_ahead_kb)


async def test_max_background_is_what_the_kernel_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with scene(tmp_path, monkeypatch, init=InitOptions(max_background=7)) as it:
        where = tmp_path / "fusectl"
        where.mkdir()
        script = f"mount -t fusectl none {where} && cat {where}/{it.mounted.connection}/max_background"
        assert await it.sh(f"unshare -m sh -c '{script}'") == "7"


@pytest.mark.parametrize("threads", [1, 3])
async def test_threads_are_how_many_reads_wait_for_disks_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, driver: Driver, threads: int
) -> None:
    files = {str(number): LARGE for number in range(8)}
    most = now = 0
    lock = threading.Lock()
    enough = threading.Event()
    go = threading.Event()

    def slow(fd: int, offset: int, length: int) -> bytearray:
        # A disk that answers nobody until as many wait as may.
        nonlocal most, now
        with lock:
            now += 1
            most = max(most, now)
            if now == threads:
                enough.set()
        go.wait(LIMIT_S)
        with lock:
            now -= 1
        return bytearray(os.pread(fd, length, offset))

    monkeypatch.setattr("cachefs.client.files.read_exactly", slow)
    async with scene(tmp_path, monkeypatch, driver=driver, files=files, threads=threads, init=InitOptions()) as it:
        async with trio.open_nursery() as nursery:
            for name in files:
                nursery.start_soon(it.read, name)
            with trio.fail_after(LIMIT_S):
                while not enough.is_set():
                    await trio.sleep(0.01)
                while it.asked[Opcode.READ] < len(files):
                    await trio.sleep(0.01)
            go.set()
        assert most == threads


# ---- how long what is known is believed ----------------------------------------------------------------------------

FOREVER = Timeouts(3600.0, 3600.0, 3600.0)


async def test_attributes_are_asked_for_again_after_their_timeout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, driver: Driver
) -> None:
    for attr_s, asks in ((3600.0, False), (0.0, True)):
        async with scene(tmp_path, monkeypatch, driver=driver, timeouts=replace(FOREVER, attr_s=attr_s)) as it:
            await it.sh("stat small")
            before = it.asked[Opcode.GETATTR]
            await it.sh("exec 3<small; for i in 1 2 3 4 5; do stat -L /dev/fd/3; done")
            assert (it.asked[Opcode.GETATTR] >= before + 5) == asks


async def test_names_are_asked_for_again_after_their_timeout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, driver: Driver
) -> None:
    for entry_s, asks in ((3600.0, False), (0.0, True)):
        async with scene(tmp_path, monkeypatch, driver=driver, timeouts=replace(FOREVER, entry_s=entry_s)) as it:
            await it.sh("stat small")
            before = it.asked[Opcode.LOOKUP]
            await it.sh("for i in 1 2 3 4 5; do stat small; done")
            assert (it.asked[Opcode.LOOKUP] >= before + 5) == asks


async def test_missing_names_are_asked_for_again_after_their_timeout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, driver: Driver
) -> None:
    for negative_s, asks in ((3600.0, False), (0.0, True)):
        async with scene(tmp_path, monkeypatch, driver=driver, timeouts=replace(FOREVER, negative_s=negative_s)) as it:
            await it.sh("stat missing")
            before = it.asked[Opcode.LOOKUP]
            assert "No such file" in await it.sh("for i in 1 2 3 4 5; do stat missing; done")
            assert (it.asked[Opcode.LOOKUP] >= before + 5) == asks


async def test_the_mount_itself_asks_the_master_again_after_the_timeout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for entry_s, asks in ((3600.0, False), (0.0, True)):
        directory = tmp_path / str(entry_s)
        async with (
            running_cluster(directory, _empty(directory / "data")) as cluster,
            cluster.client(timeouts=Timeouts(3600.0, entry_s, 3600.0)) as client,
        ):
            root = (await client.metadata.resolve("/")).ino
            assert await client.metadata.lookup(root, "dir") is not None
            if asks:
                with pytest.raises(trio.WouldBlock):
                    client.metadata.lookup_nowait(root, "dir")
            else:
                assert client.metadata.lookup_nowait(root, "dir") is not None


def _empty(directory: Path) -> str:
    (directory / "dir").mkdir(parents=True)
    return directory.as_uri()


@pytest.mark.parametrize("wrong", [-1.0, 366 * 86400.0])
def test_timeouts_out_of_range(wrong: float) -> None:
    for key in ("attr", "entry", "negative"):
        with pytest.raises(ConfigError, match=f"{key}_timeout.*0 to 365d"):
            Timeouts(**{f"{key}_s": wrong})


# ---- --xattr -------------------------------------------------------------------------------------------------------

XATTRS = """
import json, os, sys
found = {}
for name in sys.argv[1:]:
    found[name] = {each: os.getxattr(name, each).decode() for each in os.listxattr(name)}
    for wrong in ("user.cachefs.nothing", "security.capability"):
        try:
            os.getxattr(name, wrong)
        except OSError as error:
            found[name][wrong] = error.errno
json.dump(found, sys.stdout)
"""


async def xattrs_of(it: Scene, *names: str) -> dict[str, dict[str, str | int]]:
    command = [sys.executable, "-c", XATTRS, *names]
    done = await trio.run_process(command, capture_stdout=True, cwd=it.mountpoint)
    found: dict[str, dict[str, str | int]] = json.loads(done.stdout)
    return found


async def test_extended_attributes_tell_what_is_cached_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, driver: Driver
) -> None:
    async with scene(
        tmp_path, monkeypatch, driver=driver, files={"dir/small": SMALL, "large": LARGE}, xattr=True
    ) as it:
        before = (await xattrs_of(it, "dir/small"))["dir/small"]
        assert (before["user.cachefs.cached_bytes"], before["user.cachefs.tier"]) == ("0", "")
        assert len(str(before["user.cachefs.key"])) == 32 and before["user.cachefs.workers"] == ""
        assert before["user.cachefs.nothing"] == errno.ENODATA
        assert before["security.capability"] == errno.EOPNOTSUPP
        assert await it.read("dir/small") == SMALL
        await it.sh("head -c 10 large | wc -c")
        with trio.fail_after(LIMIT_S):
            while (after := (await xattrs_of(it, "dir/small"))["dir/small"])["user.cachefs.workers"] != "worker":
                await trio.sleep(0.05)
        assert after["user.cachefs.cached_bytes"] == str(len(SMALL))
        assert after["user.cachefs.tier"] == f"ssd:{tmp_path / 'tier'}"
        part = (await xattrs_of(it, "large"))["large"]
        assert PAGE <= int(part["user.cachefs.cached_bytes"]) <= len(LARGE)
        assert "user.cachefs.key" not in (await xattrs_of(it, "dir"))["dir"]


async def test_without_the_flag_the_kernel_asks_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, driver: Driver
) -> None:
    async with scene(tmp_path, monkeypatch, driver=driver) as it:
        for _ in range(3):
            found = await it.sh(f'{sys.executable} -c \'import os; os.getxattr("small", "user.cachefs.key")\' 2>&1')
            assert "not supported" in found
        assert it.asked[Opcode.GETXATTR] == 1


# ---- owners and promotion ------------------------------------------------------------------------------------------


async def test_owner_and_permissions_as_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, driver: Driver
) -> None:
    async with scene(tmp_path, monkeypatch, driver=driver, files={"dir/file": b"x"}) as it:
        plain = await it.sh("stat -c '%u %g %a' dir dir/file")
    async with scene(
        tmp_path,
        monkeypatch,
        driver=driver,
        files={"dir/file": b"x"},
        operations=OperationsConfig(uid=1234, gid=77, umask=0o027),
    ) as it:
        for listed in ("", "ls -lR >/dev/null;"):
            found = await it.sh(f"{listed} stat -c '%u %g %a' dir dir/file")
            modes = [int(line.split()[2], 8) & ~0o027 for line in plain.splitlines()]
            assert found.splitlines() == [f"1234 77 {mode:o}" for mode in modes]
        assert await it.sh("exec 3<dir/file; stat -L -c '%u %g' /dev/fd/3") == "1234 77"


async def test_the_mount_decides_whether_what_it_reads_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, driver: Driver
) -> None:
    async with scene(tmp_path, monkeypatch, driver=driver, promote="never") as it:
        assert await it.read("small") == SMALL and await it.read("large") == LARGE
        status = await it.cluster.worker_status()
        assert status.tiers[0].blocks == 0 and status.tiers[0].partials == 0
    # Elsewhere: files written anew are others, and in cached mode it is a READ that finds out.
    async with scene(tmp_path / "again", monkeypatch, driver=driver) as it:
        assert await it.read("small") == SMALL
        # Where no open waits for it, it is sealed a moment after it was read.
        with trio.fail_after(LIMIT_S):
            while (await it.cluster.worker_status()).tiers[0].blocks != 1:
                await trio.sleep(0.01)
