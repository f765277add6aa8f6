"""Which pages of a block to fetch before anyone asks for them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ReadaheadConfig:
    min_pages: int = 1
    """The first guess, when a handle starts at the beginning or has just turned sequential."""
    max_pages: int = 8
    """64 MiB of 8 MiB pages: enough requests in flight to fill a fast link, and no more memory per reader than that."""


class Readahead:
    """The window of one open handle on one block. Pure: told of accesses, answers what to fetch; not thread-safe.

    The window doubles each time the reader moves on into a page it had not reached, and falls to nothing when it
    jumps. Reads within the pages it is at, and the small reordering the kernel's own read-ahead produces, change
    nothing.
    """

    def __init__(self, page_count: int, config: ReadaheadConfig | None = None) -> None:
        self._page_count = page_count
        self._config = config or ReadaheadConfig()
        self._window = 0
        self._reached = 0
        """End of the furthest page range read since the last jump."""
        self._requested = 0
        """End of what was asked for ahead since the last jump."""

    @property
    def window(self) -> int:
        """Pages kept in flight ahead of the reader now."""
        return self._window

    def access(self, first: int, end: int) -> range:
        """Note that pages [first, end) are being read; returns the pages to fetch ahead, which may be none.

        What is returned was not returned before since the last jump, and never includes the accessed pages.
        """
        if end <= first:
            return range(0)
        if self._is_jump(first):
            self._window = 0
            self._reached = self._requested = end
            return range(0)
        if end <= self._reached:
            return range(0)
        grown = max(self._config.min_pages, 2 * self._window)
        self._window = min(self._config.max_pages, grown)
        self._reached = end
        start = max(end, self._requested)
        stop = min(self._page_count, end + self._window)
        if stop <= start:
            return range(0)
        self._requested = stop
        return range(start, stop)

    def _is_jump(self, first: int) -> bool:
        # One page back is the kernel's reordering of parallel reads; the page after the last one is the next in
        # sequence. Page 0 of a fresh handle counts as in sequence: most files are read from the start.
        return not max(0, self._reached - 2) <= first <= self._reached
