"""One run: a scene, its readers, a plan, and what came of it."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import trio

from tests.chaos import leaks
from tests.chaos.faults import Faults
from tests.chaos.history import Judge
from tests.chaos.plan import KINDS, MOUNT_SERVER_KINDS, Event, plan
from tests.chaos.reader import Try
from tests.chaos.scene import REPOSITORY, STORE_DEADLINE_S, Scene, open_scene

HANG_S = 90.0
"""A call that takes longer is a hang: three times the longest wait that is documented."""
HEAL_S = 90.0
MAX_SHOWN = 20
_LEAK_WAIT_S = 60.0
_SLACK = 40
"""Descriptors that a process may have more than it had after every file was read for the first time, in calm: idle
connections come and go. A worker that had everything from others then has no connection to the store, and keeps as many
as it has needed since, for up to three minutes."""
_READERS = ("calls", "maps")


@dataclass
class Stall:
    seconds: float = 0.0
    call: str = ""
    name: str = ""
    mount: str = ""
    at_s: float = 0.0
    during: list[str] = field(default_factory=list)


@dataclass
class Outcome:
    seed: int
    seconds: float
    pace_s: float
    kinds: list[str]
    left_out: dict[str, str] = field(default_factory=dict)
    """Kind -> why."""
    survived: dict[str, int] = field(default_factory=dict)
    details: dict[str, int] = field(default_factory=dict)
    tries: dict[str, int] = field(default_factory=dict)
    calls: int = 0
    bytes_verified: int = 0
    errors: dict[str, int] = field(default_factory=dict)
    longest_stall: Stall = field(default_factory=Stall)
    healed_s: float | None = None
    peak_bytes: dict[str, int] = field(default_factory=dict)
    findings: dict[str, int] = field(default_factory=dict)
    """By kind: wrong bytes, stale, error, hang, not healed, process, leak."""
    shown: list[str] = field(default_factory=list)
    """The first of them, in words."""
    directory: str | None = None
    """Kept for whoever looks for the reason."""

    @property
    def good(self) -> bool:
        return not self.findings

    def found(self, kind: str, text: str) -> None:
        self.findings[kind] = self.findings.get(kind, 0) + 1
        if len(self.shown) < MAX_SHOWN or self.findings[kind] == 1:
            self.shown.append(f"{kind}: {text}")


class Run:
    def __init__(self, scene: Scene, outcome: Outcome, say: Callable[[str], None]) -> None:
        self._scene = scene
        self._outcome = outcome
        self._say_line = say
        self._began = time.monotonic()
        self._faults = Faults(scene)
        self._judge = Judge(scene.history, STORE_DEADLINE_S / 2)
        self._heard: dict[str, float] = {}
        self._events: list[tuple[Event, float, float | None]] = []
        """With when they began and ended."""

    async def all(self, events: list[Event]) -> None:
        await self._pass_calmly("warming up")
        await trio.sleep(1)
        before = self._scene.descriptors()
        seconds = self._outcome.seconds
        async with trio.open_nursery() as nursery:
            stop = trio.Event()
            for number, mount in enumerate(self._scene.mountpoints):
                for how in _READERS:
                    nursery.start_soon(self._read, mount, how, self._outcome.seed * 100 + number, stop)
            self._began = time.monotonic()
            async with trio.open_nursery() as meeting:
                for event in events:
                    meeting.start_soon(self._meet, event)
                meeting.start_soon(trio.sleep, seconds)
            await self._heal()
            stop.set()
        await self._leaked_descriptors(before)
        outcome, judge = self._outcome, self._judge
        outcome.survived, outcome.details = dict(self._faults.done), dict(self._faults.details)
        outcome.tries, outcome.errors = dict(judge.tries), dict(judge.errors)
        outcome.calls, outcome.bytes_verified = judge.calls, judge.data_bytes
        for failure in self._faults.failures:
            outcome.found("process", failure)
        for name, running in self._scene.cluster.processes.items():
            pids = self._scene.answering(name) if name in self._scene.mountpoints else [running.process.pid]
            outcome.peak_bytes[name] = max(map(leaks.peak_bytes, pids))

    def _say(self, text: str) -> None:
        self._say_line(f"{time.monotonic() - self._began:7.1f} s  {text}")

    def _found(self, kind: str, text: str, at: float | None = None) -> None:
        at_s = (time.monotonic() if at is None else at) - self._began
        self._outcome.found(kind, f"at {at_s:.1f} s, during {self._during(at)}: {text}")
        self._say(f"FOUND {kind}: {text}")

    def _during(self, began: float | None = None, ended: float | None = None) -> list[str]:
        """What was going on between two moments, or is."""
        now = time.monotonic()
        first, last = began or now, ended or began or now
        return [
            f"{event.kind} {event.target}"
            for event, start, end in self._events
            if start <= last and (end or now) >= first
        ]

    # ---- events ----------------------------------------------------------------------------------------------------

    async def _meet(self, event: Event) -> None:
        await trio.sleep_until(trio.current_time() + self._began + event.at_s - time.monotonic())
        self._say(f"{event.kind} {event.target} {event.lasts_s:.1f} s")
        at = len(self._events)
        began = time.monotonic()
        self._events.append((event, began, None))
        try:
            await self._faults.meet(event)
        except Exception as error:
            # The others go on; that it could not be done is told.
            self._found("runner", f"{event}: {error!r}")
        finally:
            self._events[at] = (event, began, time.monotonic())

    # ---- readers ---------------------------------------------------------------------------------------------------

    async def _read(self, mount: str, how: str, seed: int, stop: trio.Event) -> None:
        name = f"{mount} {how}"
        process = await self._open_reader(mount, how, seed)
        self._heard[name] = time.monotonic()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._listen, process, mount, name)
            nursery.start_soon(self._watch, process, name, nursery.cancel_scope)
            await stop.wait()
            assert process.stdin is not None
            await process.stdin.aclose()
            with trio.move_on_after(HANG_S):
                if await process.wait() != 0:
                    self._found("runner", f"the reader {name} ended with {process.returncode}")
            nursery.cancel_scope.cancel()
        if process.returncode is None:
            self._found("hang", f"the reader {name} does not end")
            process.kill()

    async def _open_reader(self, mount: str, how: str, seed: int) -> trio.Process:
        return await trio.lowlevel.open_process(
            self._scene.reader(mount, how, seed),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=REPOSITORY,
        )

    async def _watch(self, process: trio.Process, name: str, scope: trio.CancelScope) -> None:
        while True:
            await trio.sleep(1)
            silent_s = time.monotonic() - self._heard[name]
            if process.poll() is not None:
                self._found("runner", f"the reader {name} ended with {process.returncode}")
                scope.cancel()
            elif silent_s > HANG_S:
                self._found("hang", f"the reader {name} waits for {silent_s:.0f} s in one call")
                process.kill()
                scope.cancel()

    async def _listen(self, process: trio.Process, mount: str, name: str, *, strictly: bool = False) -> list[str]:
        """Returns, if `strictly`, what is not as it is in the bucket now."""
        assert process.stdout is not None
        rest, wrong = b"", []
        async for data in process.stdout:
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                self._heard[name] = time.monotonic()
                one = Try(**json.loads(line))
                wrong += self._hear(one, mount, strictly)
        return wrong

    def _hear(self, one: Try, mount: str, strictly: bool) -> list[str]:
        stall = Stall(one.longest_s, one.longest, one.name, mount, round(one.longest_at - self._began, 1))
        if not strictly and stall.seconds > self._outcome.longest_stall.seconds:
            stall.during = self._during(one.longest_at - 2, one.longest_at + one.longest_s)
            self._outcome.longest_stall = stall
        finding = self._judge.finding(one, mount)
        if finding is not None and (not strictly or finding[0] == "wrong bytes"):
            self._found(finding[0], f"{mount}, {one.how}: {finding[1]}", at=one.ended)
        history = self._scene.history
        if not strictly:
            return []
        if one.error is not None or finding is not None:
            return [f"{one.how} of {one.name}: {one.error or finding}"]
        if one.how == "list":
            there = sorted(name.split("/")[1] for name in history.existing() if name.startswith(one.name + "/"))
            return [] if one.names == there else [f"{one.name}: {sorted(set(there) ^ set(one.names or ()))} differ"]
        newest = history.versions[one.name][-1].number
        return [] if one.version == newest else [f"{one.name}: version {one.version} instead of {newest}"]

    # ---- calm ------------------------------------------------------------------------------------------------------

    async def _pass(self) -> list[str]:
        """What is not as it is in the bucket when every file is read through every mount."""
        wrong: list[str] = []
        for mount in self._scene.mountpoints:
            process = await self._open_reader(mount, "all", 0)
            with trio.move_on_after(HANG_S):
                wrong += [f"{mount}: {text}" for text in await self._listen(process, mount, mount, strictly=True)]
                await process.wait()
            if process.returncode != 0:
                wrong.append(f"{mount}: the reader of everything ended with {process.returncode}")
                with suppress(ProcessLookupError):
                    process.kill()
        return wrong

    async def _pass_calmly(self, what: str) -> None:
        for text in await self._pass():
            self._found("not healed", f"{what}: {text}")

    async def _heal(self) -> None:
        """Returns when everything is read as it is in the bucket, or that is a finding."""
        self._say("all faults are over")
        began = time.monotonic()
        while (wrong := await self._pass()) and time.monotonic() < began + HEAL_S:
            await trio.sleep(1)
        if wrong:
            for text in wrong:
                self._found("not healed", text)
        else:
            self._outcome.healed_s = round(time.monotonic() - began, 1)
            self._say(f"healed after {self._outcome.healed_s} s")

    async def _leaked_descriptors(self, before: dict[str, Counter[str]]) -> None:
        deadline = time.monotonic() + _LEAK_WAIT_S
        while True:
            now = self._scene.descriptors()
            more = {name: now[name].total() - before[name].total() for name in before if name in now}
            if max(more.values()) <= _SLACK or time.monotonic() > deadline:
                break
            await trio.sleep(0.5)
        for name, count in more.items():
            if count > _SLACK:
                self._found("leak", f"{count} more descriptors in {name}: {(now[name] - before[name]).most_common(8)}")


def run(
    seed: int,
    seconds: float,
    *,
    kinds: Collection[str] = (),
    pace_s: float = 1.5,
    keep: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Outcome:
    """With all kinds unless some are named. `keep`: the directory with everything, if something was found."""
    chosen = [kind.name for kind in KINDS if not kinds or kind.name in kinds]
    outcome = Outcome(seed, seconds, pace_s, chosen)
    directory = Path(tempfile.mkdtemp(prefix="cachefs-chaos-"))
    mounts = leaks.mounts()
    try:
        trio.run(_run, directory, outcome, say)
    finally:
        for mountpoint in leaks.mounts() - mounts:
            outcome.found("leak", f"mount {mountpoint}")
        deadline = time.monotonic() + _LEAK_WAIT_S
        # Some were killed a moment ago, with nobody to wait for them.
        while (living := leaks.processes_with(str(directory))) and time.monotonic() < deadline:
            time.sleep(0.05)
        for pid, command in living.items():
            outcome.found("leak", f"process {pid}: {command}")
        if keep and not outcome.good:
            outcome.directory = str(directory)
        else:
            subprocess.run(["rm", "-rf", "--one-file-system", str(directory)], check=False)
    return outcome


async def _run(directory: Path, outcome: Outcome, say: Callable[[str], None]) -> None:
    left: list[str] = []
    try:
        async with open_scene(directory, outcome.seed, left) as scene:
            for kind, argument in MOUNT_SERVER_KINDS.items():
                if kind in outcome.kinds and not scene.having(argument, "mount-a"):
                    outcome.left_out[kind] = f"there is no process {argument}: nothing keeps a mount whose server dies"
                    outcome.kinds.remove(kind)
            events = plan(outcome.seed, outcome.seconds, outcome.kinds, outcome.pace_s)
            await Run(scene, outcome, say).all(events)
    except* AssertionError as group:
        for error in _leaves(group):
            outcome.found("process", str(error))
    for path in left:
        outcome.found("leak", f"file {path}")


def _leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    found: list[BaseException] = []
    for each in group.exceptions:
        found += _leaves(each) if isinstance(each, BaseExceptionGroup) else [each]
    return found


def as_json(outcome: Outcome) -> str:
    return json.dumps({**asdict(outcome), "good": outcome.good, "cpus": os.cpu_count()})
