"""Data sets in a bucket, and what a cache needs to hold them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import xxhash

from bench.harness import random_bytes
from cachefs.model import Geometry, KiB, MiB
from cachefs.store.space import estimate
from cachefs.testing.s3server import S3Server

BUCKET = "cluster"


@dataclass
class DataSet:
    """Below `prefix` of the bucket. `per_directory`: size in bytes -> files of that size in each directory."""

    prefix: str
    directories: int
    per_directory: Mapping[int, int]
    checksums: dict[str, str] = field(default_factory=dict)
    """Path in the namespace -> xxh3_64 in hex, once it is in the bucket."""
    sizes: dict[str, int] = field(default_factory=dict)
    """The same -> bytes."""

    @property
    def _sizes(self) -> list[int]:
        each = [size for size, count in self.per_directory.items() for _ in range(count)]
        return each * self.directories

    @property
    def size_bytes(self) -> int:
        return sum(self._sizes)

    @property
    def allocated_bytes(self) -> int:
        """What all of it takes in a tier: data in units of the file system, and a file of checksums for each block."""
        return sum(estimate(size, Geometry().page_count(size)) for size in self._sizes)

    @property
    def paths(self) -> list[str]:
        return list(self.checksums)

    def directory(self, number: int) -> str:
        return f"/{self.prefix}/{number:02}"

    def put(self, server: S3Server) -> None:
        def objects() -> Iterator[tuple[str, bytes]]:
            for directory in range(self.directories):
                number = 0
                for size, count in self.per_directory.items():
                    for _ in range(count):
                        path = f"{self.directory(directory)}/{number:04}"
                        content = random_bytes(path, size)
                        self.sizes[path] = size
                        self.checksums[path] = xxhash.xxh3_64_hexdigest(content)
                        number += 1
                        yield path[1:], content

        server.put_objects(BUCKET, objects())


def cold_data() -> DataSet:
    """400 files of 64 KiB and 8 of 16 MiB, which are two pages each: 153 MiB."""
    return DataSet("cold", 4, {64 * KiB: 100, 16 * MiB: 2})


def epoch_data(prefix: str) -> DataSet:
    """20 directories of 20 files of 64 KiB and 6 of 1 MiB: 145 MiB. A quarter of it would not keep files of 16 MiB."""
    return DataSet(prefix, 20, {64 * KiB: 20, MiB: 6})
