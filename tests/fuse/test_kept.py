"""What outlives a server: every moment at which it may be killed leaves what its successor reads right."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachefs.fuse import kept
from cachefs.fuse.kept import Found, Kept, KeptError
from cachefs.fusewire import UNIQUE_RESEND
from cachefs.model import Attr, ContentKey, Ino, Kind

Image = dict[int, bytes]
"""Offset -> what was stored there, later ones over earlier ones."""


def attr(node: int) -> Attr:
    return Attr(Ino(node), Kind.FILE, 1000 + node, -5, 0o640, 7, 8, ContentKey(node.to_bytes(16, "big")))


@contextmanager
def memfd() -> Iterator[int]:
    fd = os.memfd_create("test")
    try:
        yield fd
    finally:
        os.close(fd)


class Recording(Kept):
    """Remembers each store: a word is stored at once, a copy byte by byte."""

    def __init__(self, fd: int) -> None:
        self.stores: list[tuple[int, bytes]] = []
        super().__init__(fd)

    def _store(self, word: int, value: int) -> None:
        self.stores.append((word * 8, value.to_bytes(8, "little")))
        super()._store(word, value)

    def _copy(self, offset: int, data: bytes) -> None:
        self.stores += [(offset + at, data[at : at + 5]) for at in range(0, len(data), 5)]
        super()._copy(offset, data)


class Kernel:
    """What the server does around each change: backing ids are given in ascending order, opens are answered."""

    def __init__(self, state: Kept) -> None:
        self.state = state
        self.registered: set[int] = set()
        self.last_id = 0
        self.answered: dict[int, int] = {}
        """Handle -> node of what applications have open."""
        self.unanswered: tuple[int, int] | None = None
        """(unique, handle) of an OPEN whose answer was being prepared."""
        self.ids: dict[int, int | None] = {}
        self.handles: dict[int, set[int]] = {}
        self.next_handle = state.begin_generation()
        self.unique = 0

    def open(self, node: int, passthrough: bool) -> Iterator[None]:
        """One step at a time; a kill may come between any two."""
        self.unique += 2
        self.next_handle += 1
        handle, unique = self.next_handle, self.unique
        if node not in self.ids:
            backing_id = None
            if passthrough:
                self.last_id += 1
                backing_id = self.last_id
                self.registered.add(backing_id)
                yield
                self.state.note_backing_id(backing_id)
                yield
            self.state.add_node(node, attr(node), backing_id)
            self.ids[node] = backing_id
            self.handles[node] = set()
            yield
        self.unanswered = unique, handle
        self.state.add_handle(handle, node, unique)
        yield
        self.answered[handle] = node
        self.handles[node].add(handle)
        self.unanswered = None
        yield

    def close(self, node: int) -> Iterator[None]:
        handle = min(self.handles[node])
        # The kernel has let go of it before it says so.
        del self.answered[handle]
        self.handles[node].discard(handle)
        yield
        self.state.remove_handle(handle)
        yield
        if not self.handles[node]:
            backing_id = self.ids[node]
            if backing_id is not None:
                self.registered.discard(backing_id)
                yield
            self.state.remove_node(node)
            del self.ids[node], self.handles[node]
            yield


def check(kernel: Kernel, state: Kept, closing_handles: set[int]) -> Found:
    """What a successor finds, when the server was killed now."""
    found = state.load()
    opened = {handle: each for each in found.nodes for handle in each.handles}
    if kernel.unanswered is not None:
        unique, handle = kernel.unanswered
        # Sent again, as it was not answered: the handle that nobody got is known.
        again = state.handle_never_given(unique | UNIQUE_RESEND)
        assert again in (None, handle)
        if again is not None:
            opened.pop(again)
    # Nothing that an application has open is lost; what is too much is being closed, and that RELEASE comes again.
    assert set(kernel.answered) <= set(opened) <= set(kernel.answered) | closing_handles
    for handle, node in kernel.answered.items():
        assert opened[handle].node == node
        assert opened[handle].attr == attr(node)
        assert opened[handle].backing_id == kernel.ids[node]
    # No backing id that is used is released, and none that is not stays.
    used = {each.backing_id for each in opened.values()} - {None}
    in_hand = {kernel.ids[node] for node in kernel.answered.values()} - {None}
    assert not set(found.unused_ids) & in_hand
    pending = {each.backing_id for each in found.nodes} - {None}
    assert kernel.registered <= set(found.unused_ids) | used | pending
    return found


STEPS = st.lists(st.tuples(st.booleans(), st.integers(1, 4), st.booleans()), max_size=25)


@given(STEPS)
def test_killed_between_any_two_stores_a_successor_finds_what_is_open(steps: list[tuple[bool, int, bool]]) -> None:
    with memfd() as fd, closing(Recording(fd)) as state, memfd() as other:
        kernel = Kernel(state)
        size = os.fstat(fd).st_size
        os.ftruncate(other, size)
        # The other memory has what was stored so far, and is looked at after each store of a step.
        stored = 0

        def catch_up(to: int) -> None:
            nonlocal stored
            for offset, data in state.stores[stored:to]:
                os.pwrite(other, data, offset)
            stored = to

        for is_open, node, passthrough in steps:
            if not is_open and not kernel.handles.get(node):
                continue
            going = {min(kernel.handles[node])} if not is_open else set()
            catch_up(len(state.stores))
            for _ in kernel.open(node, passthrough) if is_open else kernel.close(node):
                # Stores of the part of the step that has just been done, one by one: before the last of them it is as
                # if the part had not been done, but for what the kernel did.
                while stored < len(state.stores):
                    catch_up(stored + 1)
                    if stored == len(state.stores):
                        break
                    with closing(Kept(other)) as torn:
                        torn.load()  # readable at any moment
                with closing(Kept(other)) as successor:
                    check(kernel, successor, going)


@given(STEPS, st.integers(0, 30))
def test_a_torn_step_is_as_if_it_had_not_begun_or_were_done(steps: list[tuple[bool, int, bool]], torn_at: int) -> None:
    """Killed within the stores of one change to the state."""
    with memfd() as fd, closing(Recording(fd)) as state, memfd() as other:
        os.ftruncate(other, os.fstat(fd).st_size)
        kernel = Kernel(state)
        # The last ones leave a record to be used again, of a node that is still open.
        for is_open, node, passthrough in [*steps, (True, 1, True), (True, 1, True), (False, 1, True)]:
            if is_open or kernel.handles.get(node):
                for _ in kernel.open(node, passthrough) if is_open else kernel.close(node):
                    pass
        before = state.load()
        first = len(state.stores)
        state.add_node(9, attr(9), 77)
        state.add_handle(1 << 50, 9, 123)
        stores = state.stores[: first + torn_at]
        for offset, data in stores:
            os.pwrite(other, data, offset)
        with closing(Kept(other)) as successor:
            found = successor.load()
            assert [each for each in found.nodes if each.node != 9] == before.nodes
            nine = [each for each in found.nodes if each.node == 9]
            if nine:
                assert nine[0].attr == attr(9) and nine[0].handles == {1 << 50}
            else:
                assert len(stores) < len(state.stores)


@given(st.lists(st.binary(max_size=300), min_size=1, max_size=5), st.integers(0, 70))
def test_facts_are_the_earlier_or_the_later_ones(all_facts: list[bytes], torn_at: int) -> None:
    with memfd() as fd, closing(Recording(fd)) as state, memfd() as other:
        os.ftruncate(other, os.fstat(fd).st_size)
        for facts in all_facts:
            state.save_facts(facts)
            assert state.facts == facts
        first = len(state.stores)
        state.save_facts(b"new" * 100)
        for offset, data in state.stores[: first + torn_at]:
            os.pwrite(other, data, offset)
        with closing(Kept(other)) as successor:
            assert successor.facts in (all_facts[-1], b"new" * 100)


def test_a_successor_goes_on_and_gives_no_handle_twice() -> None:
    with memfd() as fd:
        with closing(Kept(fd)) as first:
            handle = first.begin_generation() + 1
            first.add_node(5, attr(5), None)
            first.add_handle(handle, 5, 2)
        with closing(Kept(fd)) as second:
            assert second.load().nodes[0].handles == {handle}
            second.settle()
            assert second.begin_generation() > handle
            second.remove_handle(handle)
            second.remove_handle(handle)
            second.remove_node(5)
            second.remove_node(5)
        with closing(Kept(fd)) as third:
            assert third.load().nodes == []


def test_ids_that_nobody_uses_are_told() -> None:
    with memfd() as fd:
        with closing(Kept(fd)) as first:
            first.note_backing_id(4)
            first.add_node(5, attr(5), 4)
            first.add_handle(1, 5, 2)
            first.note_backing_id(5)  # registered, and killed
        with closing(Kept(fd)) as second:
            # The one after it may have been given, and the server killed before it could say so.
            assert second.load().unused_ids == [5, 6]


def test_a_node_whose_handles_are_gone_is_forgotten() -> None:
    with memfd() as fd:
        with closing(Kept(fd)) as first:
            first.note_backing_id(4)
            first.add_node(5, attr(5), 4)
        with closing(Kept(fd)) as second:
            found = second.load()
            assert (found.nodes, found.unused_ids) == ([], [4, 5])
            second.settle()
            second.add_node(5, attr(5), 9)
            second.add_handle(1, 5, 2)
            (node,) = second.load().nodes
            assert node.backing_id == 9


def test_another_connection_begins_with_nothing() -> None:
    with memfd() as fd, closing(Kept(fd)) as state:
        state.note_backing_id(4)
        state.add_node(5, attr(5), 4)
        state.add_handle(1, 5, 2)
        state.clear()
        found = state.load()
        assert (found.nodes, state.handle_never_given(2)) == ([], None)


def test_too_many_open_files_are_an_error_of_that_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "MAX_HANDLES", 2)
    with memfd() as fd, closing(Kept(fd)) as state:
        for handle in (1, 2):
            state.add_handle(handle, 5, handle)
        with pytest.raises(OSError) as caught:
            state.add_handle(3, 5, 3)
        assert caught.value.errno == errno.ENFILE
        state.remove_handle(1)
        state.add_handle(3, 5, 3)


def test_what_another_version_left_is_refused() -> None:
    with memfd() as fd:
        os.ftruncate(fd, 4096)
        with pytest.raises(KeptError):
            Kept(fd)
    with memfd() as fd:
        with closing(Kept(fd)):
            os.pwrite(fd, (99).to_bytes(8, "little"), 8)
        with pytest.raises(KeptError):
            Kept(fd)
    with memfd() as fd, closing(Kept(fd)) as state:
        state.save_facts(b"facts")
        os.pwrite(fd, b"F", 4096 + 16)
        with pytest.raises(KeptError):
            _ = state.facts
        with pytest.raises(KeptError):
            state.save_facts(bytes(kept.MAX_FACTS + 1))


# ---- names ---------------------------------------------------------------------------------------------------------


def test_names_are_found_whole_or_not_at_all() -> None:
    with memfd() as fd, closing(Kept(fd)) as state:
        size = os.fstat(fd).st_size
        assert (state.names(), state.has_names) == (b"", False)
        state.add_node(5, attr(5), 1)
        state.add_handle(77, 5, 1)
        for names in (b"some names", b"", os.urandom(100_000)):
            state.save_names(names)
            assert (state.names(), state.has_names) == (names, True)
            with closing(Kept(fd)) as successor:
                assert successor.names() == names
                assert [each.node for each in successor.load().nodes] == [5]
        # Written in part, or damaged.
        for cut in (size + 4, size + 24, size + 1000, os.fstat(fd).st_size - 1):
            state.save_names(names)
            os.ftruncate(fd, cut)
            assert state.names() == b""
        state.save_names(names)
        os.pwrite(fd, b"x" * 8, size + 5000)
        assert state.names() == b""
        state.drop_names()
        assert os.fstat(fd).st_size == size and not state.has_names
        assert [each.node for each in state.load().nodes] == [5]


def test_names_for_which_there_is_no_memory_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, data: bytes, offset: int) -> int:
        raise OSError(errno.ENOSPC, "no memory")

    with memfd() as fd, closing(Kept(fd)) as state:
        state.save_names(b"before")
        monkeypatch.setattr("cachefs.fuse.kept.os.pwrite", full)
        with pytest.raises(OSError, match="no memory"):
            state.save_names(b"after")
        assert (state.names(), state.has_names) == (b"", False)
