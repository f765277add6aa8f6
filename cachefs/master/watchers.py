"""Who wants to hear what changes in the namespace, and what each has not been told yet."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import trio

from cachefs.model import Ino
from cachefs.wire.messages import Changes

MOST_NAMES = 10_000
"""Remembered for one watcher; when more changed since it last listened, it is told to believe nothing."""


class Watcher:
    """Made by `Watchers.watch`."""

    def __init__(self) -> None:
        self._names: dict[Ino, set[str]] = {}
        self._count = 0
        self._everything = False
        self._wanted = trio.Event()

    @property
    def has_news(self) -> bool:
        """Whether `next` would answer at once."""
        return self._wanted.is_set()

    async def next(self) -> Changes:
        """What changed since the last call, as soon as there is something."""
        await self._wanted.wait()
        self._wanted = trio.Event()
        changes = Changes([(ino, sorted(names)) for ino, names in self._names.items()], self._everything)
        self._names, self._count, self._everything = {}, 0, False
        return changes

    def tell(self, directory: Ino, names: Iterable[str]) -> None:
        if self._everything:
            return
        known = self._names.setdefault(directory, set())
        before = len(known)
        known.update(names)
        self._count += len(known) - before
        if self._count > MOST_NAMES:
            self.tell_everything()
        self._wanted.set()

    def tell_everything(self) -> None:
        self._names, self._count, self._everything = {}, 0, True
        self._wanted.set()


class Watchers:
    """Called from one trio thread. Telling never waits: a watcher that does not listen costs bounded memory."""

    def __init__(self) -> None:
        self._watching: set[Watcher] = set()

    def __len__(self) -> int:
        return len(self._watching)

    @contextmanager
    def watch(self) -> Iterator[Watcher]:
        """Hears of everything that is told from now on, until the block ends."""
        watcher = Watcher()
        self._watching.add(watcher)
        try:
            yield watcher
        finally:
            self._watching.discard(watcher)

    def tell(self, directory: Ino, names: Iterable[str]) -> None:
        """That these names may point at something else now."""
        names = list(names)
        if names:
            for watcher in self._watching:
                watcher.tell(directory, names)

    def tell_everything(self) -> None:
        """That more changed than can be named."""
        for watcher in self._watching:
            watcher.tell_everything()
