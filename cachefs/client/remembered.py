"""What is known of names and inodes, packed: some 300 bytes for a name and its attributes, Python's included.

An inode is one record of fixed layout; a name is its directory's number and its bytes, and points at a number. Since a
number has one name, for how long the name is believed is in the record too. What was put longest ago makes room, one
for one: the limit is what is held when there is more to hold.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from itertools import islice
from typing import Generic, NamedTuple, TypeVar

from cachefs.model import NO_INO, Attr, ContentKey, Ino, Kind

K = TypeVar("K")
V = TypeVar("V")

# Attributes: believed until, under which generation; the name: the same. Flags, shape, size, mtime. Then the key.
_RECORD = struct.Struct("<dIdIBHQq")
_PARENT = struct.Struct("<Q")
_SUPERSEDED = 1
_SEGMENTS = 4
_NEVER = -1.0
_SHAPES = 1 << 16
_RECALLED_AT_ONCE = 2000


class Known(NamedTuple):
    attr: Attr
    superseded: bool
    expires: float
    generation: int


class Name(NamedTuple):
    ino: Ino
    """NO_INO: there is no such name."""
    expires: float
    generation: int


class Copied(NamedTuple):
    """What is remembered, without how long it is to be believed: as of a moment, for somebody else."""

    layout: str
    """Of the records."""
    shapes: list[tuple[int, int, int, int]]
    records: list[tuple[int, bytes]]
    names: list[tuple[bytes, int]]
    missing: list[bytes]


class _Segments(Generic[K, V]):
    """A dictionary of at most `limit` entries; when there are so many, each new one takes the place of the one that was
    put longest ago.

    Age is known by quarters, and by the order within each: plain dictionaries take half the memory of one that knows
    how to lose its first entry fast, and only the oldest ever loses entries, in its order.
    """

    def __init__(self, limit: int) -> None:
        self._limit = max(1, limit)
        self._segment_limit = max(1, limit // _SEGMENTS)
        self._segments: list[dict[K, V]] = [{}]
        """The newest first."""
        self._oldest: list[K] = []
        """Keys of the last segment that have yet to go, the next one last; some may have gone already."""
        self._count = 0
        self.has_forgotten = False

    def get(self, key: K) -> V | None:
        for segment in self._segments:
            value = segment.get(key)
            if value is not None:
                return value
        return None

    def put(self, key: K, value: V) -> None:
        newest = self._segments[0]
        if key not in newest:
            for segment in self._segments[1:]:
                if segment.pop(key, None) is not None:
                    self._count -= 1
                    break
            if self._count >= self._limit:
                self._forget_one()
            if len(newest) >= self._segment_limit:
                newest = self._begin_segment()
            self._count += 1
        newest[key] = value

    def _forget_one(self) -> None:
        while True:
            last = self._segments[-1]
            while self._oldest:
                if last.pop(self._oldest.pop(), None) is not None:
                    self._count -= 1
                    self.has_forgotten = True
                    return
            if not last and len(self._segments) > 1:
                self._segments.pop()
            self._oldest = list(reversed(self._segments[-1]))

    def _begin_segment(self) -> dict[K, V]:
        segments = [{}, *(segment for segment in self._segments if segment)]
        if len(segments) > _SEGMENTS + 2:
            # Much of them has become younger. Of six with four quarters in them at most, two neighbours are small.
            index = min(range(1, len(segments) - 1), key=lambda at: len(segments[at]) + len(segments[at + 1]))
            segments[index : index + 2] = [segments[index + 1] | segments[index]]
        if segments[-1] is not self._segments[-1]:
            self._oldest = []
        self._segments = segments
        return segments[0]

    def replace(self, key: K, value: V) -> None:
        """Of a key that is there, without making it younger."""
        for segment in self._segments:
            if key in segment:
                segment[key] = value
                return

    def pop(self, key: K) -> V | None:
        for segment in self._segments:
            value = segment.pop(key, None)
            if value is not None:
                self._count -= 1
                return value
        return None

    def clear(self) -> None:
        self._segments = [{}]
        self._oldest = []
        self._count = 0

    def newest(self, most: int) -> list[tuple[K, V]]:
        """So many at most, of those that were put last."""
        return list(islice((item for segment in self._segments for item in reversed(segment.items())), most))

    def __iter__(self) -> Iterator[K]:
        for segment in self._segments:
            yield from segment

    def __len__(self) -> int:
        return self._count


class Remembered:
    """At most `limit` inodes, and as many names of each kind: those that exist, and those that do not."""

    def __init__(self, limit: int) -> None:
        self._records: _Segments[Ino, bytes] = _Segments(limit)
        self._names: _Segments[bytes, Ino] = _Segments(limit)
        self._missing: _Segments[bytes, tuple[float, int]] = _Segments(limit)
        # Kinds, modes and owners come in few combinations.
        self._shapes: list[tuple[Kind, int, int, int]] = []
        self._shape_numbers: dict[tuple[Kind, int, int, int], int] = {}

    @property
    def has_forgotten(self) -> bool:
        """A name had to make room."""
        return self._names.has_forgotten or self._missing.has_forgotten

    def __len__(self) -> int:
        """Inodes."""
        return len(self._records)

    # ---- for somebody else -----------------------------------------------------------------------------------------

    def copy(self, most: int) -> Copied:
        """So many inodes and names of each kind at most, the newest. 40 ms for 100,000: what takes longer is done with
        the copy, in a thread.
        """
        shapes = [(int(kind), mode, uid, gid) for kind, mode, uid, gid in self._shapes]
        names, missing = self._names.newest(most), [key for key, _ in self._missing.newest(most)]
        return Copied(_RECORD.format, shapes, list(self._records.newest(most)), list(names), missing)

    def recall(self, copied: Copied) -> Iterator[None]:
        """Put what is not known here, never to be believed where somebody can be asked. Comes back now and then.

        Raises ValueError for what is no copy.
        """
        if copied.layout != _RECORD.format:
            raise ValueError(f"records of another layout: {copied.layout}")
        shapes = [(Kind(kind), mode, uid, gid) for kind, mode, uid, gid in copied.shapes]
        # What was put last was copied first.
        for count, (number, record) in enumerate(reversed(copied.records)):
            if len(record) < _RECORD.size:
                raise ValueError(f"a record of {len(record)} bytes")
            _, _, _, _, flags, shape, size, mtime_ns = _RECORD.unpack_from(record)
            ino = Ino(number)
            if self._records.get(ino) is None:
                kind, mode, uid, gid = shapes[shape]
                attr = Attr(ino, kind, size, mtime_ns, mode, uid, gid, ContentKey(record[_RECORD.size :]))
                self.put(attr, superseded=bool(flags & _SUPERSEDED), expires=_NEVER, generation=0)
            if count % _RECALLED_AT_ONCE == 0:
                yield
        for count, (key, number) in enumerate(reversed(copied.names)):
            if self._names.get(key) is None and self._missing.get(key) is None:
                self._names.put(key, Ino(number))
            if count % _RECALLED_AT_ONCE == 0:
                yield
        for key in reversed(copied.missing):
            if self._names.get(key) is None and self._missing.get(key) is None:
                self._missing.put(key, (_NEVER, 0))

    # ---- attributes ------------------------------------------------------------------------------------------------

    def known(self, ino: Ino) -> Known | None:
        record = self._records.get(ino)
        if record is None:
            return None
        expires, generation, _, _, flags, shape, size, mtime_ns = _RECORD.unpack_from(record)
        kind, mode, uid, gid = self._shapes[shape]
        attr = Attr(ino, kind, size, mtime_ns, mode, uid, gid, ContentKey(record[_RECORD.size :]))
        return Known(attr, bool(flags & _SUPERSEDED), expires, generation)

    def current(self, ino: Ino, now: float, generation: int) -> Attr | None:
        """The attributes of an inode that a name points at, if they are to be believed: for every open."""
        record = self._records.get(ino)
        if record is None:
            return None
        expires, known_generation, _, _, flags, shape, size, mtime_ns = _RECORD.unpack_from(record)
        if known_generation != generation or expires < now or flags & _SUPERSEDED:
            return None
        kind, mode, uid, gid = self._shapes[shape]
        return Attr(ino, kind, size, mtime_ns, mode, uid, gid, ContentKey(record[_RECORD.size :]))

    def put(self, attr: Attr, *, superseded: bool, expires: float, generation: int) -> None:
        """What is known of its name stays."""
        before = self._records.get(attr.ino)
        name_expires, name_generation = _RECORD.unpack_from(before)[2:4] if before is not None else (_NEVER, 0)
        shape = self._shape_number(attr)
        flags = _SUPERSEDED if superseded else 0
        fixed = _RECORD.pack(
            *(expires, generation, name_expires, name_generation, flags, shape, attr.size_bytes, attr.mtime_ns)
        )
        self._records.put(attr.ino, fixed + attr.key)

    def supersede(self, ino: Ino) -> None:
        record = self._records.get(ino)
        if record is not None:
            fields = list(_RECORD.unpack_from(record))
            fields[4] |= _SUPERSEDED
            self._records.replace(ino, _RECORD.pack(*fields) + record[_RECORD.size :])

    def forget(self, ino: Ino) -> Known | None:
        """What was known."""
        known = self.known(ino)
        self._records.pop(ino)
        return known

    def _shape_number(self, attr: Attr) -> int:
        shape = (attr.kind, attr.mode, attr.uid, attr.gid)
        number = self._shape_numbers.get(shape)
        if number is None:
            if len(self._shapes) == _SHAPES:
                # More owners than anybody has: what was known of theirs goes, and is asked for again.
                self._records.clear()
                self._shapes.clear()
                self._shape_numbers.clear()
            number = self._shape_numbers[shape] = len(self._shapes)
            self._shapes.append(shape)
        return number

    # ---- names -----------------------------------------------------------------------------------------------------

    def name(self, parent: Ino, name: str) -> Name | None:
        key = _key(parent, name)
        ino = self._names.get(key)
        if ino is not None:
            record = self._records.get(ino)
            if record is None:
                return Name(ino, _NEVER, 0)
            return Name(ino, *_RECORD.unpack_from(record)[2:4])
        missing = self._missing.get(key)
        return None if missing is None else Name(NO_INO, *missing)

    def put_name(self, parent: Ino, name: str, ino: Ino, *, expires: float, generation: int) -> None:
        """Of an inode that was put before."""
        key = _key(parent, name)
        self._missing.pop(key)
        self._names.put(key, ino)
        record = self._records.get(ino)
        if record is not None:
            fields = list(_RECORD.unpack_from(record))
            fields[2:4] = expires, generation
            self._records.replace(ino, _RECORD.pack(*fields) + record[_RECORD.size :])

    def put_missing(self, parent: Ino, name: str, *, expires: float, generation: int) -> None:
        key = _key(parent, name)
        self._names.pop(key)
        self._missing.put(key, (expires, generation))

    def forget_name(self, parent: Ino, name: str) -> Name | None:
        """What was known."""
        found = self.name(parent, name)
        key = _key(parent, name)
        self._names.pop(key)
        self._missing.pop(key)
        return found

    def existing_names(self) -> Iterator[tuple[Ino, str]]:
        """(directory, name) of those that exist. Nothing may be put or forgotten meanwhile."""
        return map(_split, self._names)

    def names(self) -> list[tuple[Ino, str]]:
        """(directory, name) of all."""
        return [_split(key) for keys in (self._names, self._missing) for key in keys]


def _key(parent: Ino, name: str) -> bytes:
    return _PARENT.pack(parent) + name.encode()


def _split(key: bytes) -> tuple[Ino, str]:
    return Ino(_PARENT.unpack_from(key)[0]), key[_PARENT.size :].decode()
