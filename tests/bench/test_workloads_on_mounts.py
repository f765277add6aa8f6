"""Workloads on files, in their smallest scale, on local files and on a mount: they tell all, and it is consistent."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from bench.data import write_native
from bench.epoch import ReadingFailed, look_epoch, read_epoch
from bench.results import Figure, Gap
from bench.server import make_bucket
from bench.systems.base import Mounted, Source
from bench.systems.registry import SYSTEMS
from bench.workloads import fio, small_files
from bench.workloads.base import Scale, Workload
from bench.workloads.fio import Fio, FioFailed, run_fio
from bench.workloads.small_files import SmallFiles
from cachefs.fuse import probe
from cachefs.testing.s3server import S3Server
from tests.bench.measured import Measured
from tests.chaos.leaks import processes_with

BUCKET, PREFIX = "workloads", "all"
needs_fio = pytest.mark.skipif(shutil.which("fio") is None, reason="fio is not installed")
needs_mount = pytest.mark.skipif(not probe().can_mount, reason="nothing can be mounted here")


@contextmanager
def cold_mounts(directory: Path, s3: S3Server) -> Iterator[dict[str, Mounted]]:
    """Name of a workload -> its data on cachefs. It is one mount, with a directory for each."""
    place = directory / "place"
    place.mkdir()
    workloads: list[Workload] = [Fio(Scale.SMOKE), SmallFiles(Scale.SMOKE)]
    make_bucket(s3, BUCKET)
    sources = {each.name: made(each, directory / "native" / each.name, s3) for each in workloads}
    whole = msgspec.structs.replace(sources["fio"], prefix=PREFIX, native=directory / "native")
    with SYSTEMS["cachefs"]().mounted(whole, place, 4 << 30) as mounted:
        yield {
            name: msgspec.structs.replace(mounted, source=source, path=mounted.path / name)
            for name, source in sources.items()
        }


@pytest.fixture
def dropping(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without writing out all that other tests have not: the page cache of what is synced is dropped."""
    monkeypatch.setattr(os, "sync", lambda: None)


def made(workload: Workload, native: Path, s3: S3Server | None = None) -> Source:
    data = workload.data()
    write_native(native, data.files, seed=0)
    if s3 is not None:
        objects = ((f"{PREFIX}/{native.name}/{path}", (native / path).read_bytes()) for path in data.files)
        s3.put_objects(BUCKET, objects)
    return Source(
        endpoint=s3.endpoint if s3 else "",
        key=s3.key if s3 else "",
        secret=s3.secret if s3 else "",
        bucket=BUCKET,
        prefix=f"{PREFIX}/{native.name}",
        native=native,
        size_bytes=data.size_bytes,
        files=len(data.files),
        traffic_url=s3.metrics_url if s3 else "",
    )


def measured_natively(workload: Workload, directory: Path) -> Measured:
    source, place = made(workload, directory / "native"), directory / "place"
    place.mkdir()
    with SYSTEMS["native"]().mounted(source, place, workload.cache_bytes()) as mounted:
        return split(workload, mounted)


def split(workload: Workload, mounted: Mounted) -> Measured:
    told = list(workload.measure(mounted, 0))
    figures = [each for each in told if isinstance(each, Figure)]
    return Measured(figures, [each for each in told if isinstance(each, Gap)])


def assert_consistent(found: Measured) -> None:
    assert len({(each.case, each.metric) for each in found.figures}) == len(found.figures)
    for each in found.figures:
        assert each.value >= 0 and (each.value > 0 or not each.better or each.unit == "B"), each
    middle, high = found.of("p50_s"), found.of("p99_s")
    assert all(middle[case] <= high[case] for case in middle)


def can_drop() -> bool:
    return os.geteuid() == 0 and os.access("/proc/sys/vm/drop_caches", os.W_OK)


def assert_fio_measured_every_case(found: Measured) -> None:
    assert_consistent(found)
    wanted = {str(each) for each in Fio(Scale.SMOKE).cases if each.state != "cached" or can_drop()}
    assert {each.kind for each in found.gaps} <= {"skipped"}
    for metric in ("bytes_per_s", "iops", "p50_s", "p99_s", "p99.9_s", "reading_s_per_gb", "serving_s_per_gb"):
        assert set(found.of(metric)) == wanted, metric
    tail = found.of("p99.9_s")
    assert all(value <= tail[case] for case, value in found.of("p99_s").items())
    rates = found.of("iops")
    for each in found.figures:
        if each.metric == "bytes_per_s":
            assert each.value == pytest.approx(rates[each.case] * fio.SIZES[each.labels["size"]], rel=0.01)


@needs_fio
@pytest.mark.usefixtures("dropping")
def test_fio_measures_every_case_on_local_files(tmp_path: Path) -> None:
    assert_fio_measured_every_case(measured_natively(Fio(Scale.SMOKE), tmp_path))
    assert {path.name for path in (tmp_path / "native").iterdir()} == set(Fio(Scale.SMOKE).data().files)


