"""Memory for large bodies, used again: the kernel clears each new page of it, which takes as long as receiving does."""

from __future__ import annotations

from collections import deque

_KEPT = 4
"""Bodies, of a page of a block each: for all connections of this process."""
_LEAST = 1 << 20
"""Smaller ones are not worth it."""
_NEARLY = 4096
"""Bodies of pages differ in length by what goes with the page."""


class Bodies:
    """Buffers that were handed out stay the reader's for as long as a view of them lives."""

    def __init__(self, kept: int = _KEPT) -> None:
        self._kept: deque[bytearray] = deque(maxlen=kept)

    def take(self, length: int) -> bytearray:
        """Of exactly that length; what is in it means nothing."""
        if length >= _LEAST:
            for _ in range(len(self._kept)):
                body = self._kept.popleft()
                if abs(len(body) - length) <= _NEARLY and _resized(body, length):
                    return body
                self._kept.append(body)
        return bytearray(length)

    def give(self, body: bytearray) -> None:
        """Its views were handed out; once they are gone it may be taken again."""
        if len(body) >= _LEAST:
            self._kept.append(body)


def _resized(body: bytearray, length: int) -> bool:
    """False, and nothing is done, while anybody has a view of it: the interpreter refuses to change its length then."""
    try:
        body.pop()
    except BufferError:
        return False
    del body[length:]
    body.extend(bytes(length - len(body)))
    return True
