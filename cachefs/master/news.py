"""What changed in the namespace, for whoever may have been told something else before."""

from __future__ import annotations

from collections.abc import Sequence

from cachefs.master.denied import Denied
from cachefs.master.pins import Pins
from cachefs.master.quotas import Quotas
from cachefs.master.watchers import Watchers
from cachefs.meta import Inode, Merged
from cachefs.model import Ino


class News:
    """Tells watchers, pins and quotas of each change, once it is in the database. Nothing here waits."""

    def __init__(self, watchers: Watchers, denied: Denied, pins: Pins, quotas: Quotas) -> None:
        self._watchers = watchers
        self._denied = denied
        self._pins = pins
        self._quotas = quotas

    def found(self, directory: Inode, merged: Merged) -> None:
        """Of new names watchers are told only where somebody may have been told that they do not exist."""
        ino = directory.attr.ino
        denied = [name for name in merged.new if self._denied.discard(ino, name)]
        is_known = directory.listed_ns or self._denied.has_forgotten
        self._watchers.tell(ino, merged.moved + (merged.new if is_known else denied))
        if merged.moved or merged.new:
            self._note_change(directory)

    def gone(self, directory: Inode, names: Sequence[str]) -> None:
        """Nothing is told where there are none."""
        if names:
            self._watchers.tell(directory.attr.ino, names)
            self._note_change(directory)

    def attached(self, new: tuple[Ino, str] | None) -> None:
        """An under-store was; `new` is the name that came with it, None if there was a directory above mounts before,
        which has other names now.
        """
        if new is None:
            self._watchers.tell_everything()
        else:
            self._denied.discard(*new)
            self._watchers.tell(new[0], [new[1]])
        self._note_change(None)

    def detached(self) -> None:
        """An under-store was, and all names below it are gone."""
        self._watchers.tell_everything()
        self._note_change(None)

    def _note_change(self, directory: Inode | None) -> None:
        """As `Pins.note_change`."""
        self._pins.note_change(directory)
        self._quotas.note_change(directory)