@needs_mount
@pytest.mark.usefixtures("dropping")
def test_on_a_mount_all_is_measured_and_the_bytes_of_the_under_store_too(tmp_path: Path, s3_server: S3Server) -> None:
    workload = SmallFiles(Scale.SMOKE)
    with cold_mounts(tmp_path, s3_server) as mounts:
        if shutil.which("fio") is not None:
            assert_fio_measured_every_case(split(Fio(Scale.SMOKE), mounts["fio"]))
        found = split(workload, mounts["small_files"])
    assert_consistent(found)
    assert {each.kind for each in found.gaps} <= {"skipped"}
    sent = found.of("under_store_bytes")
    assert set(sent) == {case for case in found.of("files_per_s") if case.startswith("epoch")}
    size = workload.data().size_bytes
    assert all((size <= value <= 2 * size) if "cold" in case else value == 0 for case, value in sent.items())


@pytest.mark.usefixtures("dropping")
def test_small_files_measure_every_epoch_and_walk(tmp_path: Path) -> None:
    found = measured_natively(SmallFiles(Scale.SMOKE), tmp_path)
    assert_consistent(found)
    cases = {"epoch, 4 processes, cold", "epoch, 2 processes, cached", "epoch, 1 process, warm"}
    cases |= {"epoch, 4 processes, warm", "stat of every file, 4 processes, again"}
    if not can_drop():
        cases.remove("epoch, 2 processes, cached")
    assert set(found.of("p99_s")) == cases
    assert set(found.of("files_per_s")) == cases | {"find, first", "find, again", "ls -lR, again"}
    assert not found.of("under_store_bytes"), "local files have no under-store"


def test_a_wrong_byte_ends_the_measurement(tmp_path: Path) -> None:
    """Both kinds compare what they read with the native file."""
    for workload, path in ((SmallFiles(Scale.SMOKE), None), (Fio(Scale.SMOKE), "warm")):
        directory = tmp_path / workload.name
        source = made(workload, directory / "native")
        copy = shutil.copytree(source.native, directory / "copy")
        wrong = copy / (path or next(iter(workload.data().files)))
        content = bytearray(wrong.read_bytes())
        content[1000] ^= 1
        wrong.write_bytes(content)
        mounted = Mounted(system="native", path=copy, source=source, place=directory, facts={}, pids=[])
        if workload.name == "fio" and shutil.which("fio") is None:
            continue
        (gap,) = split(workload, mounted).gaps
        assert gap.kind == "failed" and "WRONG BYTES" in gap.why


def test_without_fio_it_is_said_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    found = measured_natively(Fio(Scale.SMOKE), tmp_path)
    assert not found.figures
    assert [each.kind for each in found.gaps] == ["missing"] and "apt-get install fio" in found.gaps[0].why


@needs_fio
def test_what_fio_complains_about_is_told(tmp_path: Path) -> None:
    environment = {"DIRECTORY": str(tmp_path), "FILE": "none", "BLOCK": "4096", "JOBS": "1", "ENGINE": "psync"}
    environment |= {"DEPTH": "1", "BYTES": "4096", "PART": "0", "SPAN": "4096", "LIMIT_S": "1", "SEED": "1"}
    with pytest.raises(FioFailed, match=r"none|No such file") as raised:
        run_fio(shutil.which("fio") or "", "random", environment, tmp_path, 60.0)
    assert not raised.value.hung
    assert not (tmp_path / "none").exists()


def test_a_program_that_hangs_is_ended(tmp_path: Path) -> None:
    program = tmp_path / "hanging"
    program.write_text("#!/bin/sh\nsleep 100\n:\n")
    program.chmod(0o755)
    with pytest.raises(FioFailed, match="did not end") as raised:
        run_fio(str(program), "random", {}, tmp_path, 0.5)
    assert raised.value.hung
    assert processes_with(str(program)) == {}


def test_the_whole_matrix_has_all_axes_and_files_of_its_own_for_cold_cases() -> None:
    workload = Fio(Scale.FULL)
    assert len({str(each) for each in workload.cases}) == len(workload.cases) == 2 * 3 * 3 * 3 * 3 + 1
    assert len(workload.data().files) == 2 * 3 * 3 * 3 + 1
    chosen = Fio(Scale.FULL, {"cases": "random+4k+64"})
    assert [each.jobs for each in chosen.cases] == [64]
    with pytest.raises(ValueError, match=r"fio.cases=8k: no case .* sequential, random, 4k, 128k, 1M"):
        Fio(Scale.FULL, {"cases": "8k"})


def test_small_files_are_as_large_as_announced() -> None:
    files = small_files.files_of(5000, 50)
    assert files == small_files.files_of(5000, 50)
    assert sum(files.values()) / len(files) == pytest.approx(112_000, rel=0.03)
    shares = [small_files.share_of(files, share, 3) for share in range(3)]
    assert sorted(path for share in shares for path in share) == sorted(files)
    with pytest.raises(ValueError, match=r"small_files\.files=19"):
        SmallFiles(Scale.SMOKE, {"files": "19"})


def test_an_epoch_tells_what_was_read_and_what_could_not_be(tmp_path: Path) -> None:
    paths = [tmp_path / str(number) for number in range(5)]
    for path in paths:
        path.write_bytes(path.name.encode() * 1000)
    epoch = read_epoch([(path, "") for path in paths], 2)
    assert (len(epoch.taken), epoch.bytes, epoch.wrong) == (5, 5000, [])
    assert epoch.taken == sorted(epoch.taken) and epoch.percentile(0) == epoch.taken[0]
    assert epoch.percentile(100) == epoch.taken[-1]
    assert read_epoch([(paths[0], "0123456789abcdef")], 1).wrong == [str(paths[0])]
    with pytest.raises(ReadingFailed, match="No such file"):
        look_epoch([*paths, tmp_path / "none"], 3)
