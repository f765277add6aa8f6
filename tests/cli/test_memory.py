"""What our processes take in memory does not depend on what is read through them, nor on how many read."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from cachefs.fuse import probe
from cachefs.model import MiB
from cachefs.testing.ceilings import CEILINGS, NAMES, measure
from cachefs.testing.pressure import make_files, memory_of
from cachefs.testing.processes import child_of, mountpoint_below, running

pytestmark = pytest.mark.skipif(not probe().can_mount, reason="needs root and /dev/fuse")

FILES, FILE_BYTES = 6, 192 * MiB
READERS = 4
MOST = 300_000_000
"""Bytes, all that a process has: what is promised."""


@pytest.mark.parametrize("promote", ["never", "if-space", "always"])
def test_a_worker_takes_no_more_memory_than_its_slots(tmp_path: Path, promote: str) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for number in range(FILES):
        with (data / str(number)).open("wb") as file:
            file.truncate(FILE_BYTES)
            os.utime(file.fileno(), (1, 1))
    loopback = ["--listen", "127.0.0.1:0", "--insecure"]
    namespace = ["--data-dir", tmp_path / "master", "--mount", f"/={data.as_uri()}", "--ufs-option", "settle=0"]
    # Not all of it fits: the rest is read through, or takes the place of others.
    tier = f"ssd:{tmp_path / 'tier'}:{'800M' if promote != 'never' else '1G'}"
    with running("master", *namespace, *loopback) as master, mountpoint_below(tmp_path) as mountpoint:
        where = ["--master", master.facts["listen"]]
        socket = tmp_path / "socket"
        flags = ["--socket", socket, "--tier", tier, "--promote", promote]
        with (
            running("worker", *where, *flags, *loopback) as worker,
            running("mount", mountpoint, *where, "--insecure", "--worker-socket", socket) as mount,
        ):
            readers = [
                subprocess.Popen(
                    ["cat", *(str(mountpoint / str((number + start) % FILES)) for number in range(FILES))],
                    stdout=subprocess.DEVNULL,
                )
                for start in range(READERS)
            ]
            assert [reader.wait(300) for reader in readers] == [0] * READERS
            peaks = memory_of(worker.process.pid).peak, memory_of(child_of(mount, "mount")).peak
            print(f"{promote}: worker {peaks[0] / 1e6:.0f} MB, mount {peaks[1] / 1e6:.0f} MB")
            assert max(peaks) <= MOST


def test_the_ceilings_hold_under_four_times_the_background_load(tmp_path: Path) -> None:
    data = tmp_path / "data"
    make_files(data, 6, 96 * MiB, NAMES)
    found = measure(tmp_path, data.as_uri(), {"settle": "0"}, 6, "400M", 8.0)
    for name, memory in found.memory.items():
        print(f"{name}: {memory.peak / 1e6:.0f} MB")
        assert memory.peak <= CEILINGS[name.split()[0]], name
    for pressed in found.pressed:
        assert pressed.errors == []
        assert min(pressed.done.get(kind, 0) for kind in ("large", "small")) > 0
    assert min(found.asked["listings"], found.asked["look-ups"]) > 0
