"""fio on one large file, with the job files of bench/fio."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import xxhash

from bench.pagecache import CannotDrop, drop_page_cache
from bench.processes import all_processor_seconds
from bench.results import Better, Figure, Gap
from bench.systems.base import Mounted
from bench.workloads.base import Data, Scale, Workload
from bench.workloads.settling import settle

JOB_FILES = Path(__file__).parent.parent / "fio"
KIB, MIB = 1 << 10, 1 << 20
SIZES = {"4k": 4 * KIB, "128k": 128 * KIB, "1M": MIB}
PATTERNS = ("sequential", "random")
JOBS = (1, 4, 16)
ENGINES = ("psync", "libaio", "mmap")
STATES = ("cold", "cached", "warm")
HANGS_AT = 64
"""Jobs with which a peer is known to hang."""
IN_FLIGHT = 16
"""Of libaio, for each job; the other engines have one."""
GRACE_S = 20.0
"""What fio may take longer than it was told to read."""
DIES_IN_S = 5.0
ALL = "all"


class Case(msgspec.Struct, frozen=True):
    pattern: str
    size: str
    jobs: int
    engine: str
    state: str

    def __str__(self) -> str:
        jobs = "1 job" if self.jobs == 1 else f"{self.jobs} jobs"
        return f"{self.pattern} {self.size}, {jobs}, {self.engine}, {self.state}"

    @property
    def words(self) -> set[str]:
        return {str(each) for each in msgspec.structs.astuple(self)}


STANDARD = (
    Case("sequential", "1M", 1, "psync", "cold"),
    Case("random", "4k", 4, "psync", "cold"),
    Case("sequential", "1M", 1, "psync", "cached"),
    Case("random", "4k", 4, "psync", "cached"),
    Case("sequential", "1M", 1, "psync", "warm"),
    Case("random", "4k", 1, "psync", "warm"),
    Case("random", "4k", 16, "psync", "warm"),
    Case("random", "128k", 4, "libaio", "warm"),
    Case("random", "4k", 4, "mmap", "warm"),
)
SMOKE = (
    Case("sequential", "1M", 1, "psync", "cold"),
    Case("random", "4k", 4, "psync", "cached"),
    Case("sequential", "128k", 4, "mmap", "warm"),
    Case("random", "4k", 4, "libaio", "warm"),
)


class Amounts(msgspec.Struct, frozen=True):
    warm_file: int
    cold_file: int
    """Of each cold case: a file is cold only once."""
    blocks: int
    """Read at most when the page cache has them, by all jobs together: files are read over and over."""
    bytes: int
    limit_s: float
    """Of a case; what was read by then counts."""


AMOUNTS = {
    Scale.SMOKE: Amounts(8 * MIB, 2 * MIB, 2048, 32 * MIB, 20.0),
    Scale.STANDARD: Amounts(128 * MIB, 64 * MIB, 65_536, 512 * MIB, 1.0),
    Scale.FULL: Amounts(512 * MIB, 32 * MIB, 262_144, 4096 * MIB, 3.0),
}


class Fio(Workload):
    name = "fio"
    what = "fio on one large file: sequential and random, by size of read, jobs and engine; cold, cached and warm"
    axes = ("pattern", "size", "jobs", "engine", "state")
    options: Mapping[str, str] = {
        "cases": f"{ALL}; or words that each case must have, of {', '.join((*PATTERNS, *SIZES))}, "
        f"{', '.join((*ENGINES, *STATES))} and the number of jobs, with + between them: random+4k+warm",
    }

    def __init__(self, scale: Scale, options: Mapping[str, str] | None = None) -> None:
        """Raises ValueError for an option that chooses no case."""
        super().__init__(scale, options)
        self.amounts = AMOUNTS[scale]
        wanted = self.chosen.get("cases", ALL)
        self.cases = [each for each in cases_of(scale) if wanted == ALL or each.words.issuperset(wanted.split("+"))]
        if not self.cases:
            known = ", ".join((*PATTERNS, *SIZES, *map(str, (*JOBS, HANGS_AT)), *ENGINES, *STATES))
            raise ValueError(
                f"fio.cases={wanted}: no case of the {scale} scale has these words; they are {ALL}, or of {known}, "
                "with + between them"
            )

    def rounds(self) -> int:
        return {Scale.SMOKE: 1, Scale.STANDARD: 3, Scale.FULL: 3}[self.scale]

    def limit_s(self) -> float:
        return len(self.cases) * (self.amounts.limit_s + 3) + super().limit_s()

    def data(self) -> Data:
        cold = [each for each in self.cases if each.state == "cold"]
        files = {cold_file(each): self.amounts.cold_file for each in cold}
        return Data(name="fio", files={"warm": self.amounts.warm_file, **files})

    def measure(self, mounted: Mounted, round_: int) -> Iterator[Figure | Gap]:
        program = shutil.which("fio")
        if program is None:
            yield self._gap(mounted, "missing", "fio is not installed: apt-get install fio")
            return
        filled = warmed = False
        for case in sorted(self.cases, key=lambda each: STATES.index(each.state)):
            if case.state != "cold" and not filled:
                filled = True
                if self._read_all(mounted) != self._read_all(mounted, native=True):
                    yield self._gap(mounted, "failed", "WRONG BYTES in the file that was read", case)
                    return
                settle(mounted)
            if case.state == "cached":
                try:
                    drop_page_cache()
                except CannotDrop as error:
                    yield self._gap(mounted, "skipped", str(error), case)
                    continue
            if case.state == "warm" and not warmed:
                warmed = True
                self._read_all(mounted)
            try:
                yield from self._figures(program, mounted, case, round_)
            except FioFailed as error:
                yield self._gap(mounted, "hung" if error.hung else "failed", str(error), case)
                if error.hung:
                    # Who hangs once does not answer afterwards; and the processes that hang are there still.
                    yield self._gap(mounted, "hung", f"not measured, as it hung in: {case}")
                    return

    def _gap(self, mounted: Mounted, kind: Any, why: str, case: Case | None = None) -> Gap:
        return Gap(workload=self.name, system=mounted.system, kind=kind, why=why, case=str(case) if case else "")

    @staticmethod
    def _read_all(mounted: Mounted, *, native: bool = False) -> str:
        """Checksum of the warm file."""
        digest = xxhash.xxh3_64()
        buffer = bytearray(MIB)
        with ((mounted.source.native if native else mounted.path) / "warm").open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                digest.update(memoryview(buffer)[:count])
        return digest.hexdigest()

    def _figures(self, program: str, mounted: Mounted, case: Case, round_: int) -> Iterator[Figure]:
        before = all_processor_seconds(mounted.pids)
        environment, limit_s = self._environment(mounted, case, round_), self.amounts.limit_s + GRACE_S
        job = run_fio(program, case.pattern, environment, mounted.place, limit_s)
        served = all_processor_seconds(mounted.pids) - before
        read, jobs = job["read"], case.jobs
        if not read["total_ios"]:
            raise FioFailed(f"nothing was read in {self.amounts.limit_s:g} s")
        latency = read["lat_ns"]
        # In milliseconds, which is coarse for what a page cache answers: then the sum of all latencies tells.
        in_flight = jobs * (IN_FLIGHT if case.engine == "libaio" else 1)
        seconds = read["runtime"] / 1e3 or latency["mean"] * latency["N"] / 1e9 / in_flight
        labels = {
            "pattern": case.pattern,
            "size": case.size,
            "jobs": str(jobs),
            "engine": case.engine,
            "state": case.state,
        }
        percentiles = {float(name): value / 1e9 for name, value in latency["percentile"].items()}
        gigabytes = read["io_bytes"] / 1e9
        # Of fio's processes on average, in percent.
        reading = (job["usr_cpu"] + job["sys_cpu"]) / 100 * jobs * read["runtime"] / 1e3
        figures: Sequence[tuple[str, float, str, Better]] = (
            ("bytes_per_s", read["io_bytes"] / seconds, "B/s", "more"),
            ("iops", read["total_ios"] / seconds, "1/s", "more"),
            ("p50_s", percentiles[50.0], "s", "less"),
            ("p99_s", percentiles[99.0], "s", "less"),
            ("p99.9_s", percentiles[99.9], "s", "less"),
            ("reading_s_per_gb", reading / gigabytes, "s", ""),
            ("serving_s_per_gb", served / gigabytes, "s", ""),
        )
        for metric, value, unit, better in figures:
            yield Figure(case=str(case), metric=metric, value=value, unit=unit, better=better, labels=labels)

    def _environment(self, mounted: Mounted, case: Case, round_: int) -> dict[str, str]:
        """What the job files want to know."""
        size = SIZES[case.size]
        cold, warm = self.amounts.cold_file, self.amounts.warm_file
        part = (cold if case.state == "cold" else warm) // case.jobs
        total = min(self.amounts.bytes, self.amounts.blocks * size) // case.jobs
        # What is read a second time comes from the page cache: cold and cached cases go once through the file.
        once = min(part, total)
        sequential = case.pattern == "sequential"
        return {
            "DIRECTORY": str(mounted.path),
            "FILE": cold_file(case) if case.state == "cold" else "warm",
            "BLOCK": str(size),
            "JOBS": str(case.jobs),
            "ENGINE": case.engine,
            "DEPTH": str(IN_FLIGHT if case.engine == "libaio" else 1),
            "BYTES": str(total if case.state == "warm" else once),
            "PART": str(part if sequential else 0),
            "SPAN": str(part) if sequential else "100%",
            "LIMIT_S": f"{self.amounts.limit_s:g}",
            "SEED": str(round_ + 1),
        }


def cases_of(scale: Scale) -> Sequence[Case]:
    if scale is Scale.SMOKE:
        return SMOKE
    if scale is Scale.STANDARD:
        return STANDARD
    matrix = [Case(*each) for each in itertools.product(PATTERNS, SIZES, JOBS, ENGINES, STATES)]
    return [*matrix, Case("random", "4k", HANGS_AT, "psync", "cached")]


def cold_file(case: Case) -> str:
    return f"cold-{case.pattern}-{case.size}-{case.jobs}-{case.engine}"


class FioFailed(Exception):
    def __init__(self, why: str, *, hung: bool = False) -> None:
        super().__init__(why)
        self.hung = hung


def run_fio(program: str, pattern: str, environment: Mapping[str, str], place: Path, limit_s: float) -> dict[str, Any]:
    """Of fio's JSON the one job, which stands for all of the group. Raises FioFailed. Its files are left in `place`."""
    output, log = place / "fio.json", place / "fio.log"
    # Its notes and errors come into the midst of the JSON, unless that has a file of its own.
    command = [program, "--readonly", "--output-format=json", f"--output={output}", f"{pattern}.fio"]
    with log.open("wb") as told:
        process = subprocess.Popen(
            command,
            cwd=JOB_FILES,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=told,
            stderr=told,
            start_new_session=True,
        )
    try:
        status = process.wait(limit_s)
    except subprocess.TimeoutExpired:
        raise FioFailed(f"fio did not end within {limit_s:g} s", hung=True) from None
    finally:
        end(process)
    text = output.read_text() if output.exists() else ""
    try:
        (job,) = json.loads(text[text.index("{") :])["jobs"]
    except ValueError:
        raise FioFailed(f"fio ended with {status}: {(text + log.read_text())[-500:].strip()}") from None
    if status or job["error"]:
        raise FioFailed(f"fio ended with {status}: {os.strerror(job['error'])}; {log.read_text()[-500:].strip()}")
    return dict(job)


def end(process: subprocess.Popen[bytes]) -> None:
    """With all that it started; what hangs in the kernel is left to who takes the mount away."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):
        process.wait(DIES_IN_S)
