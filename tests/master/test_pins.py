"""What is pinned, and what lies below it, over a real database; and telling it again when it changes."""

from __future__ import annotations

from contextlib import aclosing
from pathlib import Path

import pytest
import trio
import trio.testing

from cachefs.master.pins import Pins, outermost
from cachefs.meta import Found, MetaStore, open_meta_store
from cachefs.model import ROOT_INO, BlockId, ContentKey, Geometry, Kind, ObjectInfo

ORIGIN = "s3://e/b"
GEOMETRY = Geometry(1 << 20, 1 << 16)


def put(store: MetaStore, path: str, size: int | None, tag: str = "e1") -> ContentKey:
    """A file of that size, or a directory; returns its key."""
    inode = store.get(ROOT_INO)
    for name in path.split("/")[:-1]:
        assert inode is not None
        inode = store.child(inode.attr.ino, name)
    assert inode is not None
    info = ObjectInfo(path, Kind.DIRECTORY if size is None else Kind.FILE, size or 0, 0, "" if size is None else tag)
    return store.put_child(inode, ORIGIN, Found(path.rpartition("/")[2], info)).entries[0].attr.key


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, ContentKey]:
    with open_meta_store(str(tmp_path)) as store:
        store.attach([("/", ORIGIN)])
        for path in ("a", "a/b", "c"):
            put(store, path, None)
        return {path: put(store, path, size) for path, size in FILES.items()}


FILES = {"a/1": 1, "a/b/2": 5000, "a/b/3": 0, "c/4": (3 << 20) + 1, "5": 10}


async def told(pins: Pins) -> set[ContentKey]:
    found = b""
    async with aclosing(pins.contents()) as parts:
        async for part in parts:
            found += part.keys
            if part.last:
                break
    return {ContentKey(found[at : at + 16]) for at in range(0, len(found), 16)}


async def test_all_keys_at_and_below_pins_are_told(tmp_path: Path, keys: dict[str, ContentKey]) -> None:
    with open_meta_store(str(tmp_path)) as store:
        for paths, files in (
            ([], []),
            (["/a"], ["a/1", "a/b/2", "a/b/3"]),
            (["/a/b", "/5"], ["a/b/2", "a/b/3", "5"]),
            (["/a/b/2", "/nowhere", "/a/1/x"], ["a/b/2"]),
            (["/"], list(FILES)),
        ):
            store.remove_pins(store.pins())
            store.add_pins(paths)
            assert await told(Pins(store)) == {keys[name] for name in files}


def test_what_is_superseded_is_not_told_and_everything_is_told_again_after_a_change(
    tmp_path: Path, keys: dict[str, ContentKey]
) -> None:
    with open_meta_store(str(tmp_path)) as store:
        store.add_pins(["/a/b"])
        trio.run(_changes, store, keys, clock=trio.testing.MockClock(autojump_threshold=0))


async def _changes(store: MetaStore, keys: dict[str, ContentKey]) -> None:
    pins = Pins(store)
    outer = store.child(ROOT_INO, "a")
    assert outer is not None
    async with aclosing(pins.contents()) as parts:

        async def whole() -> set[bytes]:
            found = b""
            async for part in parts:
                found += part.keys
                if part.last:
                    break
            return {found[at : at + 16] for at in range(0, len(found), 16)}

        assert await whole() == {keys["a/b/2"], keys["a/b/3"]}
        changed = put(store, "a/b/2", 6000, "e2")
        pins.note_change(store.child(outer.attr.ino, "b"))
        assert await whole() == {changed, keys["a/b/3"]}
        store.remove_child(outer.attr.ino, "b")
        pins.note_change(outer)
        assert await whole() == set()
        # What happens elsewhere is of no interest.
        pins.note_change(store.child(ROOT_INO, "c"))
        with trio.move_on_after(1000) as scope:
            await whole()
        assert scope.cancelled_caught


async def test_amounts_count_each_file_once_and_what_it_takes(tmp_path: Path, keys: dict[str, ContentKey]) -> None:
    with open_meta_store(str(tmp_path)) as store:
        pins = Pins(store)
        amount = await pins.measure(["/a", "/a/b", "/a/b/2"], GEOMETRY)
        assert (amount.files, amount.bytes, amount.needed_bytes) == (3, 5001, 2 * 4096 + 3 * 4096)
        # Nothing has to be held of what is empty.
        assert (amount.cached_files, amount.cached_bytes) == (1, 0)
        blocks = [(BlockId(keys["c/4"], index), 1) for index in (0, 2)]
        store.report("w1", 1, blocks, [], ())
        store.report("w2", 2, [*blocks, (BlockId(keys["a/1"], 0), 1)], [], ())
        amount = await pins.measure(["/"], GEOMETRY)
        assert (amount.files, amount.cached_files, amount.cached_bytes) == (5, 2, 1 + (2 << 20))
        assert (await pins.measure(["/a/1"], GEOMETRY)).cached_bytes == 1


def test_which_pin_covers_a_path(tmp_path: Path, keys: dict[str, ContentKey]) -> None:
    with open_meta_store(str(tmp_path)) as store:
        assert Pins(store).covers("/a") is None
        store.add_pins(["/a", "/a/b/2"])
        pins = Pins(store)
        assert [pins.covers(path) for path in ("/", "/ab", "/a", "/a/b", "/a/b/2", "/a/b/2/x")] == [
            *(None, None, "/a", "/a", "/a/b/2", "/a/b/2"),
        ]
    assert outermost(["/a/b", "/a", "/ab", "/a"]) == ["/a", "/ab"] and outermost(["/a", "/"]) == ["/"]
