"""A real mount of a real cluster while the namespace changes under it. Whoever reads is another process."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from cachefs.client import ClientConfig, Timeouts
from cachefs.fuse import ChosenMode, Driver, Mount, MountConfig, OperationsConfig, find_mount, kernel, probe, run_mount
from cachefs.fusewire import Opcode
from cachefs.model import ROOT_INO, Attr, Ino
from cachefs.net import Hello, open_background, open_peer
from cachefs.testing.cluster import PAGE, TestCluster, running_cluster
from cachefs.testing.processes import mountpoint_below
from cachefs.testing.relay import Relay, running_relay
from cachefs.wire.cluster import RegisterWorker
from cachefs.wire.messages import GetCluster, Lookup, Refresh, ReportChanged, ResolvePath

pytestmark = pytest.mark.skipif(not probe().can_mount, reason="needs root and /dev/fuse")

LIMIT_S = 30.0


class Scene:
    def __init__(self, cluster: TestCluster, relay: Relay, data: Path, mountpoint: Path) -> None:
        self.cluster = cluster
        self.relay = relay
        self.data = data
        self.mountpoint = mountpoint
        self.mounting = trio.CancelScope()
        self.unmounted = trio.Event()

    async def find(self, path: str) -> Attr:
        async with open_peer(self.cluster.master_address, Hello("client")) as master:
            return (await master.call(ResolvePath(path))).message.attr

    async def look_again(self, *inos: Ino) -> None:
        """Have the master find that these objects changed; nobody is told yet."""
        async with open_peer(self.cluster.master_address, Hello("worker")) as master:
            await master.call(RegisterWorker("tester", "", "", ""))
            for ino in inos:
                await master.call(ReportChanged(ino))

    async def sh(self, script: str) -> str:
        """Output of a shell that stands in the mount."""
        command = ["sh", "-c", f"cd '{self.mountpoint}' && {script}"]
        with trio.fail_after(LIMIT_S):
            done = await trio.run_process(command, capture_stdout=True, capture_stderr=True, check=False)
        return (done.stdout + done.stderr).decode().strip()

    async def sh_until(self, script: str, expected: str) -> None:
        with trio.fail_after(LIMIT_S):
            while (found := await self.sh(script)) != expected:
                await trio.sleep(0.02)
                assert trio.current_effective_deadline() > trio.current_time(), found


@asynccontextmanager
async def scene(
    tmp_path: Path,
    driver: Driver,
    files: dict[str, bytes],
    *,
    watched: bool = True,
    patience_s: float = 30.0,
    timeouts: Timeouts | None = None,
) -> AsyncIterator[Scene]:
    """Names are believed for an hour, unless the relay tells that they changed (`watched`)."""
    data = tmp_path / "data"
    for name, content in files.items():
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).write_bytes(content)
    with mountpoint_below(tmp_path) as mountpoint:
        async with (
            running_cluster(
                tmp_path, data.as_uri(), master={"sync_interval_s": 3600}, ufs_options={"settle": "0"}
            ) as cluster,
            open_peer(cluster.master_address, Hello("client")) as master,
            running_relay(cluster.master_address, (await master.call(GetCluster())).message.namespace_id) as relay,
            open_background() as nursery,
        ):
            it = Scene(cluster, relay, data, mountpoint)
            address = relay.address if watched else cluster.master_address
            config = MountConfig(
                mountpoint=str(mountpoint),
                client=ClientConfig(
                    address, cluster.worker_config.socket, patience_s=patience_s, timeouts=timeouts or Timeouts()
                ),
                operations=OperationsConfig(open_wait_bytes=PAGE) if driver is Driver.KERNEL else OperationsConfig(),
                driver=driver,
            )

            async def serve(task_status: trio.TaskStatus[None]) -> None:
                def ready(mounted: Mount, chosen: ChosenMode) -> None:
                    task_status.started()

                with it.mounting:
                    await run_mount(config, ready)
                it.unmounted.set()

            await nursery.start(serve)
            yield it


@asynccontextmanager
async def holding(it: Scene, name: str, first: int) -> AsyncIterator[trio.Process]:
    """A process that has read the first bytes of a file, and copies the rest to its output once it gets a line."""
    script = f'exec 3<"$1"; dd bs={first} count=1 iflag=fullblock <&3 2>/dev/null; read go; cat <&3 2>&1'
    process = await trio.lowlevel.open_process(
        ["sh", "-c", script, "sh", str(it.mountpoint / name)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        yield process
    finally:
        process.kill()
        await process.wait()


async def receive(process: trio.Process, count: int) -> bytes:
    assert process.stdout is not None
    data = b""
    while len(data) < count and (more := await process.stdout.receive_some()):
        data += more
    return data


async def the_rest(process: trio.Process) -> bytes:
    assert process.stdin is not None
    await process.stdin.send_all(b"go\n")
    with trio.fail_after(LIMIT_S):
        return await receive(process, 1 << 40)


@pytest.mark.expect_warnings("another namespace is worth a warning")
async def test_a_mount_survives_the_loss_of_the_masters_database(tmp_path: Path, driver: Driver) -> None:
    small, large = b"small" * 1000, b"large" * 8 * PAGE
    names = {f"dir/{number:02}": b"x" * (100 + number) for number in range(20)}
    async with scene(
        tmp_path, driver, {"small": small, "large": large, "other": b"other", **names}, watched=False
    ) as it:
        assert len((await it.sh("ls -l dir")).splitlines()) == 21
        for name in ("large", "small", "other"):
            await it.sh(f"stat {name}")
        async with holding(it, "small", 5) as passed, holding(it, "large", 5) as cached:
            assert await receive(passed, 5) == b"small" and await receive(cached, 5) == b"large"
            standing = await trio.lowlevel.open_process(
                ["sh", "-c", "read go; ls; stat -c %s 00 2>&1"],
                cwd=it.mountpoint / "dir",
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            await it.cluster.stop("master")
            shutil.rmtree(it.cluster.master_config.data_dir)
            await it.cluster.start_master()
            # The kernel answers by itself until the mount has heard of it: numbers of the new namespace then.
            await it.sh_until("echo $(($(stat -c %i small) >> 48))", "1")
            # They are given in another order now; every name has its own size and bytes all the same.
            assert await it.sh("stat -c %s other") == "5"
            assert await it.sh("ls dir | head -1") == "00"
            listed = await it.sh("for name in dir/*; do stat -c '%n %s' $name; done")
            assert listed.splitlines() == [f"{name} {len(content)}" for name, content in sorted(names.items())]
            assert await it.sh("cat small | sha256sum") == await it.sh("cat ../data/small | sha256sum")
            assert await it.sh("cat large | sha256sum") == await it.sh("cat ../data/large | sha256sum")
            # Who stands in a directory of before is told so.
            assert (await the_rest(standing)).count(b"Stale file handle") >= 1
            await standing.wait()
            # Files open by passthrough go on; in cached mode, what was confirmed, and then an error, never other bytes.
            assert await the_rest(passed) == small[5:]
            rest = await the_rest(cached)
            read, _, error = rest.partition(b"cat: ")
            assert large[5:].startswith(read) and (read == large[5:] or b"Stale file handle" in error)


@pytest.fixture(params=["as this kernel can", "before Linux 6.16"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, driver: Driver) -> None:
    if request.param == "before Linux 6.16":
        monkeypatch.setattr(kernel, "INC_EPOCH_MINOR", 1000)
        if driver is Driver.PYFUSE3:
            monkeypatch.setattr("cachefs.fuse.pyfuse3_driver.INC_EPOCH_KERNEL", (1000, 0))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("everything", [False, True])
async def test_a_change_is_seen_long_before_names_expire(tmp_path: Path, driver: Driver, everything: bool) -> None:
    async with scene(tmp_path, driver, {"dir/file": b"old", "dir/gone": b"x", "dir/other": b"y"}) as it:
        before = await it.sh("stat -c %s dir/file dir/gone dir/other; cat dir/file; echo; ls dir")
        assert before.split() == ["3", "1", "1", "old", "file", "gone", "other"]
        assert "No such file" in await it.sh("stat dir/new")
        (it.data / "dir/file").write_bytes(b"longer")
        (it.data / "dir/gone").unlink()
        (it.data / "dir/new").write_bytes(b"new!")
        directory = (await it.find("/dir")).ino
        # Nobody was told: the kernel goes on believing what it was told an hour ago, as far as it knows.
        await it.look_again((await it.find("/dir/file")).ino, (await it.find("/dir/gone")).ino)
        async with open_peer(it.cluster.master_address, Hello("client")) as peer:
            await peer.call(Refresh("/dir/new"))
        assert await it.sh("stat -c %s dir/file dir/gone") == "3\n1"
        assert "No such file" in await it.sh("stat dir/new")
        asked = len(it.relay.asked)
        if everything:
            it.relay.tell_everything()
        else:
            it.relay.tell(directory, "file", "gone", "new", "unknown")
        await it.sh_until("stat -c %s dir/file", "6")
        await it.sh_until("stat -c %s dir/new", "4")
        assert await it.sh("cat dir/file") == "longer"
        await it.sh_until("stat -c %s dir/gone 2>&1 | grep -c 'No such file'", "1")
        assert await it.sh("stat -c %s dir/other") == "1"
        if not everything:
            # What did not change was not asked for.
            assert {request.name for request in it.relay.asked[asked:] if isinstance(request, Lookup)} <= {
                "file",
                "gone",
                "new",
            }


@pytest.mark.parametrize("everything", [False, True])
async def test_who_stands_in_a_directory_that_is_asked_for_again_notices_nothing(
    tmp_path: Path, driver: Driver, everything: bool
) -> None:
    async with scene(tmp_path, driver, {"dir/sub/file": b"x"}) as it:
        standing = await trio.lowlevel.open_process(
            ["sh", "-c", "stat -c %s file; read go; /bin/pwd; stat -c %s file new 2>&1"],
            cwd=it.mountpoint / "dir/sub",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert await receive(standing, 2) == b"1\n"
        asked = len(it.relay.asked)
        if everything:
            it.relay.tell_everything()
        else:
            it.relay.tell(ROOT_INO, "dir")
            it.relay.tell((await it.find("/dir")).ino, "sub")
        with trio.fail_after(LIMIT_S):
            while len([each for each in it.relay.asked[asked:] if isinstance(each, Lookup)]) < 2:
                await it.sh("stat dir/sub")
        (it.data / "dir/sub/new").write_bytes(b"four")
        said = (await the_rest(standing)).decode().split()
        await standing.wait()
        assert said == [str(it.mountpoint / "dir/sub"), "1", "4"]


HAMMER = """
import os, random, sys
root, seed, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
import time
random.seed(seed)
end = time.monotonic() + seconds
done = 0
while time.monotonic() < end:
    what = random.randrange(10)
    if what == 0:
        assert len(os.listdir(root)) == 200
    elif what == 1:
        assert sum(1 for each in os.scandir(root) if each.stat().st_size == 5) == 200
    elif what == 2:
        assert not os.path.exists(f"{root}/missing-{random.randrange(50)}")
    elif what == 3:
        assert open(f"{root}/{random.randrange(200):03}").read() == "hello"
    else:
        assert os.stat(f"{root}/{random.randrange(200):03}").st_size == 5
    done += 1
