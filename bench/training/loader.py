"""Our own data loader: processes that read ahead, in the way of PyTorch's DataLoader, for where torch is missing."""

from __future__ import annotations

import importlib.util
import mmap
import os
import struct
import subprocess
import sys
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from bench.training.plan import Job
from bench.training.worker import ANSWER, COMMAND, FAILED, Start, slot_bytes

REPOSITORY = Path(__file__).parent.parent.parent


@dataclass(frozen=True)
class Batch:
    """What is in it is for the trainer until it asks for the next one."""

    ids: list[int]
    bytes_read: int
    content: Any
    """What the trainer gets of each sample: `Job.delivered` bytes, one after another; a memoryview, or a tensor."""


class LoadingFailed(Exception):
    """A worker could not read; the message says what, and why."""


class Loader(ABC):
    """Workers that are started when it is entered, and kept from epoch to epoch. Ended with the block."""

    @abstractmethod
    def epoch(self, number: int) -> Iterator[Batch]:
        """Batches of an epoch, counted from 1. What is not taken of the last one is dropped. Raises LoadingFailed."""

    @abstractmethod
    def __enter__(self) -> Loader: ...

    @abstractmethod
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


def loader_for(job: Job, which: str) -> Loader:
    """`which`: "torch", "own", or "auto", which is torch where it is installed. Raises ImportError."""
    if which == "torch" or (which == "auto" and importlib.util.find_spec("torch") is not None):
        from bench.training.torch_loader import TorchLoader

        return TorchLoader(job)
    return OwnLoader(job)


def loader_name(which: str) -> str:
    """What `loader_for` would take."""
    found = importlib.util.find_spec("torch") is not None
    return "torch" if which == "torch" or (which == "auto" and found) else "own"


class OwnLoader(Loader):
    def __init__(self, job: Job) -> None:
        self.job = job
        self._slots = job.prefetch + 1
        self._workers: list[_Worker] = []

    def __enter__(self) -> OwnLoader:
        job = self.job
        share = self._slots * slot_bytes(job)
        memory = os.memfd_create("batches")
        try:
            os.ftruncate(memory, job.workers * share)
            mapped = memoryview(mmap.mmap(memory, 0))
            for worker in range(job.workers):
                start = Start(
                    job=job,
                    worker=worker,
                    memory=memory,
                    offset=worker * share,
                    slots=self._slots,
                    parent=os.getpid(),
                )
                self._workers.append(_Worker(start, mapped))
            for each in self._workers:
                each.ready()
        except BaseException:
            self._end()
            raise
        finally:
            os.close(memory)
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def epoch(self, number: int) -> Iterator[Batch]:
        for worker in self._workers:
            worker.drain()
        for worker in self._workers:
            worker.begin(number, self.job.prefetch)
        going = list(self._workers)
        while going:
            for worker in list(going):
                batch = worker.answer()
                if not batch.ids:
                    going.remove(worker)
                    continue
                # The trainer works on this slot: one more is free for the worker.
                worker.fill()
                yield batch

    def _end(self) -> None:
        for worker in self._workers:
            worker.end()
        self._workers = []


class _Worker:
    def __init__(self, start: Start, memory: memoryview) -> None:
        self._number = start.worker
        self._slots = start.slots
        size, delivered = slot_bytes(start.job), start.job.delivered
        places = [start.offset + slot * size for slot in range(start.slots)]
        self._contents = [memory[place : place + size].cast("B", (start.job.batch, delivered)) for place in places]
        self._next = 0
        """Slot to be filled."""
        self._oldest = 0
        """Slot whose answer comes next."""
        self._asked = 0
        """Answers to come."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.training.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[start.memory],
            cwd=REPOSITORY,
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._commands, self._answers = self._process.stdin, self._process.stdout
        encoded = msgspec.json.encode(start)
        self._send(struct.pack("<I", len(encoded)) + encoded)

    def begin(self, epoch: int, ahead: int) -> None:
        self._send(COMMAND.pack(b"e", epoch))
        for _ in range(ahead):
            self.fill()

    def fill(self) -> None:
        self._send(COMMAND.pack(b"f", self._next))
        self._next = (self._next + 1) % self._slots
        self._asked += 1

    def ready(self) -> None:
        """Wait until it has started. Raises LoadingFailed."""
        self._read(ANSWER.size)

    def answer(self) -> Batch:
        """Wait for the oldest that was asked for. Raises LoadingFailed."""
        count, number = ANSWER.unpack(self._read(ANSWER.size))
        self._asked -= 1
        if count == FAILED:
            raise self._failure(self._read(number).decode())
        ids = array("I")
        ids.frombytes(self._read(count * ids.itemsize))
        content = self._contents[self._oldest]
        self._oldest = (self._oldest + 1) % self._slots
        return Batch(ids.tolist(), number, content)

    def drain(self) -> None:
        """Drop what was asked for and not taken."""
        while self._asked:
            self.answer()

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        self._answers.close()
        try:
            self._commands.close()
        except BrokenPipeError:
            pass

    def _send(self, data: bytes) -> None:
        try:
            self._commands.write(data)
            self._commands.flush()
        except BrokenPipeError:
            raise self._failure("it has ended") from None

    def _read(self, size: int) -> bytes:
        data = self._answers.read(size)
        if len(data) < size:
            raise self._failure(f"it has ended with status {self._process.wait()}")
        return data

    def _failure(self, why: str) -> LoadingFailed:
        return LoadingFailed(f"worker {self._number} of the data loader: {why}")
