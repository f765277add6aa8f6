"""A process of our data loader: fills batches in memory that it shares with the trainer.

Takes its job on standard input, then commands; answers on standard output. Ends with its parent.
"""

from __future__ import annotations

import mmap
import os
import signal
import struct
import sys
from array import array
from collections.abc import Iterator
from itertools import islice
from typing import BinaryIO

import msgspec

from bench.training.plan import Job
from bench.training.processes import die_with_parent
from bench.training.samples import Samples

COMMAND = struct.Struct("<cI")
"""b"e": begin this epoch, not answered. b"f": fill this slot. What a sample does not fill stays as it was."""
ANSWER = struct.Struct("<iQ")
"""Samples, of which the numbers follow as u32 (0: the epoch has no more); bytes read. FAILED: length of a message."""
FAILED = -1


class Start(msgspec.Struct, frozen=True, kw_only=True):
    job: Job
    worker: int
    memory: int
    """Descriptor; this worker's slots lie one after another from `offset`."""
    offset: int
    slots: int
    parent: int


def slot_bytes(job: Job) -> int:
    return job.batch * job.delivered


def main(commands: BinaryIO, answers: BinaryIO) -> None:
    (length,) = struct.unpack("<I", commands.read(4))
    start = msgspec.json.decode(commands.read(length), type=Start)
    die_with_parent(start.parent)
    # The terminal tells all of them; who started this one ends it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    job, size = start.job, slot_bytes(start.job)
    memory = memoryview(mmap.mmap(start.memory, 0))[start.offset : start.offset + start.slots * size]
    memory[:] = bytes(len(memory))
    samples = Samples(job)
    _answer(answers, ANSWER.pack(0, 0))
    stream: Iterator[tuple[int, memoryview, int]] = iter(())
    while len(command := commands.read(COMMAND.size)) == COMMAND.size:
        kind, number = COMMAND.unpack(command)
        if kind == b"e":
            stream = samples.of_worker(number, start.worker)
            continue
        ids = array("I")
        read = 0
        try:
            for place, (sample, content, count) in enumerate(islice(stream, job.batch)):
                begin = number * size + place * job.delivered
                memory[begin : begin + len(content)] = content
                ids.append(sample)
                read += count
        except (OSError, ValueError) as error:
            message = f"{type(error).__name__}: {error}".encode()
            _answer(answers, ANSWER.pack(FAILED, len(message)) + message)
            return
        _answer(answers, ANSWER.pack(len(ids), read) + ids.tobytes())


def _answer(answers: BinaryIO, data: bytes) -> None:
    answers.write(data)
    answers.flush()


if __name__ == "__main__":
    try:
        main(sys.stdin.buffer, sys.stdout.buffer)
    except BrokenPipeError:
        os._exit(1)
