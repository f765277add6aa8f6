"""Reading samples, by whichever process of whichever data loader."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator

from bench.training import formats
from bench.training.plan import Job, files_of_worker, first_samples, shards_of_worker, shuffled

SIDE = 224
PIECE = 1 << 20
"""Shards are read in pieces of this size."""


class Samples:
    """Reads the samples of a job. Not for several threads.

    Raises OSError, and ValueError for what has another size, or is not what it should be.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        layout = job.layout
        self._scratch = memoryview(bytearray(max(max(sizes) for sizes in layout.sizes) + 1))
        self._first = first_samples(layout)
        self._nothing = memoryview(bytes(job.delivered))

    def of_worker(self, epoch: int, worker: int) -> Iterator[tuple[int, memoryview, int]]:
        """Number of the sample, what the trainer gets of it (until the next one), and how many bytes were read."""
        if self.job.layout.kind in ("files", "synthetic"):
            for number in files_of_worker(self.job, epoch, worker):
                yield number, *self.read(number)
        else:
            stream = self._from_shards(shards_of_worker(self.job, epoch, worker))
            for number, content in shuffled(stream, self.job.buffer, f"{self.job.seed}/{epoch}/{worker}"):
                yield number, self._prepared(memoryview(content)), len(content)

    def read(self, number: int) -> tuple[memoryview, int]:
        """Of a data set of single files."""
        layout = self.job.layout
        if layout.kind == "synthetic":
            return self._nothing, 0
        path, scratch, size = layout.paths[number], self._scratch, 0
        fd = os.open(os.path.join(self.job.root, path), os.O_RDONLY)
        try:
            while count := os.readv(fd, [scratch[size:]]):
                size += count
        finally:
            os.close(fd)
        self._compare(path, size, layout.sizes[number][0])
        return self._prepared(scratch[:size]), size

    def _from_shards(self, shards: list[int]) -> Iterator[tuple[int, bytes]]:
        layout = self.job.layout
        read = formats.read_tar if layout.kind == "tar" else formats.read_tfrecord
        for shard in shards:
            path, sizes = layout.paths[shard], layout.sizes[shard]
            count = 0
            with open(os.path.join(self.job.root, path), "rb", buffering=PIECE) as file:
                for content in read(file):
                    if count < len(sizes):
                        self._compare(f"sample {count} of {path}", len(content), sizes[count])
                        yield self._first[shard] + count, content
                    count += 1
            if count != len(sizes):
                raise ValueError(f"{path} has {count} samples instead of {len(sizes)}")

    def _compare(self, what: str, size: int, expected: int) -> None:
        if size != expected:
            raise ValueError(f"{what} has {size} bytes instead of {expected}")

    def _prepared(self, content: memoryview) -> memoryview:
        if not self.job.decode:
            return content[: self.job.delivered]
        from PIL import Image

        with Image.open(io.BytesIO(content)) as image:
            return memoryview(image.convert("RGB").resize((SIDE, SIDE)).tobytes())
