"""One measurement in a process of its own: what a workload finds on one mount, line by line as it finds it.

`python -m bench.measuring` takes a `Task` as JSON on standard input and writes `Said`s as lines on standard output.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import msgspec

from bench.harness import terminate_as_interrupt
from bench.jobs import decode, encode
from bench.results import Figure, Gap, Measure
from bench.systems.base import Mounted
from bench.systems.serving import end_with_parent
from bench.workloads.base import Alone
from bench.workloads.registry import loaded

ROOT = Path(__file__).parent.parent
POLITE_S = 45.0
"""For those who have processes of their own to end."""
KILLED_S = 15.0
_LOG_TAIL_BYTES = 800


class Task(msgspec.Struct, frozen=True, kw_only=True):
    workload: str
    """Address of its class, see `registry.address_of`."""
    scale: str
    options: dict[str, str]
    round: int = 0
    mounted: Mounted | None = None
    """Or, for those that work alone:"""
    directory: Path | None = None


class Said(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One of them."""

    figure: Figure | None = None
    measure: Measure | None = None
    gap: Gap | None = None
    error: str | None = None


class HungError(Exception):
    pass


class FailedError(Exception):
    """Says what the workload said."""


def measured(task: Task, limit_s: float, log: Path, unblock: Callable[[], None]) -> Iterator[Figure | Measure | Gap]:
    """What the workload yields, as it yields it. The process and all of its group are gone at the end; where killing it
    is not enough, since it waits for the kernel, `unblock` is called.

    Raises HungError after `limit_s`, and FailedError.
    """
    with log.open("ab") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "bench.measuring"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            cwd=ROOT,
            start_new_session=True,
            preexec_fn=end_with_parent,
        )
    assert process.stdin is not None and process.stdout is not None
    deadline = time.monotonic() + limit_s
    try:
        with suppress(BrokenPipeError):
            process.stdin.write(encode(task))
            process.stdin.close()
        for line in _lines(process.stdout.fileno(), deadline, limit_s):
            said = msgspec.json.decode(line, type=Said)
            if said.error is not None:
                raise FailedError(said.error)
            found = said.figure or said.measure or said.gap
            assert found is not None
            yield found
        # It has closed its output: it is ending.
        try:
            status = process.wait(max(1.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise HungError(f"it did not end after {limit_s:g} s") from None
        if status != 0:
            tail = log.read_bytes()[-_LOG_TAIL_BYTES:].decode(errors="replace").strip()
            raise FailedError(f"the measuring process ended with status {status}: {tail}")
    finally:
        _end(process, unblock, POLITE_S if task.mounted is None else 0.0)


def _lines(fd: int, deadline: float, limit_s: float) -> Iterator[bytes]:
    rest = b""
    while True:
        readable, _, _ = select.select([fd], [], [], max(0.0, deadline - time.monotonic()))
        if not readable:
            raise HungError(f"it was not done after {limit_s:g} s")
        data = os.read(fd, 1 << 16)
        if not data:
            return
        *lines, rest = (rest + data).split(b"\n")
        yield from lines


def _end(process: subprocess.Popen[bytes], unblock: Callable[[], None], polite_s: float) -> None:
    if process.poll() is None and polite_s:
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(polite_s)
    # Its readers, too, where it is gone already.
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    try:
        process.wait(1.0)
    except subprocess.TimeoutExpired:
        unblock()
        with suppress(subprocess.TimeoutExpired):
            process.wait(KILLED_S)
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        with suppress(OSError):
            pipe.close()


def perform(task: Task) -> Iterator[Said]:
    workload = loaded(task.workload, task.scale, task.options)
    if isinstance(workload, Alone):
        assert task.directory is not None
        for each in workload.run(task.directory):
            yield Said(gap=each) if isinstance(each, Gap) else Said(measure=each)
        return
    assert task.mounted is not None
    for found in workload.measure(task.mounted, task.round):
        yield Said(gap=found) if isinstance(found, Gap) else Said(figure=found)


def main() -> int:
    # What a workload prints is no result.
    output = os.dup(1)
    os.dup2(2, 1)
    terminate_as_interrupt()
    task = decode(sys.stdin.buffer.read(), Task)

    def say(said: Said) -> None:
        line = msgspec.json.encode(said) + b"\n"
        while line:
            line = line[os.write(output, line) :]

    try:
        for each in perform(task):
            say(each)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        traceback.print_exc()
        say(Said(error=f"{type(error).__name__}: {error}"))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
