"""What measurements share: reading processes, a `cachefs up` of their own, and data to read."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

END_TIMEOUT_S = 60


@dataclass(frozen=True)
class Up:
    mountpoint: Path
    state_dir: Path
    facts: dict[str, Any]

    def report(self) -> dict[str, Any]:
        """`cachefs report --json` of this instance."""
        record = next(
            json.loads(path.read_text())
            for path in _records().glob("*.json")
            if json.loads(path.read_text())["mountpoint"] == str(self.mountpoint)
        )
        output = subprocess.run(
            [sys.executable, "-m", "cachefs", "report", "--json", "--master", record["master"]],
            check=True,
            capture_output=True,
        ).stdout
        facts: dict[str, Any] = json.loads(output)
        return facts


def _records() -> Path:
    from cachefs.cli.instances import runtime_root

    return Path(runtime_root()) / "instances"


@contextmanager
def running_up(
    url: str, directory: Path, tier: str, ufs_options: Mapping[str, str] | None = None, flags: Sequence[str] = ()
) -> Iterator[Up]:
    """`cachefs up` below `directory`, ended with the block, and by itself should this process be killed."""
    mountpoint, state_dir = directory / "mnt", directory / "state"
    mountpoint.mkdir()
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            where = [url, str(mountpoint), "--state-dir", str(state_dir), "--tier", tier]
            how = ["--log-level", "WARNING", "--supervised", str(theirs.fileno())]
            process = subprocess.Popen(
                [sys.executable, "-m", "cachefs", "up", *where, *how, *flags],
                env={**os.environ, "CACHEFS_UFS_OPTIONS": json.dumps(dict(ufs_options or {}))},
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        try:
            line = b""
            while not line.endswith(b"\n"):
                data = ours.recv(4096)
                if not data:
                    raise SystemExit(f"cachefs up ended with status {process.wait()}; see its message above")
                line += data
            yield Up(mountpoint, state_dir, json.loads(line))
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(END_TIMEOUT_S)


def run_readers(jobs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Run one reading process per job, all at once; returns what each measured."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "bench.reader"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parent.parent,
        )
        for _ in jobs
    ]
    try:
        for process, job in zip(processes, jobs, strict=True):
            assert process.stdin is not None
            process.stdin.write(json.dumps(job).encode())
            process.stdin.close()
        results = []
        for process in processes:
            assert process.stdout is not None
            output = process.stdout.read()
            if process.wait() != 0:
                raise SystemExit("a reader failed; see its message above")
            results.append(json.loads(output))
        return results
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
            if process.stdout is not None:
                process.stdout.close()


def random_bytes(seed: str, size: int) -> bytes:
    return random.Random(seed).randbytes(size)


def terminate_as_interrupt() -> None:
    """Let SIGTERM end this process as Ctrl-C does: through the `finally`s."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
