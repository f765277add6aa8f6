"""The speed that was promised, line by line: required and measured, as ratios within one run.

    python -m bench.speed                  all of it, some seven minutes
    python -m bench.speed --only cold      lines whose name has this in it

Warm reads are taken in turns of milliseconds by one process, cold ones in turns of whole runs on empty caches. The
machine does other things too: medians of several rounds, and their spread.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.harness import Up, random_bytes, run_readers, running_up, terminate_as_interrupt
from bench.machine import medium_of
from bench.peers import Missing, juicefs, rclone
from cachefs.client import ClientConfig
from cachefs.fuse import find_mount, unmount
from cachefs.testing.huge_s3 import DIRECTORY as HUGE_DIRECTORY
from cachefs.testing.huge_s3 import running_huge_s3
from cachefs.testing.s3server import S3Server, running_s3_server

ROUNDS = 5
BUCKET = "speed"
MIB = 1 << 20
LARGE_MIB = 512
SMALL_FILES = 1000
SMALL_BYTES = 110_000
LISTED_FILES = 100_000
CONCURRENCIES = (4, 8, 16)
LIMIT_S = 120.0


@dataclass
class Line:
    what: str
    required: float
    ratios: list[float] = field(default_factory=list)
    note: str = ""
    at_most: bool = False

    @property
    def median(self) -> float:
        return statistics.median(self.ratios)

    @property
    def reached(self) -> bool:
        if not self.ratios:
            return False
        return self.median <= self.required if self.at_most else self.median >= self.required


class Place:
    """A directory with data, its cache, and the mounts of this run."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.native = directory / "native"

    def make_local_data(self) -> None:
        if self.native.exists():
            return
        (self.native / "small").mkdir(parents=True)
        with (self.native / "large").open("wb") as file:
            for _ in range(LARGE_MIB):
                file.write(os.urandom(MIB))
        for number in range(SMALL_FILES):
            (self.native / "small" / f"{number:04}").write_bytes(os.urandom(SMALL_BYTES))

    @contextmanager
    def mounted(self, name: str, *flags: str) -> Iterator[Up]:
        """`cachefs up` of the local data, all of it cached."""
        self.make_local_data()
        place = self.directory / name
        place.mkdir()
        tier = f"ssd:{place / 'tier'}:{5 * LARGE_MIB + 1024}M"
        with running_up(f"file://{self.native}", place, tier, flags=[*flags, "--sync-interval", "-1"]) as up:
            sh('find "$1" -type f -exec cat {} + > /dev/null', up.mountpoint)
            wait_for(lambda: up.report()["workers"][0]["status"]["tiers"][0]["blocks"] >= SMALL_FILES + 1)
            yield up
        shutil.rmtree(place)


def sh(script: str, *arguments: str | Path) -> None:
    subprocess.run(["sh", "-c", script, "sh", *map(str, arguments)], check=True)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit("the data was not cached in time; is there room for it?")
        time.sleep(0.1)


def compare(kind: str, places: dict[str, Path], rounds: int = ROUNDS) -> Iterator[float]:
    """The first place's operations per second over the second's, once per round; the first round warms both."""
    first, second = places
    for round_ in range(rounds + 1):
        paths = {name: str(path) for name, path in places.items()}
        job = {"job": "compare", "kind": kind, "places": paths, "files": SMALL_FILES, "seed": round_}
        (result,) = run_readers([job])
        speeds = {name: each["operations"] / each["seconds"] for name, each in result.items()}
        if round_:
            yield speeds[first] / speeds[second]


class Profile:
    """The processor time that processes take while the blocks of `on` run."""

    def __init__(self) -> None:
        self._spent: dict[str, float] = {}

    @contextmanager
    def on(self, pids: dict[str, int]) -> Iterator[None]:
        before = {name: processor_seconds(pid) for name, pid in pids.items()}
        yield
        for name, pid in pids.items():
            self._spent[name] = self._spent.get(name, 0.0) + processor_seconds(pid) - before[name]

    def each(self, count: float, what: str) -> str:
        parts = (f"{name} {seconds / count * 1000:.2f}" for name, seconds in self._spent.items())
        return f"processor time in ms a {what}: {', '.join(parts)}"


def processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def all_of(server: S3Server, directory: Path) -> dict[str, int]:
    """The S3 server, and the processes of the `cachefs up` below this directory."""
    ours = {role: process_of(directory, role) for role in ("worker", "mount", "master")}
    return {"server": server_process(server), **ours}


def server_process(server: S3Server) -> int:
    """Of its process group the one that does the work."""
    members = [int(each.name) for each in Path("/proc").iterdir() if each.name.isdecimal()]
    return max((pid for pid in members if in_group(pid, server.pid)), key=processor_seconds)


def in_group(pid: int, group: int) -> bool:
    try:
        return os.getpgid(pid) == group
    except ProcessLookupError:
        return False


@contextmanager
def bare_mount(source: Path, mountpoint: Path) -> Iterator[int]:
    """The process that serves it."""
    mountpoint.mkdir(parents=True)
    process = subprocess.Popen([sys.executable, "-m", "bench.bare_fuse", source, mountpoint])
    try:
        wait_for(lambda: find_mount(mountpoint) is not None)
        yield process.pid
    finally:
        unmount(mountpoint, lazy=True)
        process.wait(LIMIT_S)


# ---- warm ----------------------------------------------------------------------------------------------------------


def warm(place: Place, wanted: Callable[[str], bool]) -> Iterator[Line]:
    lines = {
        "sequential": Line("warm sequential reads / native", 0.95),
        "random": Line("warm random 4 KiB reads / native", 0.90),
        "mapped": Line("warm random touches of an mmap / native", 0.90),
    }
    bare = Line("warm small files, passthrough / a bare loop on /dev/fuse", 0.9)
    if not any(wanted(line.what) for line in (*lines.values(), bare)):
        return
    with place.mounted("passthrough") as up:
        for kind, line in lines.items():
            if wanted(line.what):
                line.ratios = list(compare(kind, {"mount": up.mountpoint, "native": place.native}))
                yield line
        if wanted(bare.what):
            profile = Profile()
            with bare_mount(place.native / "small", place.directory / "bare" / "small") as pid:
                pids = {"mount": process_of(place.directory / "passthrough", "mount"), "bare": pid}
                with profile.on(pids):
                    bare.ratios = list(compare("small", {"mount": up.mountpoint, "bare": place.directory / "bare"}))
            bare.note = profile.each((ROUNDS + 1) * SMALL_FILES, "file")
            yield bare


def no_open(place: Place, wanted: Callable[[str], bool]) -> Iterator[Line]:
    line = Line("small files in no-open mode, second epoch / native", 0.8)
    if wanted(line.what):
        with place.mounted("no-open", "--open-mode", "no-open") as up:
            line.ratios = list(compare("small", {"mount": up.mountpoint, "native": place.native}))
        yield line


# ---- cold ----------------------------------------------------------------------------------------------------------


def bare_client(server: S3Server, ranges: list[tuple[str, int, int]], concurrency: int) -> float:
    """Seconds."""
    job = {"endpoint": server.endpoint, "key": server.key, "secret": server.secret, "bucket": BUCKET}
    given = json.dumps({**job, "ranges": ranges, "concurrency": concurrency})
    command = [sys.executable, "-m", "bench.bare_client"]
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=True)
    return float(done.stdout)


def cold(place: Place, wanted: Callable[[str], bool]) -> Iterator[Line]:
    large = Line("cold sequential read of large objects / the fastest bare client", 0.8)
    small = Line("cold small files, 8 readers in directory order / the bare client", 0.7)
    if not any(wanted(line.what) for line in (large, small)):
        return
    with running_s3_server(place.directory / "s3") as server:
        client = server.client()
        client.create_bucket(Bucket=BUCKET)
        client.close()
        if wanted(large.what):
            yield cold_large(place, server, large)
        if wanted(small.what):
            yield cold_small(place, server, small)


