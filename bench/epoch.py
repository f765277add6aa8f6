"""Epochs: files that several processes read, each a share, all at once."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from bench.reader import READY

_ENDS_IN_S = 5.0


class ReadingFailed(Exception):
    """A reading process ended before its time; the message is its last line."""


class Epoch(msgspec.Struct, frozen=True):
    taken: list[float]
    """Seconds that each file took, sorted."""
    files_per_s: float
    """By the process that took longest for its share, without comparing."""
    bytes: int
    wrong: list[str]
    """Files with another content than expected."""

    @property
    def bytes_per_s(self) -> float:
        return self.bytes * self.files_per_s / len(self.taken)

    def percentile(self, percent: float) -> float:
        return self.taken[min(len(self.taken) - 1, int(len(self.taken) * percent / 100))]


def read_epoch(files: Sequence[tuple[Path, str]], readers: int) -> Epoch:
    """Open, read and close each, in this order, and compare its xxh3_64 where that is not "". Raises ReadingFailed."""
    jobs = [
        {"job": "read_each", "files": [(str(path), checksum) for path, checksum in files[start::readers]]}
        for start in range(readers)
    ]
    return _epoch(jobs)


def look_epoch(files: Sequence[Path], readers: int) -> Epoch:
    """stat(2) of each. Raises ReadingFailed."""
    return _epoch([{"job": "look_at_each", "files": list(map(str, files[start::readers]))} for start in range(readers)])


def _epoch(jobs: Sequence[dict[str, Any]]) -> Epoch:
    with _readers(jobs) as processes:
        for process in processes:
            if _of(process.stdout).readline().strip() != READY:
                raise ReadingFailed(_last_line(process))
        for process in processes:
            _of(process.stdin).write("\n")
            _of(process.stdin).close()
        results = []
        for process in processes:
            output = _of(process.stdout).read()
            if process.wait() != 0:
                raise ReadingFailed(_last_line(process))
            results.append(json.loads(output))
    taken = sorted(each for result in results for each in result["taken"])
    slowest = max(sum(result["taken"]) for result in results)
    wrong = [path for result in results for path in result.get("wrong", [])]
    return Epoch(taken, len(taken) / slowest, sum(result.get("bytes", 0) for result in results), wrong)


@contextmanager
def _readers(jobs: Sequence[dict[str, Any]]) -> Iterator[list[subprocess.Popen[str]]]:
    processes: list[subprocess.Popen[str]] = []
    try:
        for job in jobs:
            process = subprocess.Popen(
                [sys.executable, "-m", "bench.reader"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                cwd=Path(__file__).parent.parent,
            )
            processes.append(process)
            _of(process.stdin).write(json.dumps(job) + "\n")
            _of(process.stdin).flush()
        yield processes
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            # One that hangs in the kernel is left to who takes the mount away.
            try:
                process.wait(_ENDS_IN_S)
            except subprocess.TimeoutExpired:
                continue
            for stream in (process.stdin, process.stdout, process.stderr):
                _of(stream).close()


def _last_line(process: subprocess.Popen[str]) -> str:
    told = _of(process.stderr).read().strip().splitlines()
    return told[-1] if told else f"a reading process ended with {process.wait()}"


def _of(stream: Any) -> Any:
    assert stream is not None
    return stream
