"""What measurements share: reading processes, a `cachefs up` of their own, and data to read."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cachefs.testing.processes import mountpoint_below, running


@dataclass(frozen=True)
class Up:
    """A running `cachefs up`."""

    mountpoint: Path
    master: str
    pids: list[int] = field(default_factory=list)
    """It and its processes."""

    def report(self) -> dict[str, Any]:
        """`cachefs report --json` of it."""
        command = [sys.executable, "-m", "cachefs", "report", "--json", "--master", self.master]
        facts: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
        return facts


@contextmanager
def running_up(
    url: str,
    directory: Path,
    tier: str,
    ufs_options: Mapping[str, str] | None = None,
    flags: Sequence[str] = (),
    log: Path | None = None,
) -> Iterator[Up]:
    """`cachefs up` below `directory`, ended with the block, and by itself should this process be killed. What it says
    is written to `log`, or to where this process writes.
    """
    environment = {"CACHEFS_UFS_OPTIONS": json.dumps(dict(ufs_options or {}))}
    with ExitStack() as stack:
        output = stack.enter_context(log.open("wb")) if log is not None else None
        mountpoint = stack.enter_context(mountpoint_below(directory))
        state = ["--state-dir", str(directory / "state"), "--tier", tier, "--log-level", "WARNING"]
        started = running("up", url, mountpoint, *state, *flags, environment=environment, stderr=output)
        up = stack.enter_context(started)
        pid = up.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        yield Up(mountpoint, up.facts["master"], [pid, *map(int, children)])


def run_readers(jobs: Sequence[Mapping[str, Any]], module: str = "bench.reader") -> list[dict[str, Any]]:
    """Run one reading process per job, all at once; returns what each measured. `module` is given the job, and knows
    what to do.
    """
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", module],
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
    """Let SIGTERM, or a terminal that goes away, end this process as Ctrl-C does: through the `finally`s, which no
    second signal disturbs. (SIGINT is ignored in a background job.)
    """
    numbers = [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as under nohup
        numbers.append(signal.SIGHUP)

    def interrupt(number: int, frame: object) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt

    for each in numbers:
        signal.signal(each, interrupt)