def cold_large(place: Place, server: S3Server, line: Line) -> Line:
    keys = [f"large/{number}" for number in range(4)]
    size = 128 * MIB
    server.put_objects(BUCKET, ((key, random_bytes(key, size)) for key in keys))
    ranges = [(key, start, start + 8 * MIB) for key in keys for start in range(0, size, 8 * MIB)]
    bare_client(server, ranges, 8)
    best = min(CONCURRENCIES, key=lambda concurrency: bare_client(server, ranges, concurrency))
    speeds = []
    profile, alone = Profile(), Profile()
    for round_ in range(ROUNDS):
        with alone.on({"server for the bare client": server_process(server)}):
            bare_s = bare_client(server, ranges, best)
        name = f"large-{round_}"
        with cold_mount(place, server, name, "large") as up, profile.on(all_of(server, place.directory / name)):
            begin = time.perf_counter()
            for key in keys:
                sh('dd if="$1" of=/dev/null bs=1M 2>/dev/null', up.mountpoint / key)
            spent = time.perf_counter() - begin
        line.ratios.append(bare_s / spent)
        speeds.append(len(keys) * size / bare_s / 1e6)
    megabytes = ROUNDS * len(keys) * size / 1e6
    line.note = f"bare: {statistics.median(speeds):.0f} MB/s with {best} requests at a time; "
    line.note += f"{profile.each(megabytes, 'MB')}; {alone.each(megabytes, 'MB')}"
    return line


def cold_small(place: Place, server: S3Server, line: Line) -> Line:
    keys = [f"small/{number:04}" for number in range(SMALL_FILES)]
    server.put_objects(BUCKET, ((key, random_bytes(key, SMALL_BYTES)) for key in keys))
    ranges = [(key, 0, SMALL_BYTES) for key in keys]
    speeds = []
    bare_client(server, ranges, 8)
    profile, alone = Profile(), Profile()
    for round_ in range(ROUNDS):
        with alone.on({"server for the bare client": server_process(server)}):
            bare_s = bare_client(server, ranges, 8)
        name = f"small-{round_}"
        with cold_mount(place, server, name, "small") as up:
            share = [
                {"job": "read_blindly", "files": [str(up.mountpoint / key) for key in keys[reader::8]]}
                for reader in range(8)
            ]
            with profile.on(all_of(server, place.directory / name)):
                spent = max(result["seconds"] for result in run_readers(share))
        line.ratios.append(bare_s / spent)
        speeds.append(len(keys) / bare_s)
    line.note = f"bare: {statistics.median(speeds):,.0f} files/s with 8 requests at a time; "
    line.note += f"{profile.each(ROUNDS * SMALL_FILES, 'file')}; {alone.each(ROUNDS * SMALL_FILES, 'file')}"
    return line


@contextmanager
def cold_mount(place: Place, server: S3Server, name: str, directory: str) -> Iterator[Up]:
    where = place.directory / name
    where.mkdir()
    with running_up(f"s3://{BUCKET}", where, f"ssd:{where / 'tier'}:8G", server.ufs_options) as up:
        # Names are known; bytes are not.
        sh('ls -l "$1" > /dev/null', up.mountpoint / directory)
        yield up
    # It goes with everything else: ext4 does not use inodes again for a while, and looks for others at every new file.


# ---- peers ---------------------------------------------------------------------------------------------------------


