"""What is read in which order by which process of a data loader: pure, and the same in all of them.

As PyTorch's DataLoader does it. Single files: a permutation of all samples for each epoch, cut into batches, which go
to the workers in turn. Shards: a permutation of the shards for each epoch, of which each worker takes its share, reads
its shards from beginning to end, shuffles in a buffer, and makes batches of its own.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, TypeVar

import msgspec

Kind = Literal["files", "tar", "tfrecord", "synthetic"]
T = TypeVar("T")


class Layout(msgspec.Struct, frozen=True, kw_only=True):
    """A data set of samples, which are counted from 0 through all files."""

    kind: Kind
    """"synthetic": as "files", but nothing is read."""
    paths: list[str]
    """Of files or shards, relative."""
    sizes: list[list[int]]
    """Bytes of the samples in each of `paths`; one where that is the sample's own file."""

    @property
    def samples(self) -> int:
        return sum(map(len, self.sizes))


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What a data loader is to do."""

    layout: Layout
    root: str
    seed: int
    batch: int
    workers: int
    prefetch: int
    """Batches that each worker is ahead, at most."""
    delivered: int
    """Bytes that the trainer gets for each sample."""
    decode: bool = False
    """Samples are JPEGs, and decoded: to 224 x 224 x 3 bytes, which is `delivered`."""
    buffer: int = 256
    """Samples among which those of shards are shuffled."""


def permutation(seed: int, epoch: int, count: int) -> list[int]:
    order = list(range(count))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order


def files_of_worker(job: Job, epoch: int, worker: int) -> Iterator[int]:
    """Samples in the order in which the worker reads them: every batch but the epoch's last one has `job.batch`."""
    order = permutation(job.seed, epoch, job.layout.samples)
    for start in range(worker * job.batch, len(order), job.workers * job.batch):
        yield from order[start : start + job.batch]


def shards_of_worker(job: Job, epoch: int, worker: int) -> list[int]:
    return permutation(job.seed, epoch, len(job.layout.paths))[worker :: job.workers]


def first_samples(layout: Layout) -> list[int]:
    """Number of the first sample of each path."""
    numbers, number = [], 0
    for sizes in layout.sizes:
        numbers.append(number)
        number += len(sizes)
    return numbers


def shuffled(stream: Iterable[T], buffer: int, seed: str) -> Iterator[T]:
    """All of the stream: a random one of the next `buffer`, again and again."""
    random_ = random.Random(seed)
    held: list[T] = []
    for each in stream:
        if len(held) < buffer:
            held.append(each)
            continue
        place = random_.randrange(buffer)
        yield held[place]
        held[place] = each
    random_.shuffle(held)
    yield from held


def missing_or_twice(ids: Sequence[int], samples: int) -> str:
    """Empty if each sample was there once, else what was wrong."""
    if sorted(ids) == list(range(samples)):
        return ""
    lost = len(set(range(samples)) - set(ids))
    return f"of {samples} samples {lost} were lost and {len(ids) - len(set(ids))} came more than once"