print(done)
"""


@pytest.mark.usefixtures("kernels")
async def test_names_read_by_many_while_they_are_being_taken_back(tmp_path: Path, driver: Driver) -> None:
    """Notifications wait for locks that the kernel holds while it waits for our answers: nothing hangs or is wrong."""
    async with scene(tmp_path, driver, {f"dir/{number:03}": b"hello" for number in range(200)}) as it:
        directory = (await it.find("/dir")).ino
        outputs: list[bytes] = []

        async def hammer(seed: int) -> None:
            command = ["python3", "-c", HAMMER, str(it.mountpoint / "dir"), str(seed), "1"]
            outputs.append((await trio.run_process(command, capture_stdout=True)).stdout)

        told = 0
        with trio.fail_after(LIMIT_S):
            async with trio.open_nursery() as nursery:
                for seed in range(8):
                    nursery.start_soon(hammer, seed)
                for number in itertools.count():
                    if len(outputs) == 8:
                        break
                    it.relay.tell(directory, *(f"{(number * 7 + each) % 200:03}" for each in range(20)))
                    it.relay.tell(directory, f"missing-{number % 50}")
                    it.relay.tell(ROOT_INO, "dir")
                    if number % 50 == 0:
                        it.relay.tell_everything()
                    told += 22
                    await trio.sleep(0.01)
        assert told and all(int(output) > 0 for output in outputs)
        assert await it.sh("ls dir | wc -l") == "200"


def notifier_waits() -> bool:
    """Whether its thread is in an uninterruptible wait of the kernel."""
    thread = next((each for each in threading.enumerate() if each.name == "fuse notify"), None)
    return thread is not None and " D " in Path(f"/proc/self/task/{thread.native_id}/stat").read_text()


@pytest.mark.expect_warnings("it is unmounted while somebody waits")
async def test_a_notification_that_hangs_holds_up_nobody_and_the_mount_ends(tmp_path: Path, driver: Driver) -> None:
    files = {"dir/known": b"x", "dir/file": b"x", "other/file": b"12345"}
    async with scene(tmp_path, driver, files, patience_s=600) as it:
        assert await it.sh("stat -c %s dir/known other/file") == "1\n5"
        directory = (await it.find("/dir")).ino
        it.relay.held = Lookup
        stuck = await trio.lowlevel.open_process(
            ["stat", str(it.mountpoint / "dir/file")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        with trio.fail_after(LIMIT_S):
            await it.relay.holding.wait()
        # The kernel holds the directory's lock for the look-up that is not answered, and the notification waits for it.
        it.relay.held = None
        it.relay.tell(directory, "known")
        with trio.fail_after(LIMIT_S):
            while not notifier_waits():
                await trio.sleep(0.01)
        assert await it.sh("cat other/file; stat -c %s other/file") == "12345" + "5"
        assert notifier_waits()
        it.mounting.cancel()
        with trio.fail_after(LIMIT_S):
            await it.unmounted.wait()
            await stuck.wait()
        assert find_mount(it.mountpoint) is None


async def test_a_directory_that_was_listed_is_not_asked_for_again_until_something_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions: list[kernel.KernelSession] = []
    made = kernel.KernelSession.__init__

    def make(self: kernel.KernelSession, *arguments: object, **named: object) -> None:
        made(self, *arguments, **named)  # type: ignore[arg-type]
        sessions.append(self)

    monkeypatch.setattr(kernel.KernelSession, "__init__", make)
    files = {f"dir/{number:03}": b"x" * number for number in range(300)}
    async with scene(tmp_path, Driver.KERNEL, files, watched=False) as it:
        asked = sessions[0].requests

        def listings() -> int:
            return asked[Opcode.READDIR] + asked[Opcode.READDIRPLUS]

        async def sizes() -> list[str]:
            return (await it.sh("ls -l dir | awk 'NR > 1 {print $5, $9}'")).splitlines()

        expected = [f"{number} {number:03}" for number in range(300)]
        assert await sizes() == expected
        before, looked_up = listings(), asked[Opcode.LOOKUP]
        for _ in range(3):
            assert await sizes() == expected
        assert listings() == before and asked[Opcode.LOOKUP] <= looked_up + 1
        # New, gone and changed: told by the master, in the listing at once.
        (it.data / "dir/new").write_bytes(b"new")
        (it.data / "dir/000").unlink()
        (it.data / "dir/001").write_bytes(b"longer")
        async with open_peer(it.cluster.master_address, Hello("client")) as master:
            await master.call(Refresh("/dir"))
        now = ["6 001", *expected[2:], "3 new"]
        await it.sh_until("ls -l dir | awk 'NR > 1 {print $5, $9}'", "\n".join(now))
        before = listings()
        assert await sizes() == now and listings() == before


async def test_a_listing_is_not_kept_longer_than_names_are_believed(tmp_path: Path, driver: Driver) -> None:
    # The relay tells nothing of what changes.
    async with scene(tmp_path, driver, {"dir/a": b"1"}, timeouts=Timeouts(3600.0, 0.0, 0.0)) as it:
        assert await it.sh("ls dir") == "a"
        (it.data / "dir/b").write_bytes(b"2")
        async with open_peer(it.cluster.master_address, Hello("client")) as master:
            await master.call(Refresh("/dir"))
        assert await it.sh("ls dir") == "a\nb"