def peers(place: Place, wanted: Callable[[str], bool]) -> Iterator[Line]:
    """In memory, all of them: what is dropped then is the kernel's page cache of the mounts, not the caches."""
    lines = {
        "rclone": Line("warm small files / rclone, full cache", 4),
        "juicefs": Line("warm small files / JuiceFS, cached, page cache dropped", 2),
    }
    if not any(wanted(line.what) for line in lines.values()):
        return
    directory = Path(tempfile.mkdtemp(prefix="cachefs-bench-", dir="/dev/shm"))
    try:
        mine = Place(directory)
        with mine.mounted("passthrough") as up:
            if wanted(lines["rclone"].what):
                yield against_rclone(mine, up, lines["rclone"])
            if wanted(lines["juicefs"].what):
                yield against_juicefs(mine, up, lines["juicefs"])
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def against_rclone(place: Place, up: Up, line: Line) -> Line:
    with running_s3_server(place.directory / "s3") as server:
        client = server.client()
        client.create_bucket(Bucket=BUCKET)
        client.close()
        small = place.native / "small"
        server.put_objects(BUCKET, ((f"small/{each.name}", each.read_bytes()) for each in small.iterdir()))
        try:
            with rclone(server, BUCKET, place.directory) as mountpoint:
                sh('cat "$1"/small/* > /dev/null', mountpoint)
                line.ratios = list(compare("small", {"mount": up.mountpoint, "rclone": mountpoint}))
        except Missing as error:
            line.note = str(error)
    return line


def against_juicefs(place: Place, up: Up, line: Line) -> Line:
    try:
        with juicefs(place.native / "small", place.directory) as mountpoint:
            sh('cat "$1"/small/* > /dev/null', mountpoint)
            for _ in range(ROUNDS):
                speeds = []
                for root in (mountpoint, up.mountpoint):
                    sh("sync; echo 1 > /proc/sys/vm/drop_caches")
                    files = [str(root / "small" / f"{number:04}") for number in range(SMALL_FILES)]
                    (result,) = run_readers([{"job": "read_blindly", "files": files}])
                    speeds.append(len(files) / result["seconds"])
                line.ratios.append(speeds[1] / speeds[0])
    except Missing as error:
        line.note = str(error)
    return line


# ---- memory --------------------------------------------------------------------------------------------------------


def memory(place: Place, wanted: Callable[[str], bool]) -> Iterator[Line]:
    line = Line("worker's resident memory while it fills 4 GB, MB", 300, at_most=True)
    if not wanted(line.what):
        return
    where = place.directory / "memory"
    where.mkdir()
    with running_s3_server(place.directory / "much") as server:
        client = server.client()
        client.create_bucket(Bucket=BUCKET)
        client.close()
        for number in range(16):
            # One by one: this process has no need of four gigabytes.
            server.put_objects(BUCKET, [(str(number), os.urandom(256 * MIB))])
        tier = f"ssd:{where / 'tier'}:16G"
        with running_up(f"s3://{BUCKET}", where, tier, server.ufs_options) as up:
            sh('ls "$1" | xargs -P 8 -I{} dd if="$1"/{} of=/dev/null bs=1M 2>/dev/null', up.mountpoint)
            wait_for(lambda: up.report()["workers"][0]["status"]["tiers"][0]["blocks"] == 16)
            line.ratios = [memory_of(where, "worker", "VmHWM") / 1e6]
    line.note = "peak, 16 S3 objects of 256 MiB read by 8 readers"
    shutil.rmtree(where)
    shutil.rmtree(place.directory / "much")
    yield line


def memory_of(directory: Path, role: str, what: str) -> int:
    """Bytes, of the process with this role of the `cachefs up` below this directory. `what`: VmHWM, at its highest;
    VmRSS, now.
    """
    for text in Path(f"/proc/{process_of(directory, role)}/status").read_text().splitlines():
        if text.startswith(f"{what}:"):
            return int(text.split()[1]) * 1024
    raise SystemExit(f"the {role} has no {what}")


def process_of(directory: Path, role: str) -> int:
    """The process with this role of the `cachefs up` below this directory."""
    for process in Path("/proc").iterdir():
        if process.name.isdecimal():
            with suppress(OSError):
                arguments = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
                if role in arguments and any(str(directory) in each for each in arguments):
                    return int(process.name)
    raise SystemExit(f"the {role} is not there")


