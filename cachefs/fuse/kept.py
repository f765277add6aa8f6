"""What outlives the server of a mount: the open files and how they are open, in a memfd that the keeper holds too.

One page of header, two places for the facts (one of them is current), then a table of open nodes and one of handles.
While the master is away, what is remembered of names comes behind all that, and makes the memfd longer.

    nodes    [state 8][node, attributes, backing id 72][unused 48]     state: 0 free, 1 in use
    handles  [handle 8][node 8][unique 8][unused 8]                    handle: 0 free

A killed process leaves each store done or not, and a copy done in part. So whatever is written takes effect by one last
store of 8 aligned bytes, and a reader may come after any of them. The order around the kernel is:

    open:   register the backing file, note its id, node, handle, answer
    close:  handle, release the backing file, node, answer

so that a successor finds too much, and never too little: nodes without handles are closed, and ids that were given just
before are released unless they are used. A handle carries the `unique` of the OPEN that it answers: if that comes once
more, the answer was never given. System calls are made in the beginning only; an open costs a microsecond.
"""

from __future__ import annotations

import errno
import mmap
import os
import struct
import zlib
from dataclasses import dataclass, field

from cachefs.fusewire import UNIQUE_RESEND
from cachefs.model import Attr, CachefsError, ContentKey, Ino, Kind

MAX_NODES = 1 << 20
MAX_HANDLES = 1 << 22
"""Memory is used for what was ever open at once: 128 and 32 bytes each."""
MAX_FACTS = (1 << 16) - 16

_MAGIC = int.from_bytes(b"cachefs1", "little")
_VERSION = 1
# Words of the header.
_AT_MAGIC, _AT_VERSION, _AT_GENERATION, _AT_NODES, _AT_HANDLES, _AT_LAST_ID, _AT_FACTS = range(7)
_FACTS_AT = 1 << 12
_FACTS_SIZE = 1 << 16
_FACTS_HEAD = struct.Struct("=QQ")
_NODES_AT = _FACTS_AT + 2 * _FACTS_SIZE
_NODE_SIZE = 128
_NODE = struct.Struct("=QQQqIIIIBB6x16s")
_NODE_RECORD = struct.Struct("=Q72s48x")
_HANDLES_AT = _NODES_AT + MAX_NODES * _NODE_SIZE
_HANDLE_SIZE = 32
_HANDLE_RECORD = struct.Struct("=QQQ8x")
_SIZE = _HANDLES_AT + MAX_HANDLES * _HANDLE_SIZE
_NAMES_HEAD = struct.Struct("=8sQQ")
_NAMES_MAGIC = b"names  1"
_NAMES_MOST = 1 << 26
_GENERATION_SHIFT = 40


class KeptError(CachefsError):
    """The state of the mount is none that this version understands."""


@dataclass(frozen=True)
class KeptNode:
    """A file that was open, in one mode."""

    node: int
    attr: Attr
    backing_id: int | None
    """None: in cached mode."""
    handles: set[int] = field(default_factory=set)


@dataclass(frozen=True)
class Found:
    """What an earlier server left."""

    nodes: list[KeptNode]
    unused_ids: list[int]
    """Backing ids that may be registered, and that nobody uses. Release them, then call `Kept.settle`."""


