"""Whole objects, several at a time, each given away in a thread as soon as it is there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import trio

from cachefs.model import ObjectInfo

Data = bytes | bytearray | memoryview

Keep = Callable[[int, Data], None]
"""Called in a thread, where it may block, with the number of an object and its bytes."""
Claim = Callable[[int], bool]
"""Called in whatever thread before an object is asked for: whether it is still wanted."""


class _Ranges(Protocol):
    async def read_range(self, info: ObjectInfo, offset: int, length: int) -> Data: ...


async def read_one_by_one(
    store: _Ranges, infos: Sequence[ObjectInfo], keep: Keep, at_once: int, claim: Claim
) -> list[Exception | None]:
    """`UnderStore.read_files` for a store that has nothing better: by one `read_range` each."""
    outcomes: list[Exception | None] = [None] * len(infos)
    numbers = iter(range(len(infos)))

    async def work() -> None:
        for number in numbers:
            if claim(number):
                try:
                    data = await store.read_range(infos[number], 0, infos[number].size_bytes)
                    await trio.to_thread.run_sync(keep, number, data)
                except Exception as error:
                    outcomes[number] = error

    async with trio.open_nursery() as nursery:
        for _ in range(min(at_once, len(infos))):
            nursery.start_soon(work)
    return outcomes
