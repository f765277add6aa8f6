"""What a worker takes in memory does not depend on what is read through it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from cachefs.fuse import probe
from cachefs.model import MiB
from cachefs.testing.processes import child_of, mountpoint_below, running

pytestmark = pytest.mark.skipif(not probe().can_mount, reason="needs root and /dev/fuse")

FILES, FILE_BYTES = 6, 192 * MiB
READERS = 4
MOST = 300_000_000
"""Bytes, all that a process has: what is promised."""


def peak(pid: int) -> int:
    """Resident memory at its highest, bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024


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
            peaks = peak(worker.process.pid), peak(child_of(mount, "mount"))
            print(f"{promote}: worker {peaks[0] / 1e6:.0f} MB, mount {peaks[1] / 1e6:.0f} MB")
            assert max(peaks) <= MOST