class Kept:
    """One server's hold on the state. Called from one thread. `close` it; the state stays."""

    def __init__(self, fd: int) -> None:
        """`fd`: the memfd, empty or as an earlier server left it; stays the caller's. Raises KeptError."""
        is_new = os.fstat(fd).st_size == 0
        if is_new:
            os.ftruncate(fd, _SIZE)
        elif os.fstat(fd).st_size < _SIZE:
            raise KeptError("the state of this mount was made by another version")
        self._fd = fd
        self._map = mmap.mmap(fd, _SIZE)
        self._bytes = memoryview(self._map)
        self._words = self._bytes.cast("Q")
        if self._words[_AT_MAGIC] == 0:
            self._store(_AT_VERSION, _VERSION)
            self._store(_AT_MAGIC, _MAGIC)
        if self._words[_AT_MAGIC] != _MAGIC or self._words[_AT_VERSION] != _VERSION:
            self.close()
            raise KeptError("the state of this mount was made by another version")
        self._node_slots: dict[int, int] = {}
        self._handle_slots: dict[int, int] = {}
        self._free_nodes: list[int] = []
        self._free_handles: list[int] = []
        self._by_unique: dict[int, int] = {}
        """Handles that earlier servers gave; the answers to some OPENs among them were never sent."""

    def _store(self, word: int, value: int) -> None:
        """Done or not done, whenever this process is killed: memoryview stores 8 aligned bytes at once."""
        self._words[word] = value

    def _copy(self, offset: int, data: bytes) -> None:
        """May be done in part."""
        self._bytes[offset : offset + len(data)] = data

    # ---- facts -----------------------------------------------------------------------------------------------------

    @property
    def facts(self) -> bytes | None:
        """What `save_facts` got last. Raises KeptError when it is damaged."""
        current = self._words[_AT_FACTS]
        if current == 0:
            return None
        at = _FACTS_AT + (current - 1) * _FACTS_SIZE
        length, checksum = _FACTS_HEAD.unpack_from(self._bytes, at)
        start = at + _FACTS_HEAD.size
        found = bytes(self._bytes[start : start + min(length, MAX_FACTS)])
        if len(found) != length or zlib.crc32(found) != checksum:
            raise KeptError("the state of this mount is damaged")
        return found

    def save_facts(self, facts: bytes) -> None:
        if len(facts) > MAX_FACTS:
            raise KeptError(f"facts of {len(facts)} bytes do not fit into {MAX_FACTS}")
        other = 2 if self._words[_AT_FACTS] == 1 else 1
        at = _FACTS_AT + (other - 1) * _FACTS_SIZE
        self._copy(at, _FACTS_HEAD.pack(len(facts), zlib.crc32(facts)) + facts)
        self._store(_AT_FACTS, other)

    # ---- names -----------------------------------------------------------------------------------------------------

    @property
    def has_names(self) -> bool:
        return os.fstat(self._fd).st_size > _SIZE

    def names(self) -> bytes:
        """What `save_names` got last; empty when there is none, or not all of it."""
        head = os.pread(self._fd, _NAMES_HEAD.size, _SIZE)
        if len(head) < _NAMES_HEAD.size:
            return b""
        magic, length, checksum = _NAMES_HEAD.unpack(head)
        if magic != _NAMES_MAGIC or length > _NAMES_MOST:
            return b""
        found = os.pread(self._fd, length, _SIZE + _NAMES_HEAD.size)
        return found if len(found) == length and zlib.crc32(found) == checksum else b""

    def save_names(self, names: bytes) -> None:
        """In the place of those before. From any thread. Raises OSError, without memory for it: there are none then."""
        self.drop_names()
        try:
            written = 0
            while written < len(names):
                written += os.pwrite(self._fd, memoryview(names)[written:], _SIZE + _NAMES_HEAD.size + written)
            os.pwrite(self._fd, _NAMES_HEAD.pack(_NAMES_MAGIC, len(names), zlib.crc32(names)), _SIZE)
        except OSError:
            self.drop_names()
            raise

    def drop_names(self) -> None:
        """Their memory is free."""
        os.ftruncate(self._fd, _SIZE)

    # ---- taking over -----------------------------------------------------------------------------------------------

    def load(self) -> Found:
        """What is open. The earlier server must be gone. Changes nothing yet."""
        nodes: dict[int, KeptNode] = {}
        unused: list[int] = []
        self._node_slots.clear()
        self._handle_slots.clear()
        self._by_unique.clear()
        self._free_nodes, self._free_handles = [], []
        used = self._bytes[_NODES_AT : _NODES_AT + self._words[_AT_NODES] * _NODE_SIZE]
        for slot, (state, packed) in enumerate(_NODE_RECORD.iter_unpack(used)):
            if state == 0:
                self._free_nodes.append(slot)
                continue
            found = _unpack_node(packed)
            nodes[found.node] = found
            self._node_slots[found.node] = slot
        used = self._bytes[_HANDLES_AT : _HANDLES_AT + self._words[_AT_HANDLES] * _HANDLE_SIZE]
        for slot, (handle, node, unique) in enumerate(_HANDLE_RECORD.iter_unpack(used)):
            if handle == 0 or node not in nodes:
                self._free_handles.append(slot)
                continue
            nodes[node].handles.add(handle)
            self._handle_slots[handle] = slot
            self._by_unique[unique] = handle
        in_use = {each.backing_id for each in nodes.values() if each.handles}
        last = self._words[_AT_LAST_ID]
        # The kernel gives ids in ascending order, so the next is the one that was given and not noted any more.
        candidates = [each.backing_id for each in nodes.values() if not each.handles] + [last, last + 1]
        for backing_id in candidates:
            if backing_id and backing_id not in in_use and backing_id not in unused:
                unused.append(backing_id)
        return Found([each for each in nodes.values() if each.handles], unused)

    def settle(self) -> None:
        """After `load`, once the unused ids are released: forget who had them."""
        held = {self._words[_word(_HANDLES_AT, slot, _HANDLE_SIZE) + 1] for slot in self._handle_slots.values()}
        for slot in self._free_handles:
            self._store(_word(_HANDLES_AT, slot, _HANDLE_SIZE), 0)
        for node in [node for node in self._node_slots if node not in held]:
            self.remove_node(node)

    def clear(self) -> None:
        """Forget everything that is open: it is another connection from now on."""
        self.load()
        for handle in list(self._handle_slots):
            self.remove_handle(handle)
        self.settle()
        self._store(_AT_LAST_ID, 0)
        self._by_unique.clear()

    @property
    def generation(self) -> int:
        """How many servers have begun."""
        found: int = self._words[_AT_GENERATION]
        return found

    def begin_generation(self) -> int:
        """The first of this server's handles: none of them was ever used before."""
        generation = self._words[_AT_GENERATION] + 1
        self._store(_AT_GENERATION, generation)
        return generation << _GENERATION_SHIFT

    def handle_never_given(self, unique: int) -> int | None:
        """The handle in an answer to this OPEN that was prepared, and never sent: it comes once more."""
        return self._by_unique.pop(unique & ~UNIQUE_RESEND, None)

    # ---- what is open ----------------------------------------------------------------------------------------------

    def note_backing_id(self, backing_id: int) -> None:
        """The kernel has just given it."""
        self._store(_AT_LAST_ID, backing_id)

    def add_node(self, node: int, attr: Attr, backing_id: int | None) -> None:
        """Raises OSError (ENFILE) when there are too many."""
        slot = self._take(self._free_nodes, _AT_NODES, MAX_NODES)
        packed = _NODE.pack(
            *(node, attr.ino, attr.size_bytes, attr.mtime_ns, backing_id or 0, attr.mode, attr.uid, attr.gid),
            *(int(attr.kind), len(attr.key), attr.key),
        )
        offset = _NODES_AT + slot * _NODE_SIZE
        self._copy(offset + 8, packed)
        self._store(offset >> 3, 1)
        self._node_slots[node] = slot

    def remove_node(self, node: int) -> None:
        """Idempotent."""
        slot = self._node_slots.pop(node, None)
        if slot is not None:
            self._store(_word(_NODES_AT, slot, _NODE_SIZE), 0)
            self._free_nodes.append(slot)

    def add_handle(self, handle: int, node: int, unique: int) -> None:
        """Before the OPEN with this `unique` is answered. Raises OSError (ENFILE) when there are too many."""
        slot = self._take(self._free_handles, _AT_HANDLES, MAX_HANDLES)
        word = _word(_HANDLES_AT, slot, _HANDLE_SIZE)
        self._store(word + 1, node)
        self._store(word + 2, unique & ~UNIQUE_RESEND)
        self._store(word, handle)
        self._handle_slots[handle] = slot

    def remove_handle(self, handle: int) -> None:
        """Idempotent."""
        slot = self._handle_slots.pop(handle, None)
        if slot is not None:
            self._store(_word(_HANDLES_AT, slot, _HANDLE_SIZE), 0)
            self._free_handles.append(slot)

    def _take(self, free: list[int], counter: int, most: int) -> int:
        if free:
            return free.pop()
        slot = self._words[counter]
        if slot >= most:
            raise OSError(errno.ENFILE, f"{most} files are open on this mount, as many as can be")
        self._store(counter, slot + 1)
        return slot

    def close(self) -> None:
        """The state stays with the memfd."""
        self._words.release()
        self._bytes.release()
        self._map.close()


def _word(start: int, slot: int, size: int) -> int:
    return (start + slot * size) >> 3


def _unpack_node(packed: bytes) -> KeptNode:
    node, ino, size_bytes, mtime_ns, backing_id, mode, uid, gid, kind, key_length, key = _NODE.unpack(packed)
    attr = Attr(Ino(ino), Kind(kind), size_bytes, mtime_ns, mode, uid, gid, ContentKey(key[:key_length]))
    return KeptNode(node, attr, backing_id or None)
