"""The runner: makes data, mounts each system afresh, and has each workload measured on it, round by round.

Whatever a system does to itself or to those who read from it, its place in the results says so, and the run goes on.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import msgspec

from bench import data, machine, server, space
from bench.children import scratch
from bench.jobs import encode
from bench.measuring import ROOT, FailedError, HungError, Task, measured
from bench.pagecache import CannotDrop, drop_page_cache
from bench.results import Figure, Gap, Measure, Results
from bench.server import Ceiling, make_bucket, remove_buckets
from bench.systems.base import Missing, Mounted, Source, System
from bench.systems.serving import end_of_log, is_running
from bench.workloads.base import Alone, Data, Scale, Workload
from bench.workloads.registry import address_of
from cachefs.fuse import MountError, abort, find_mount
from cachefs.model import CachefsError
from cachefs.testing.s3server import S3Server

PREFIX = "data"
SEED = 1
MAKING_LIMIT_S = 3600.0
ALONE_LIMIT_S: Mapping[Scale, float] = {Scale.SMOKE: 120.0, Scale.STANDARD: 900.0, Scale.FULL: 3600.0}
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass
class Plan:
    """What is to be measured, on what."""

    name: str
    workloads: Sequence[Workload | Alone]
    systems: Mapping[str, System]
    scale: Scale
    directory: Path
    """In which the run makes one of its own."""
    command: Sequence[str]
    rounds: int | None = None
    """None: as many as each workload wants."""
    minutes: float | None = None
    """No further round is begun that would end later than this after the run's beginning, going by the one before; the
    first rounds are measured in any case. Then rounds go over all workloads, or else workload by workload, so that one
    data set need not be there together with the next.
    """
    say: Callable[[str], None] = lambda line: None
    """Shown what happens, a line at a time."""

    def turns(self) -> list[tuple[Workload | Alone, int]]:
        """Which round of which workload is measured after which."""
        rounds = {each.name: 1 if isinstance(each, Alone) else self.rounds or each.rounds() for each in self.workloads}
        turns = [(each, round_) for each in self.workloads for round_ in range(rounds[each.name])]
        return sorted(turns, key=lambda turn: turn[1]) if self.minutes is not None else turns


@dataclass
class Collected:
    """Figures as measures, in the order in which they first came."""

    measures: dict[tuple[str, ...], Measure] = field(default_factory=dict)
    gaps: list[Gap] = field(default_factory=list)

    def figure(self, workload: str, system: str, figure: Figure) -> None:
        key = (workload, figure.case, system, figure.metric)
        found = self.measures.get(key)
        if found is not None:
            found.values.append(figure.value)
            return
        self.measures[key] = Measure(
            workload=workload,
            case=figure.case,
            system=system,
            metric=figure.metric,
            unit=figure.unit,
            better=figure.better,
            values=[figure.value],
            labels=figure.labels,
        )

    def measure(self, measure: Measure) -> None:
        self.measures[measure.workload, measure.case, measure.system, measure.metric] = measure

    def gap(self, gap: Gap) -> bool:
        """Once, however many rounds say so; then false."""
        same = (gap.workload, gap.system, gap.kind, gap.case)
        if any((each.workload, each.system, each.kind, each.case) == same for each in self.gaps):
            return False
        self.gaps.append(gap)
        return True


def run(plan: Plan) -> Results:
    """Do it. Ends everything that it started, and takes away what it made, whatever happens. Raises TooLittle before it
    starts; CachefsError when the S3 server does not come up.
    """
    space.check(plan.directory, plan.scale, [each for each, _ in plan.turns()], list(plan.systems))
    began, clock, revision = datetime.now(UTC), time.monotonic(), machine.revision()
    with ExitStack() as stack:
        directory = stack.enter_context(scratch(plan.directory.resolve(), "cachefs-bench"))
        runner = Runner(plan, directory, stack)
        runner.run()
        about = machine.machine(directory)
    return Results(
        name=plan.name,
        began=began.isoformat(timespec="seconds"),
        seconds=round(time.monotonic() - clock, 1),
        command=list(plan.command),
        revision=revision,
        machine=about,
        versions={**runner.versions, **machine.library_versions()},
        flags=runner.flags,
        scale=str(plan.scale),
        measures=list(runner.collected.measures.values()),
        gaps=runner.collected.gaps,
    )


class Runner:
    def __init__(self, plan: Plan, directory: Path, stack: ExitStack) -> None:
        self._plan = plan
        self._directory = directory
        self._stack = stack
        self._sources: dict[str, Source] = {}
        self._server: S3Server | None = None
        self._server_in_memory = False
        self._missing: dict[str, str] = {}
        self._began = time.monotonic()
        self._took_s: dict[str, float] = {}
        """The last round of a workload."""
        self._out_of_time: set[str] = set()
        self._names: dict[str, list[str]] = {}
        """Workload -> the systems that are still measured with it."""
        self.versions: dict[str, str] = {}
        self.flags: dict[str, list[str]] = {}
        self.collected = Collected()

    def run(self) -> None:
        self._check_systems()
        ceiling = None
        if any(isinstance(each, Workload) for each in self._plan.workloads):
            self._server = self._start_server()
            ceiling = Ceiling(self._server, self._plan.scale)
            self._measure_ceiling(ceiling)
        turns = self._plan.turns()
        for number, (workload, round_) in enumerate(turns):
            begin = time.monotonic()
            if not self._has_time(workload, round_):
                continue
            try:
                if isinstance(workload, Alone):
                    self._measure_alone(workload)
                else:
                    self._measure_round(workload, round_)
                    self._forget_data([each for each, _ in turns[number + 1 :]])
            except Exception:
                # A mistake of ours. Hours of other results are not lost for it, and it is seen in them.
                why = f"the runner failed: {traceback.format_exc()[-800:]}"
                self._keep_gap(Gap(workload=workload.name, system="", kind="failed", why=why))
            self._took_s[workload.name] = time.monotonic() - begin
            self._plan.say(f"{workload.name} {round_ + 1} took {self._took_s[workload.name]:.0f} s")
        if ceiling is not None:
            self._measure_ceiling(ceiling)

    # ---- systems and server ------------------------------------------------------------------------------------

    def _check_systems(self) -> None:
        for name, system in self._plan.systems.items():
            try:
                self.versions[name] = system.check()
                self.flags[name] = system.flags()
            except Missing as error:
                self._missing[name] = str(error)
                self._plan.say(f"{name} is missing: {error}")

    def _start_server(self) -> S3Server:
        workloads = [each for each, _ in self._plan.turns()]
        bucket = space.needs(workloads, list(self._plan.systems)).bucket
        place = self._directory / "server"
        if in_memory := space.server_fits_memory(bucket, self._plan.scale):
            place = self._stack.enter_context(scratch(space.SHARED_MEMORY, "cachefs-bench"))
        self._server_in_memory = in_memory
        running = self._stack.enter_context(server.running_server(place))
        medium = "memory" if in_memory else machine.medium_of(place)
        self.versions["seaweedfs"] = server.version()
        self.flags["server"] = [f"objects in {medium}"]
        self._plan.say(f"the S3 server is up, its objects in {medium}")
        return running

    def _measure_ceiling(self, ceiling: Ceiling) -> None:
        try:
            ceiling.measure()
        except (OSError, subprocess.SubprocessError, CachefsError) as error:
            self.collected.gap(Gap(workload="server", system="", kind="failed", why=_words(error)))
            return
        for measure in ceiling.measures():
            self.collected.measure(measure)
            figure = measure.values[-1]
            shown = f"{figure / 1e6:,.0f} MB/s" if measure.unit == "B/s" else f"{figure:,.0f}/s"
            self._plan.say(f"the server gives a bare client {shown}: {measure.case}")

    # ---- workloads ---------------------------------------------------------------------------------------------

    def _measure_alone(self, workload: Alone) -> None:
        self._plan.say(f"{workload.name}: {workload.what}")
        limit_s = ALONE_LIMIT_S[self._plan.scale]
        with scratch(self._directory, workload.name) as place:
            inside = place / "inside"
            inside.mkdir()
            task = Task(
                workload=address_of(type(workload)),
                scale=str(workload.scale),
                options=workload.chosen,
                directory=inside,
            )
            for found in self._found(task, limit_s, place / "measuring.log", workload.name, ""):
                assert isinstance(found, Measure)
                self.collected.measure(found)

    def _has_time(self, workload: Workload | Alone, round_: int) -> bool:
        if self._plan.minutes is None or round_ == 0:
            return True
        if workload.name in self._out_of_time:
            return False
        end = time.monotonic() - self._began + self._took_s[workload.name]
        if end <= self._plan.minutes * 60:
            return True
        self._out_of_time.add(workload.name)
        why = f"{self._plan.minutes:g} minutes were given, and it would have taken until {end / 60:.1f}"
        case = f"round {round_ + 1} and later"
        self._keep_gap(Gap(workload=workload.name, system="", kind="skipped", why=why, case=case))
        return False

    def _measure_round(self, workload: Workload, round_: int) -> None:
        if round_ == 0:
            self._names[workload.name] = self._to_measure(workload)
        for name in in_turn(self._names[workload.name], round_):
            if not self._measure_one(workload, name, round_):
                self._names[workload.name].remove(name)

    def _to_measure(self, workload: Workload) -> list[str]:
        """The systems that are there, once the data is."""
        names = list(self._plan.systems)
        for name in names:
            if name in self._missing:
                self.collected.gap(
                    Gap(workload=workload.name, system=name, kind="missing", why=self._missing[name]),
                )
        names = [name for name in names if name not in self._missing]
        try:
            if names:
                self._source(workload)
        except (RuntimeError, ValueError, OSError, subprocess.SubprocessError) as error:
            for name in names:
                self._leave_out(workload, name, "failed", f"its data could not be made: {_words(error)}")
            return []
        return names

    def _measure_one(self, workload: Workload, name: str, round_: int) -> bool:
        """False: the system is left out from here on."""
        system = self._plan.systems[name]
        begin = time.monotonic()
        before = len(self.collected.gaps)
        count = 0
        with scratch(self._directory, f"{workload.name}-{round_}-{name}") as place:
            try:
                with system.mounted(self._source(workload), place, workload.cache_bytes()) as mounted:
                    ready = time.monotonic()
                    self._prepare()
                    task = Task(
                        workload=address_of(type(workload)),
                        scale=str(workload.scale),
                        options=workload.chosen,
                        round=round_,
                        mounted=mounted,
                    )
                    log = place / "measuring.log"
                    for found in self._found(task, workload.limit_s(), log, workload.name, name):
                        assert isinstance(found, Figure)
                        self.collected.figure(workload.name, name, found)
                        count += 1
                    spent = time.monotonic() - ready
            except Missing as error:
                self._leave_out(workload, name, "missing", str(error))
            except (RuntimeError, OSError, subprocess.SubprocessError, CachefsError) as error:
                self._leave_out(workload, name, "failed", _words(error))
        gaps = (each for each in self.collected.gaps[before:] if not each.case)
        if any((each.workload, each.system) == (workload.name, name) for each in gaps):
            return False
        self._plan.say(
            f"{workload.name} {round_ + 1} {name}: {count} figures in {spent:.1f} s, "
            f"{time.monotonic() - begin - spent:.1f} s around it"
        )
        return True

    def _prepare(self) -> None:
        """See to it that what was measured before makes no difference."""
        _write_back(self._directory)
        if not self._server_in_memory:
            # Of the server's objects that would have what was just written, or nothing, as the one before left it.
            with suppress(CannotDrop):
                drop_page_cache()

    def _found(self, task: Task, limit_s: float, log: Path, workload: str, system: str) -> Iterator[Figure | Measure]:
        """What the workload found, but for its gaps, which are kept; and one more gap where it did not end well."""
        mounted = task.mounted
        path = mounted.path if mounted is not None else None
        try:
            for found in measured(task, limit_s, log, lambda: _abort(path)):
                if isinstance(found, Gap):
                    self._keep_gap(msgspec.structs.replace(found, workload=workload, system=found.system or system))
                else:
                    yield found
        except HungError as error:
            what = "the measurement was ended"
            _kill(mounted)
            self._keep_gap(
                Gap(workload=workload, system=system, kind="hung", why=_with_log(f"{error}; {what}", mounted))
            )
        except FailedError as error:
            gone = _what_is_gone(mounted) if mounted is not None else ""
            why = _with_log(f"{gone}; {error}" if gone else str(error), mounted)
            self._keep_gap(Gap(workload=workload, system=system, kind="crashed" if gone else "failed", why=why))

    def _leave_out(self, workload: Workload, name: str, kind: Literal["missing", "failed"], why: str) -> None:
        self._keep_gap(Gap(workload=workload.name, system=name, kind=kind, why=why))

    def _keep_gap(self, gap: Gap) -> None:
        if not self.collected.gap(gap):
            return
        case = f" ({gap.case})" if gap.case else ""
        self._plan.say(f"{gap.workload} {gap.system}{case} {gap.kind}: {gap.why}")

    # ---- data --------------------------------------------------------------------------------------------------

    def _source(self, workload: Workload) -> Source:
        """Raises ValueError, OSError, RuntimeError and SubprocessError."""
        wanted = workload.data()
        found = self._sources.get(wanted.name)
        if found is None:
            begin = time.monotonic()
            found = self._sources[wanted.name] = self._make(workload, wanted)
            size, spent = space.human(wanted.size_bytes), time.monotonic() - begin
            self._plan.say(f"data {wanted.name}: {len(wanted.files):,} files, {size}, made in {spent:.0f} s")
        elif (found.files, found.size_bytes) != (len(wanted.files), wanted.size_bytes):
            raise ValueError(f"another workload has a data set of the name {wanted.name} with other files")
        return found

    def _make(self, workload: Workload, wanted: Data) -> Source:
        assert self._server is not None
        s3 = self._server
        bucket = "bench-" + re.sub(r"[^a-z0-9]+", "-", wanted.name.lower()).strip("-")
        make_bucket(s3, bucket)
        native = self._directory / "native" / wanted.name
        native.mkdir(parents=True)
        job = data.Job(
            native=native,
            endpoint=s3.endpoint,
            key=s3.key,
            secret=s3.secret,
            bucket=bucket,
            prefix=PREFIX,
            files=dict(wanted.files),
            seed=SEED,
            workload=address_of(type(workload)),
            scale=str(workload.scale),
            options=workload.chosen,
        )
        done = subprocess.run(
            [sys.executable, "-m", "bench.data"],
            input=encode(job),
            capture_output=True,
            cwd=ROOT,
            timeout=MAKING_LIMIT_S,
        )
        if done.returncode != 0:
            raise RuntimeError(done.stderr.decode(errors="replace").strip()[-800:])
        return Source(
            endpoint=s3.endpoint,
            key=s3.key,
            secret=s3.secret,
            bucket=bucket,
            prefix=PREFIX,
            native=native,
            size_bytes=wanted.size_bytes,
            files=len(wanted.files),
            traffic_url=s3.metrics_url,
        )

    def _forget_data(self, to_come: Sequence[Workload | Alone]) -> None:
        """Take away what none of these will read."""
        wanted = {each.data().name for each in to_come if isinstance(each, Workload)}
        for name in [each for each in self._sources if each not in wanted]:
            source = self._sources.pop(name)
            assert self._server is not None
            remove_buckets(self._server, source.bucket)
            shutil.rmtree(source.native)


def in_turn(names: Sequence[str], round_: int) -> list[str]:
    """Each round begins with another one, and every second one goes the other way round: who comes after whom, too,
    changes.
    """
    if not names:
        return []
    step = -1 if round_ % 2 else 1
    return [names[(round_ + step * place) % len(names)] for place in range(len(names))]


def _abort(path: Path | None) -> None:
    """End the FUSE connection that serves a path, so that whoever waits for it in the kernel can end."""
    if path is None:
        return
    mounted = find_mount(path)
    if mounted is not None and mounted.fs_type.startswith("fuse"):
        with suppress(MountError):
            abort(mounted)


def _kill(mounted: Mounted | None) -> None:
    """What hangs does not end politely."""
    for pid in mounted.pids if mounted is not None else ():
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _what_is_gone(mounted: Mounted) -> str:
    """Of a system that failed: what shows that it crashed; empty if it has not."""
    if not all(is_running(pid) for pid in mounted.pids):
        return "its process ended while it was read"
    if mounted.pids and find_mount(mounted.path) is None:
        return "its mount went away while it was read"
    return ""


def _with_log(why: str, mounted: Mounted | None) -> str:
    tail = end_of_log(mounted.place) if mounted is not None else ""
    return f"{why}\nThe end of its log: {tail}" if tail else why


def _words(error: BaseException) -> str:
    """What an error says; for a process that failed, what that said."""
    said = getattr(error, "stderr", None)
    text = said.decode(errors="replace") if isinstance(said, bytes) else said or str(error) or type(error).__name__
    return text.strip()[-800:]


def _write_back(directory: Path) -> None:
    """Write what earlier measurements have left to the disk, so that it disturbs no other."""
    fd = os.open(directory, os.O_RDONLY)
    try:
        _libc.syncfs(fd)
    finally:
        os.close(fd)
