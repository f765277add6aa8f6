"""Which contents count for which quotas, told again when it changes; and granting only what is known to be left."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import cast

import pytest
import trio
import trio.testing

from cachefs.master.pins import Pins
from cachefs.master.quotas import Quotas, QuotaShares, check_fits
from cachefs.master.workers import Workers
from cachefs.meta import Found, Inode, MetaStore, open_meta_store
from cachefs.model import ROOT_INO, CapacityError, ContentKey, Geometry, Kind, ObjectInfo
from cachefs.wire.cluster import Member
from cachefs.wire.quotas import QuotaContents, QuotaRule, QuotaUse, ReportQuotas

ORIGIN = "s3://e/b"
GEOMETRY = Geometry(1 << 20, 1 << 16)
FILES = {"a/1": 1, "a/b/2": 5000, "a/b/c/3": 7, "d/4": (3 << 20) + 1, "5": 10}


def directory(store: MetaStore, path: str) -> Inode:
    inode = store.get(ROOT_INO)
    for name in [part for part in path.split("/") if part]:
        assert inode is not None
        inode = store.child(inode.attr.ino, name)
    assert inode is not None
    return inode


def put(store: MetaStore, path: str, size: int | None, tag: str = "e1") -> ContentKey:
    """A file of that size, or a directory; returns its key."""
    info = ObjectInfo(path, Kind.DIRECTORY if size is None else Kind.FILE, size or 0, 0, "" if size is None else tag)
    parent, _, name = path.rpartition("/")
    return store.put_child(directory(store, parent), ORIGIN, Found(name, info)).entries[0].attr.key


def fill(store: MetaStore) -> dict[str, ContentKey]:
    store.attach([("/", ORIGIN)])
    for path in ("a", "a/b", "a/b/c", "d"):
        put(store, path, None)
    return {path: put(store, path, size) for path, size in FILES.items()}


async def whole(parts: AsyncGenerator[QuotaContents, None]) -> tuple[dict[bytes, int], QuotaContents]:
    """(key -> innermost quota), and the last part."""
    found: dict[bytes, int] = {}
    async for part in parts:
        for at in range(0, len(part.keys), 16):
            assert part.keys[at : at + 16] not in found
            found[part.keys[at : at + 16]] = part.quota_id
        if part.last:
            return found, part
    raise AssertionError("it ends never")


async def test_each_content_is_told_with_its_innermost_quota(tmp_path: Path) -> None:
    with open_meta_store(str(tmp_path)) as store:
        keys = fill(store)
        ids = {path: store.set_quota(path, 9).quota_id for path in ("/a/b/c", "/a", "/gone", "/a/gone", "/d/4")}
        async with aclosing(Quotas(store).contents()) as parts:
            found, last = await whole(parts)
        # A quota of what is no directory any more bounds nothing.
        assert found == {keys["a/1"]: ids["/a"], keys["a/b/2"]: ids["/a"], keys["a/b/c/3"]: ids["/a/b/c"]}
        outer = {"/a/b/c": ids["/a"], "/a/gone": ids["/a"]}
        assert sorted(last.rules, key=lambda rule: rule.quota_id) == [
            QuotaRule(number, path, 9, outer.get(path, 0)) for path, number in ids.items()
        ]
        store.set_quota("/", 100)
        async with aclosing(Quotas(store).contents()) as parts:
            found, _ = await whole(parts)
        assert found.keys() == set(keys.values())


def test_another_limit_is_told_without_the_contents(tmp_path: Path) -> None:
    trio.run(_changes, tmp_path, clock=trio.testing.MockClock(autojump_threshold=0))


async def _changes(tmp_path: Path) -> None:
    with open_meta_store(str(tmp_path)) as store:
        keys = fill(store)
        number = store.set_quota("/a/b", 9).quota_id
        quotas = Quotas(store)
        async with aclosing(quotas.contents()) as parts:
            below = {keys["a/b/2"], keys["a/b/c/3"]}
            found, last = await whole(parts)
            assert found.keys() == below and not last.same_keys
            store.set_quota("/a/b", 10)
            quotas.changed()
            found, last = await whole(parts)
            assert (found, last.same_keys, last.rules) == ({}, True, [QuotaRule(number, "/a/b", 10, 0)])
            assert last.serial == quotas.serial
            # A name that changes is told within a time, and a limit that changes before that at once.
            changed = put(store, "a/b/2", 6000, "e2")
            quotas.note_change(directory(store, "a/b"))
            store.set_quota("/a/b", 11)
            quotas.changed()
            began = trio.current_time()
            found, last = await whole(parts)
            assert last.same_keys and last.rules[0].limit_bytes == 11 and trio.current_time() == began
            found, last = await whole(parts)
            assert found.keys() == {changed, keys["a/b/c/3"]} and not last.same_keys
            assert trio.current_time() > began
            # Another path has all told at once.
            store.set_quota("/d", 5)
            quotas.changed()
            began = trio.current_time()
            found, last = await whole(parts)
            assert keys["d/4"] in found and trio.current_time() == began and len(last.rules) == 2
            # What happens elsewhere is of no interest.
            quotas.note_change(directory(store, ""))
            quotas.note_change(None)
            await whole(parts)
            quotas.note_change(directory(store, "a"))
            await whole(parts)
            store.remove_quota("/a/b")
            store.remove_quota("/d")
            quotas.changed()
            assert await whole(parts) == ({}, QuotaContents(quotas.serial, 0, b"", True, [], False))
            quotas.note_change(None)
            with trio.move_on_after(1000) as scope:
                await whole(parts)
            assert scope.cancelled_caught


def test_which_quota_covers_a_path(tmp_path: Path) -> None:
    with open_meta_store(str(tmp_path)) as store:
        fill(store)
        assert Quotas(store).covers("/a") is None and Quotas(store).id_of(directory(store, "a")) == 0
        for path in ("/a", "/a/b/c"):
            store.set_quota(path, 5)
        quotas = Quotas(store)
        covering = {
            path: [quota.path for quota in quotas.covering(path)] for path in ("/", "/ab", "/a", "/a/b", "/a/b/c/3")
        }
        assert covering == {"/": [], "/ab": [], "/a": ["/a"], "/a/b": ["/a"], "/a/b/c/3": ["/a/b/c", "/a"]}
        assert quotas.id_of(directory(store, "a/b/2")) == quotas.by_path["/a"].quota_id


async def test_what_is_to_be_loaded_has_to_fit(tmp_path: Path) -> None:
    with open_meta_store(str(tmp_path)) as store:
        fill(store)
        store.set_quota("/a/b", 4 * 4096)
        quotas, pins = Quotas(store), Pins(store)
        for paths in (["/"], ["/a/b"], ["/a/b/2", "/a/b/c/3"], ["/a"]):
            with pytest.raises(CapacityError, match=r"/a/b has a quota of 16\.0 KiB; 2 files"):
                await check_fits(paths, 1, quotas, pins, GEOMETRY)
        await check_fits(["/a/b/2", "/d"], 1, quotas, pins, GEOMETRY)
        with pytest.raises(CapacityError, match="in 2 copies"):
            await check_fits(["/a/b/2"], 2, quotas, pins, GEOMETRY)


class _Workers:
    """Those that are known, and the state of each that is alive."""

    def __init__(self, **alive: str | None) -> None:
        self.by_name = alive

    def names(self) -> list[str]:
        return list(self.by_name)

    def is_alive(self, name: str) -> bool:
        return self.by_name[name] is not None

    def state(self, name: str) -> str:
        return self.by_name[name] or "active"

    def members(self) -> list[Member]:
        return [
            Member(name, "", {}, 0, 0, state)  # type: ignore[arg-type]
            for name, state in self.by_name.items()
            if state is not None
        ]


def test_nobody_gets_more_before_all_have_said_what_they_have(tmp_path: Path) -> None:
    trio.run(_grants, tmp_path, clock=trio.testing.MockClock())


async def _grants(tmp_path: Path) -> None:
    clock = cast(trio.testing.MockClock, trio.lowlevel.current_clock())
    with open_meta_store(str(tmp_path)) as store:
        number = store.set_quota("/a", 100).quota_id
        quotas, workers = Quotas(store), _Workers(x="active", y=None)
        shares = QuotaShares(quotas, cast(Workers, workers))

        def report(name: str, used: int, granted: int, wanted: int = 0, serial: int | None = None) -> int:
            use = QuotaUse(number, used, granted, 0, wanted)
            (grant,) = shares.report(name, ReportQuotas(quotas.serial if serial is None else serial, [use])).grants
            return grant.granted_bytes

        def soon(name: str, used: int, granted: int, wanted: int) -> bool:
            use = QuotaUse(number, used, granted, 0, wanted)
            return shares.report(name, ReportQuotas(quotas.serial, [use])).grants[0].soon

        # One that was there before the master was restarted may hold a lot.
        assert soon("x", 10, 20, 50)
        assert report("x", 10, 20, 50) == 20
        workers.by_name["y"] = "active"
        assert report("x", 10, 20, 50) == 20
        assert report("y", 60, 0, serial=0) == 60, "it does not know yet what counts"
        assert report("x", 10, 20, 50) == 20
        assert report("y", 60, 0) == 60
        assert report("x", 10, 20, 50) == 40
        # One that comes is waited for, and what it said before it went means nothing.
        shares.came("y")
        assert report("x", 10, 10, 20) == 10
        clock.jump(16)
        assert report("x", 10, 10, 20) == 30
        # What others have not used they may give back; what they have, they do not. Less than is wanted is no help.
        report("y", 30, 60)
        assert soon("x", 30, 30, 40) and not soon("x", 30, 30, 41) and not soon("x", 30, 30, 5)
        report("y", 60, 60)
        assert not soon("x", 40, 40, 50)
        # Dead, it takes no room; to go, neither.
        shares.gone("y")
        report("y", 60, 60)
        assert report("x", 10, 10, 80) == 40
        workers.by_name["y"] = "draining"
        assert shares.report("y", ReportQuotas(1, [QuotaUse(number, 60, 60, 3)])).grants == []
        assert report("x", 10, 10, 80) == 100
        assert shares.used_bytes(number) == 10
        # What nobody has a quota of any more is passed over.
        store.remove_quota("/a")
        quotas.changed()
        shares.changed()
        assert shares.report("x", ReportQuotas(2, [QuotaUse(number, 1, 1, 0)])).grants == []


async def test_what_a_worker_had_before_it_registered_again_does_not_stay_taken(tmp_path: Path) -> None:
    with open_meta_store(str(tmp_path)) as store:
        quotas, number = Quotas(store), store.set_quota("/a", 1000).quota_id
        quotas.changed()
        shares = QuotaShares(quotas, cast(Workers, _Workers(x="active")))

        def report(*uses: QuotaUse) -> int:
            shares.report("x", ReportQuotas(quotas.serial, list(uses)))
            return shares.used_bytes(number)

        assert report(QuotaUse(number, 900, 900, 0)) == 900
        shares.came("x")
        assert report() == 0
        assert report(QuotaUse(number, 900, 900, 0)) == 900
        shares.came("x")
        # It dies before it says anything.
        shares.gone("x")
        assert (shares.used_bytes(number), report()) == (0, 0)