# ---- many names ----------------------------------------------------------------------------------------------------


def names(place: Place, wanted: Callable[[str], bool]) -> Iterator[Line]:
    listed = Line(f"ls -l of {LISTED_FILES:,} files, second time in a fresh process, s", 1, at_most=True)
    remembered = Line("mount server's memory per cached entry at 1 million entries, bytes", 350, at_most=True)
    if wanted(listed.what):
        yield listed_twice(place, listed)
    if wanted(remembered.what):
        yield remembered_names(place, remembered)


@contextmanager
def huge_mount(place: Place, count: int) -> Iterator[tuple[Up, Path]]:
    """`cachefs up` of a bucket with one directory of so many keys; and the directory that has what belongs to it."""
    where = place.directory / "huge"
    where.mkdir()
    with (
        running_huge_s3(count) as store,
        running_up(store.url, where, f"ssd:{where / 'tier'}:1G", store.options) as up,
    ):
        yield up, where
    shutil.rmtree(where)


def listed_twice(place: Place, line: Line) -> Line:
    """Each round has a namespace, a mount and a kernel's cache of its own."""
    first = []
    for _ in range(ROUNDS):
        with huge_mount(place, LISTED_FILES) as (up, _):
            spent = []
            for _ in range(2):
                begin = time.perf_counter()
                sh('test "$(ls -l "$1" | wc -l)" = "$2"', up.mountpoint / HUGE_DIRECTORY, str(LISTED_FILES + 1))
                spent.append(time.perf_counter() - begin)
        first.append(spent[0])
        line.ratios.append(spent[1])
    line.note = f"the first: {statistics.median(first):.1f} s, from a server that makes the names up"
    return line


def remembered_names(place: Place, line: Line) -> Line:
    """One name more than is remembered by default: as many are held as may be."""
    held = ClientConfig.metadata_cache_entries
    with huge_mount(place, held + 1) as (up, where):
        sh('ls "$1" > /dev/null', up.mountpoint)
        before = memory_of(where, "mount", "VmRSS")
        for _ in range(2):
            sh('test "$(ls -U "$1" | wc -l)" = "$2"', up.mountpoint / HUGE_DIRECTORY, str(held + 1))
            line.ratios.append((memory_of(where, "mount", "VmRSS") - before) / held)
    line.note = f"all that it has grown by, / {held:,} entries; listed once, and twice"
    return line


GROUPS = (warm, no_open, cold, peers, names, memory)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="lines whose name has this in it")
    parser.add_argument("--dir", default=None, help="where to measure; default: the directory for temporary files")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    terminate_as_interrupt()
    directory = Path(tempfile.mkdtemp(prefix="cachefs-bench-", dir=arguments.dir))
    place = Place(directory)
    try:
        wanted = lambda what: arguments.only in what  # noqa: E731
        lines = [line for group in GROUPS for line in group(place, wanted)]
        medium = medium_of(directory)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    if arguments.json:
        facts = [{"what": each.what, "required": each.required, "measured": each.ratios} for each in lines]
        print(json.dumps({"medium": medium, "lines": facts}))
        return
    console = Console(width=None if sys.stdout.isatty() else 150)
    table = Table(title=f"{ROUNDS} rounds, cache and native on {medium}")
    for column in ("", "required", "median", "lowest", "highest", "reached", ""):
        table.add_column(column, justify="right" if column else "left")
    for line in lines:
        sign = "<=" if line.at_most else ">="
        if not line.ratios:
            table.add_row(line.what, f"{sign} {line.required:g}", "", "", "", "not measured", line.note)
            continue
        values = (f"{each:.2f}" for each in (line.median, min(line.ratios), max(line.ratios)))
        table.add_row(line.what, f"{sign} {line.required:g}", *values, "yes" if line.reached else "NO", line.note)
    console.print(table)


if __name__ == "__main__":
    main()
