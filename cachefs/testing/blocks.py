"""Blocks with known contents, for tests of tiers and of the store."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from cachefs.model import BlockId, ContentKey, Geometry
from cachefs.store import Partial, SealedReader, page_checksum
from cachefs.store.layout import data_name

PAGE = 4096
GEOMETRY = Geometry(1 << 20, PAGE)
CLUSTER = "test"


class Holder(Protocol):
    """A tier, or a store of several."""

    def open_partial(self, block: BlockId, length: int) -> Partial | None: ...
    def seal(self, partial: Partial) -> None: ...
    def close(self, partial: Partial) -> None: ...


def block(number: int) -> BlockId:
    return BlockId(ContentKey(number.to_bytes(16, "big")), 0)


def content(number: int, length: int) -> bytes:
    return bytes((number * 31 + at * 7 + (at >> 8)) % 251 for at in range(length))


def pages(data: bytes) -> list[bytes]:
    return [data[start : start + PAGE] for start in range(0, len(data), PAGE)]


def some(partial: Partial | None) -> Partial:
    assert partial is not None
    return partial


def seal(store: Holder, which: BlockId, data: bytes) -> None:
    partial = some(store.open_partial(which, len(data)))
    try:
        for number, page in enumerate(pages(data)):
            partial.write_page(number, page, page_checksum(page))
        store.seal(partial)
    finally:
        store.close(partial)


def read(tier_paths: Sequence[str], which: BlockId, length: int) -> bytes | None:
    """As a mount would: by itself, without the worker."""
    fd = SealedReader(tier_paths).open(which, length)
    if fd is None:
        return None
    try:
        return os.pread(fd, length + 1, 0)
    finally:
        os.close(fd)


def sealed_path(tier_path: str, which: BlockId) -> Path:
    return Path(tier_path, "sealed", data_name(which))
