"""The adapters: each shows the same files from the same server, keeps them where it was told, and leaves nothing."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import server
from bench.data import PIECE, random_pieces, write_native
from bench.systems import serving
from bench.systems.base import Missing, Mounted, Source, System
from bench.systems.registry import SYSTEMS
from bench.systems.serving import is_running
from cachefs.fuse import all_mounts, probe
from cachefs.testing.s3server import S3Server

FILES = {"top": 10, "a/empty": 0, "a/b/small": 112_000, "large": 3 * PIECE + 1}


@pytest.fixture
def source(tmp_path: Path, s3_server: S3Server) -> Source:
    native = tmp_path / "native" / "set"
    write_native(native, FILES, seed=0)
    server.make_bucket(s3_server, "bench-set")
    s3_server.put_objects("bench-set", ((f"data/{path}", (native / path).read_bytes()) for path in FILES))
    return Source(
        endpoint=s3_server.endpoint,
        key=s3_server.key,
        secret=s3_server.secret,
        bucket="bench-set",
        prefix="data",
        native=native,
        size_bytes=sum(FILES.values()),
        files=len(FILES),
        traffic_url=s3_server.metrics_url,
    )


# It takes seconds to come up, and differs in a flag alone.
_SLOW = {"cachefs_pyfuse3": [pytest.mark.slow]}


@pytest.mark.parametrize("name", [pytest.param(each, marks=_SLOW.get(each, ())) for each in SYSTEMS])
def test_every_system_shows_the_same_files(name: str, tmp_path: Path, source: Source) -> None:
    system: System = SYSTEMS[name]()
    try:
        assert system.check()
    except Missing as missing:
        pytest.skip(str(missing))
    place = tmp_path / "place"
    place.mkdir()
    with system.mounted(source, place, 1 << 30) as mounted:
        assert mounted.system == name
        assert all(is_running(pid) for pid in mounted.pids) and (mounted.pids or name == "native")
        before = server.traffic(source.traffic_url)
        # In this order: who asks for a file does not know its directory yet.
        for path in sorted(FILES, reverse=True):
            assert (mounted.path / path).read_bytes() == (source.native / path).read_bytes(), path
        system.settle(mounted)
        least = source.size_bytes if name != "native" else 0
        sent = server.traffic(source.traffic_url, before.sent_bytes + least).since(before)
        assert sorted(each.name for each in mounted.path.iterdir() if not each.name.startswith(".")) == [
            "a",
            "large",
            "top",
        ]
        if name != "native":
            assert source.size_bytes <= sent.sent_bytes <= 1.1 * source.size_bytes
            cached = sum(each.stat().st_blocks * 512 for each in place_files(place, mounted.path))
            assert cached >= source.size_bytes
        else:
            assert sent.sent_bytes == 0
        assert all(isinstance(value, float) for _, value in system.explain(mounted))
    assert not any(is_running(pid) for pid in mounted.pids)
    assert not [each for each in all_mounts() if each.mountpoint.startswith(str(tmp_path))]
    assert not any(str(tmp_path) in flag for flag in system.flags())


def place_files(place: Path, mounted: Path) -> list[Path]:
    """What a system keeps; not what it shows."""
    found: list[Path] = []
    for each in place.iterdir():
        if each != mounted:
            found += [each] if each.is_file() else [below for below in each.rglob("*") if below.is_file()]
    return found


def test_the_server_counts_bodies_of_gets_alone(s3_server: S3Server) -> None:
    server.make_bucket(s3_server, "counted")
    s3_server.put_objects("counted", [("one", bytes(300_000))])
    client = s3_server.client()
    before = server.traffic(s3_server.metrics_url)

    def counted(expected: server.Traffic) -> bool:
        """It counts what it has sent a moment after whoever asked for it has it."""
        give_up = time.monotonic() + 60
        while (found := server.traffic(s3_server.metrics_url).since(before)) != expected:
            if time.monotonic() > give_up:
                raise AssertionError(f"{found} instead of {expected}")
            time.sleep(0.05)
        return True

    try:
        client.head_object(Bucket="counted", Key="one")
        client.list_objects_v2(Bucket="counted")
        assert server.traffic(s3_server.metrics_url).since(before).sent_bytes == 0
        assert len(client.get_object(Bucket="counted", Key="one", Range="bytes=7-1006")["Body"].read()) == 1000
        assert counted(server.Traffic(sent_bytes=1000, reads=2))
        assert len(client.get_object(Bucket="counted", Key="one")["Body"].read()) == 300_000
        assert counted(server.Traffic(sent_bytes=301_000, reads=3))
        server.remove_buckets(s3_server, "counted")
        assert "counted" not in [each["Name"] for each in client.list_buckets()["Buckets"]]
    finally:
        client.close()


def test_content_is_the_same_every_time_and_differs_between_files() -> None:
    def content(path: str, size: int, seed: int = 0) -> bytes:
        return b"".join(random_pieces(path, size, seed))

    size = 2 * PIECE + 5
    first = content("a", size)
    assert len(first) == size
    assert content("a", size) == first
    assert content("a", 1000) == first[:1000]
    assert len({first, content("b", size), content("a", size, seed=1)}) == 3
    assert first[:PIECE] != first[PIECE : 2 * PIECE]


@pytest.mark.slow
@pytest.mark.parametrize("name", [each for each in SYSTEMS if each != "native"])
def test_the_kernel_believes_what_every_system_told_it(name: str, tmp_path: Path, source: Source) -> None:
    system: System = SYSTEMS[name]()
    try:
        system.check()
    except Missing as missing:
        pytest.skip(str(missing))
    place = tmp_path / "place"
    place.mkdir()
    with system.mounted(source, place, 1 << 30) as mounted:
        path = mounted.path / "a" / "b" / "small"
        path.stat()
        # What libfuse says where it was not told anything.
        time.sleep(1.1)
        for pid in mounted.pids:
            os.kill(pid, signal.SIGSTOP)
        looking = subprocess.Popen(["test", "-f", path])
        try:
            assert looking.wait(60) == 0
        finally:
            for pid in mounted.pids:
                os.kill(pid, signal.SIGCONT)
            looking.wait()


@pytest.mark.skipif(not probe().passthrough_possible, reason="the bare server of this test needs it")
def test_who_only_mounts_is_none_of_the_processes_of_a_mount(tmp_path: Path, source: Source) -> None:
    """Ending is no crash of theirs."""
    mounting = tmp_path / "fusermount3"
    mounting.symlink_to(shutil.which("sleep") or "")
    place = tmp_path / "place"
    place.mkdir()
    served = f"{sys.executable} -m bench.bare_fuse {source.native} {place / 'mnt'}"
    command = ["sh", "-c", f"{mounting} 100 & exec {served}"]
    environment = {"PYTHONPATH": str(Path(__file__).parent.parent.parent)}
    with serving.serving(command, place / "mnt", place, environment) as pids:
        assert len(pids) == 1 and "fusermount" not in Path(f"/proc/{pids[0]}/comm").read_text()


def test_others_are_given_time_for_their_caches(
    tmp_path: Path, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "place" / "cache").mkdir(parents=True)
    (tmp_path / "place" / "mnt").mkdir()
    (tmp_path / "place" / "cache" / "block").write_bytes(bytes(8192))
    (tmp_path / "place" / "mnt" / "shown").write_bytes(bytes(8192))
    path, place = tmp_path / "place" / "mnt", tmp_path / "place"
    mounted = Mounted(system="rclone", path=path, source=source, place=place, facts={}, pids=[])
    assert serving.kept_bytes(mounted) == (place / "cache" / "block").stat().st_blocks * 512 > 0
    grown = iter([0, 10, 20, 30])
    monkeypatch.setattr(serving, "kept_bytes", lambda mounted: next(grown, 30))
    monkeypatch.setattr(serving, "QUIET_S", 0.0)
    monkeypatch.setattr(os, "sync", lambda: None)
    SYSTEMS["rclone"]().settle(mounted)
    assert not list(grown)
    monkeypatch.setattr(serving, "kept_bytes", lambda mounted: time.monotonic())
    monkeypatch.setattr(serving, "SETTLE_LIMIT_S", 0.1)
    with pytest.raises(TimeoutError):
        SYSTEMS["rclone"]().settle(mounted)
