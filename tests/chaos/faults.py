"""Doing harm: what each kind of event of a plan does to a scene."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path

import trio

from cachefs.model import CachefsError
from cachefs.net import Hello, UnixAddress, open_peer
from cachefs.store.layout import SUMS_SUFFIX, TIER_FILE
from cachefs.testing.disks import broken
from cachefs.testing.faulty_s3 import Fault
from cachefs.wire.messages import Verify
from tests.chaos.history import Excuse
from tests.chaos.plan import MOUNT_SERVER_KINDS, Event
from tests.chaos.scene import LARGE, PREFIX, SMALL, Scene, size_of

_STORE: dict[str, tuple[Fault, bool]] = {
    "server-errors": ("internal-error", True),
    "slow-down": ("slow-down", True),
    "resets": ("reset", False),
    "cut-off": ("cut-off", False),
    "short-bodies": ("short-body", False),
    "wrong-etags": ("other-etag", False),
    "wrong-ranges": ("wrong-range", False),
}
"""Kind -> what the proxy does, and whether to listings and looks at names as well as to contents."""
_NEW = 8
"""Names that are not there at the start, for each of the two directories."""
_START_TRIES = 5


class Faults:
    def __init__(self, scene: Scene) -> None:
        self._scene = scene
        self.done: Counter[str] = Counter()
        """Kind -> how many events it had an effect in."""
        self.details: Counter[str] = Counter()
        """What was done, in smaller units: requests, objects, bits."""
        self._held: defaultdict[str, trio.Lock] = defaultdict(trio.Lock)
        self.failures: list[str] = []
        """Processes that could not be started again."""

    async def meet(self, event: Event) -> None:
        """Does it, when nobody else holds what it needs, and undoes what has to be undone."""
        if event.kind in _STORE:
            work: Callable[[Event], Awaitable[None]] = self._store_fault
        elif event.kind in MOUNT_SERVER_KINDS:
            work = self._kill_of_mount
        else:
            work = getattr(self, "_" + event.kind.replace("-", "_"))
        async with AsyncExitStack() as stack:
            for name in event.holds:
                await stack.enter_async_context(self._held[name])
            await work(event)

    def _did(self, event: Event, what: str = "", count: int = 1) -> None:
        if what:
            self.details[what] += count
        else:
            self.done[event.kind] += 1

    @contextmanager
    def _excusing(self, *excuses: Excuse, scope: str = "") -> Iterator[None]:
        begun = [self._scene.history.begin(excuse, time.monotonic(), scope) for excuse in excuses]
        try:
            yield
        finally:
            for each in begun:
                each.ended = time.monotonic()

    # ---- the under-store -------------------------------------------------------------------------------------------

    async def _latency(self, event: Event) -> None:
        faulty = self._scene.faulty
        faulty.delay_s = random.Random(event.seed).uniform(0.05, 0.4)
        self._did(event)
        try:
            await trio.sleep(event.lasts_s)
        finally:
            faulty.delay_s = 0.0

    async def _store_fault(self, event: Event) -> None:
        rng, faulty = random.Random(event.seed), self._scene.faulty
        fault, everything = _STORE[event.kind]
        before = len(faulty.requests)
        excuses: tuple[Excuse, ...] = ("stale",) if everything else ()
        excuses = ("etag",) if event.kind == "wrong-etags" else excuses
        with self._excusing(*excuses), trio.move_on_after(event.lasts_s):
            try:
                for method in ("GET", "HEAD") if everything else ("GET",):
                    part = "" if everything else f"/{PREFIX}/"
                    faulty.inject(fault, method=method, part=part, times=1 << 30, every=rng.choice([2, 3]))
                await trio.sleep_forever()
            finally:
                faulty.forget()
        self._did(event)
        self._did(event, "requests during faults of the store", len(faulty.requests) - before)

    async def _outage(self, event: Event) -> None:
        faulty = self._scene.faulty
        before = len(faulty.requests)
        with self._excusing("stale", "supply"):
            for method in ("GET", "HEAD"):
                faulty.inject("internal-error", method=method, times=1 << 30)
            try:
                await trio.sleep(event.lasts_s)
            finally:
                faulty.forget()
        self._did(event)
        self._did(event, "requests during outages", len(faulty.requests) - before)

    # ---- processes -------------------------------------------------------------------------------------------------

    async def _kill_master(self, event: Event) -> None:
        with self._excusing("stale"):
            await self._scene.cluster.kill("master")
            for cable in self._scene.master_cables.values():
                cable.target = None
            self._did(event)
            await trio.sleep(event.lasts_s)
            await self._again("master", self._scene.start_master)

    async def _stop_master(self, event: Event) -> None:
        with self._excusing("stale"):
            await self._stopped(event, [self._scene.cluster.processes["master"].process.pid])

    @asynccontextmanager
    async def _killed_worker(self, event: Event) -> AsyncIterator[None]:
        """It is dead within, and started again afterwards."""
        await self._scene.cluster.kill(event.target)
        self._did(event)
        try:
            yield
        finally:
            with trio.CancelScope(shield=True):
                await self._again(event.target, lambda: self._scene.start_worker(event.target))

    async def _kill_worker(self, event: Event) -> None:
        async with self._killed_worker(event):
            await trio.sleep(event.lasts_s)

    _lose_worker = _kill_worker

    async def _stop_worker(self, event: Event) -> None:
        await self._stopped(event, [self._scene.cluster.processes[event.target].process.pid])

    async def _stop_mount(self, event: Event) -> None:
        with self._excusing("stale"):
            await self._stopped(event, self._scene.answering(event.target))

    async def _kill_of_mount(self, event: Event) -> None:
        for pid in self._scene.having(MOUNT_SERVER_KINDS[event.kind], event.target):
            if event.kind == "kill-mount-keeper":
                self._scene.orphaned.add(event.target)
            with suppress(ProcessLookupError):  # one that is about to become another
                os.kill(pid, signal.SIGKILL)
            self._did(event)

    async def _stopped(self, event: Event, pids: list[int]) -> None:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
        self._did(event)
        try:
            await trio.sleep(event.lasts_s)
        finally:
            for pid in pids:
                # A watchdog may have ended it.
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    async def _again(self, name: str, start: Callable[[], Awaitable[None]]) -> None:
        for _ in range(_START_TRIES):
            try:
                await start()
                return
            except CachefsError as error:
                self.failures.append(f"{name} could not be started again: {error}")
                await trio.sleep(1)

    # ---- the network -----------------------------------------------------------------------------------------------

    async def _partition(self, event: Event) -> None:
        # Each is reached by all others through one cable: cut off are both from everybody but the master.
        a, b = (self._scene.peer_cables[name] for name in event.target.split("-"))
        with a.cut(), b.cut():
            self._did(event)
            await trio.sleep(event.lasts_s)

    async def _partition_master(self, event: Event) -> None:
        with self._scene.master_cables[event.target].cut():
            self._did(event)
            await trio.sleep(event.lasts_s)

    # ---- disks -----------------------------------------------------------------------------------------------------

    async def _disk_full(self, event: Event) -> None:
        theirs = self._scene.disks[event.target.removeprefix("disk-")] / "theirs"
        try:
            with trio.move_on_after(event.lasts_s):
                with theirs.open("wb", 0) as file:
                    while True:
                        try:
                            file.write(bytes(1 << 18))
                            self._did(event, "bytes that others filled disks with", 1 << 18)
                        except OSError:
                            await trio.sleep(0.1)
                        await trio.lowlevel.checkpoint()
            self._did(event)
        finally:
            theirs.unlink(missing_ok=True)

    async def _disk_read_only(self, event: Event) -> None:
        tier = str(self._scene.disks[event.target])
        _run("mount", "--bind", tier, tier)
        try:
            _run("mount", "-o", "remount,ro,bind", tier)
            self._did(event)
            await trio.sleep(event.lasts_s)
        finally:
            _run("umount", "-l", tier)

    async def _disk_errors(self, event: Event) -> None:
        with self._excusing("disk", scope=f"mount-{event.target}"), broken(self._scene.disks[event.target]):
            self._did(event)
            await trio.sleep(event.lasts_s)

    async def _bits_of_sealed(self, event: Event) -> None:
        """In place: in checksums, while other workers read and compare; and in data that `verify` looks at before
        anybody else does, as what is read of a page in parts is not compared.
        """
        flipped = self._flip(event, "sealed", in_place=True, sums=True)
        await trio.sleep(event.lasts_s / 2)
        with self._scene.peer_cables[event.target].cut():
            # What was asked for before is answered.
            await trio.sleep(event.lasts_s / 2)
            flipped += self._flip(event, "sealed", in_place=True)
            address = UnixAddress(str(self._scene.cluster.socket(event.target)))
            async with open_peer(address, Hello("client")) as peer, peer.stream(Verify(repair=True)) as steps:
                async for step in steps:
                    self._did(event, "damaged files found by verify", len(step.damaged))
        if flipped:
            self._did(event)

    async def _bits_of_partial(self, event: Event) -> None:
        async with self._killed_worker(event):
            self._flip(event, "partial", in_place=False, sums=random.Random(event.seed).random() < 0.3)
            await trio.sleep(event.lasts_s)

    async def _bits_at_boot(self, event: Event) -> None:
        async with self._killed_worker(event):
            self._flip(event, "sealed", in_place=False)
            file = self._scene.tiers[event.target] / TIER_FILE
            file.write_text(json.dumps({**json.loads(file.read_text()), "boot_id": "another"}))
            await trio.sleep(event.lasts_s)

    def _flip(self, event: Event, kind: str, *, in_place: bool, sums: bool = False) -> int:
        """One bit in each of up to six files. Not in place: in a copy that takes the name, so that whoever has it open
        keeps what he has, as a process that ended with the machine would have kept nothing."""
        rng, count = random.Random(event.seed), 0
        files = sorted(path for path in (self._scene.tiers[event.target] / kind).glob("*/*") if path.is_file())
        files = [path for path in files if path.name.endswith(SUMS_SUFFIX) == sums]
        for path in rng.sample(files, min(6, len(files))):
            with suppress(FileNotFoundError):
                if not in_place:
                    copy = path.with_name("copy")
                    _run("cp", "--sparse=always", "--preserve=all", str(path), str(copy))
                    copy.rename(path)
                count += _flip_a_bit(path, rng)
        self._did(event, f"bits flipped in {'checksums of ' if sums else ''}{kind} files", count)
        return count

    # ---- the bucket ------------------------------------------------------------------------------------------------

    async def _replace(self, event: Event) -> None:
        rng, history = random.Random(event.seed), self._scene.history
        names = history.existing()
        for name in rng.sample(names, min(rng.randint(2, 6), len(names))):
            same = history.versions[name][-1].size
            await self._scene.put(name, rng.choice([same, size_of(name, rng), max(5000, same // 2)]))
            self._did(event, "objects replaced")
        self._did(event)

    async def _add(self, event: Event) -> None:
        rng, history = random.Random(event.seed), self._scene.history
        names = [f"s/{n}" for n in range(SMALL + _NEW)] + [f"l/{n}" for n in range(LARGE + _NEW)]
        names = [name for name in names if not history.exists(name)]
        for name in rng.sample(names, min(rng.randint(1, 4), len(names))):
            await self._scene.put(name, size_of(name, rng))
            self._did(event, "objects added")
        self._did(event)

    async def _delete(self, event: Event) -> None:
        rng, names = random.Random(event.seed), self._scene.history.existing()
        if len(names) > SMALL // 2:
            for name in rng.sample(names, rng.randint(1, 3)):
                await self._scene.delete(name)
                self._did(event, "objects deleted")
            self._did(event)


def _flip_a_bit(path: Path, rng: random.Random) -> bool:
    """In a part that is not a hole; False if there is none."""
    fd = os.open(path, os.O_RDWR)
    try:
        size = os.fstat(fd).st_size
        try:
            start = os.lseek(fd, rng.randrange(max(1, size)), os.SEEK_DATA)
        except OSError:
            return False
        (byte,) = os.pread(fd, 1, start)
        os.pwrite(fd, bytes([byte ^ (1 << rng.randrange(8))]), start)
        return True
    finally:
        os.close(fd)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)
