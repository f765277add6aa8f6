"""The S3 server of tests goes when its starter goes, however that ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cachefs.testing.processes import running

STARTER = """
import sys, time
from pathlib import Path
from cachefs.testing.s3server import running_s3_server
with running_s3_server(Path(sys.argv[1])) as server:
    print(server.pid, flush=True)
    time.sleep(600)
"""


def processes_of(group: int) -> list[str]:
    listed = subprocess.run(["ps", "-eo", "pgid,args"], capture_output=True, text=True, check=True).stdout
    return [line for line in listed.splitlines() if line.split()[0] == str(group)]


def wait_gone(group: int) -> None:
    deadline = time.monotonic() + 20
    while processes_of(group):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_killed_starter_takes_its_server_along(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", STARTER, tmp_path], stdout=subprocess.PIPE, text=True) as starter:
        assert starter.stdout is not None
        group = int(starter.stdout.readline())
        assert len(processes_of(group)) >= 2
        starter.kill()
    wait_gone(group)


def test_a_killed_starter_takes_cachefs_along(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    flags = ["--data-dir", tmp_path / "m", "--listen", "127.0.0.1:0", "--mount", f"/=file://{tmp_path / 'data'}"]
    with running("master", *flags, "--insecure") as master:
        group = os.getpgid(master.process.pid)
        assert processes_of(group)
        assert master.end(signal.SIGTERM) == 0
    wait_gone(group)
    with pytest.raises(Exception, match="before it was ready"), running("master", *flags):
        pass
