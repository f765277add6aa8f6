"""What every under-store must do: inherit `UnderStoreContract` and give it the fixtures `ufs` and `behind`."""

from __future__ import annotations

import random
import threading
from collections.abc import Mapping
from typing import Protocol

import pytest
import trio

from cachefs.model import CapacityError, ContentChangedError, Kind, NotFoundError, ObjectInfo
from cachefs.ufs import UnderStore


class Behind(Protocol):
    """Changes the store behind its back."""

    def put(self, objects: Mapping[str, bytes]) -> None: ...

    def delete(self, *keys: str) -> None: ...


async def list_all(ufs: UnderStore, path: str) -> list[ObjectInfo]:
    found = []
    async with ufs.list_dir(path) as chunks:
        async for chunk in chunks:
            assert 0 < len(chunk) <= 1000
            found += chunk
    return found


def names(found: list[ObjectInfo]) -> list[str]:
    return sorted(each.path + ("/" if each.kind is Kind.DIRECTORY else "") for each in found)


class UnderStoreContract:
    """Fixtures to be given: `ufs`, an open store; `behind`, to change it."""

    async def test_listing_one_level(self, ufs: UnderStore, behind: Behind) -> None:
        behind.put({"a": b"1", "b/c": b"22", "b/d/e": b"333", "ü ñ+%&": b"4444"})
        assert names(await list_all(ufs, "")) == ["a", "b/", "ü ñ+%&"]
        assert names(await list_all(ufs, "b")) == ["b/c", "b/d/"]
        sizes = {each.path: each.size_bytes for each in await list_all(ufs, "")}
        assert sizes["ü ñ+%&"] == 4

    async def test_a_listing_and_a_look_agree(self, ufs: UnderStore, behind: Behind) -> None:
        behind.put({"dir/x": b"data"})
        (listed,) = await list_all(ufs, "dir")
        assert await ufs.stat("dir/x") == listed
        assert listed.tag

    async def test_stat(self, ufs: UnderStore, behind: Behind) -> None:
        behind.put({"dir/file": b"12345"})
        file = await ufs.stat("dir/file")
        assert (file.path, file.kind, file.size_bytes) == ("dir/file", Kind.FILE, 5)
        assert (await ufs.stat("dir")).kind is Kind.DIRECTORY
        assert (await ufs.stat("")).kind is Kind.DIRECTORY
        for missing in ("dir/fil", "dir/file/x", "di"):
            with pytest.raises(NotFoundError):
                await ufs.stat(missing)

    async def test_a_long_listing_is_streamed(self, ufs: UnderStore, behind: Behind) -> None:
        behind.put({f"many/{number:05}": b"x" for number in range(1010)})
        async with ufs.list_dir("many") as chunks:
            first = await anext(aiter(chunks))
            assert 0 < len(first) <= 1000
            # Left in the middle: nothing stays behind.
        assert len(await list_all(ufs, "many")) == 1010

    async def test_ranges(self, ufs: UnderStore, behind: Behind) -> None:
        content = random.Random(1).randbytes(300_000)
        behind.put({"file": content, "empty": b""})
        info = await ufs.stat("file")
        for offset, length in ((0, 300_000), (0, 1), (299_999, 1), (12_345, 100_000), (5, 0)):
            assert bytes(await ufs.read_range(info, offset, length)) == content[offset : offset + length]
        assert bytes(await ufs.read_range(await ufs.stat("empty"), 0, 0)) == b""

    async def test_whole_files_several_at_a_time(self, ufs: UnderStore, behind: Behind) -> None:
        contents = {f"dir/{number}": random.Random(number).randbytes(1000 * number) for number in range(8)}
        behind.put({**contents, "dir/ü ñ+%&": b"odd", "dir/changed": b"before", "dir/gone": b"gone"})
        infos = [await ufs.stat(path) for path in (*contents, "dir/ü ñ+%&", "dir/changed", "dir/gone")]
        behind.put({"dir/changed": b"after it"})
        behind.delete("dir/gone")
        kept: dict[int, bytes] = {}
        claimed: list[int] = []

        def keep(number: int, data: bytes | bytearray | memoryview) -> None:
            if number == 3:
                raise CapacityError("no room")
            kept[number] = bytes(data)

        def claim(number: int) -> bool:
            claimed.append(number)
            return number != 2

        outcomes = await ufs.read_files(infos, keep, 4, claim)
        expected = [*contents.values(), b"odd"]
        assert kept == {number: expected[number] for number in (0, 1, 4, 5, 6, 7, 8)}
        assert sorted(claimed) == list(range(11))
        assert [type(error) for error in outcomes[:9]] == [type(None)] * 3 + [CapacityError] + [type(None)] * 5
        assert isinstance(outcomes[9], ContentChangedError)
        assert isinstance(outcomes[10], (NotFoundError, ContentChangedError))

    async def test_whole_files_can_be_cancelled(self, ufs: UnderStore, behind: Behind) -> None:
        behind.put({f"dir/{number}": bytes(100_000) for number in range(20)})
        infos = [await ufs.stat(f"dir/{number}") for number in range(20)]
        running, began = [0], threading.Event()

        def keep(number: int, data: bytes | bytearray | memoryview) -> None:
            running[0] += 1
            began.set()
            # Long enough to be under way when it is cancelled.
            threading.Event().wait(0.05)
            running[0] -= 1

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ufs.read_files, infos, keep, 1, lambda number: True)
            await trio.to_thread.run_sync(began.wait)
            nursery.cancel_scope.cancel()
        assert running == [0]
        assert bytes(await ufs.read_range(infos[0], 0, 3)) == bytes(3)

    @pytest.mark.parametrize("content", [b"changed bytes of the same", b"shorter", b"longer than it was before, much"])
    async def test_a_changed_object_is_noticed(self, ufs: UnderStore, behind: Behind, content: bytes) -> None:
        behind.put({"file": b"the content of the object"})
        old = await ufs.stat("file")
        behind.put({"file": content})
        with pytest.raises(ContentChangedError):
            await ufs.read_range(old, 3, 4)
        new = await ufs.stat("file")
        assert new.tag != old.tag
        assert bytes(await ufs.read_range(new, 3, 4)) == content[3:7]

    async def test_a_removed_object_is_noticed(self, ufs: UnderStore, behind: Behind) -> None:
        behind.put({"file": b"content"})
        info = await ufs.stat("file")
        behind.delete("file")
        with pytest.raises((NotFoundError, ContentChangedError)):
            await ufs.read_range(info, 0, 3)
        with pytest.raises(NotFoundError):
            await ufs.stat("file")

    async def test_reads_run_side_by_side_and_can_be_cancelled(self, ufs: UnderStore, behind: Behind) -> None:
        content = random.Random(2).randbytes(1_000_000)
        behind.put({"file": content})
        info = await ufs.stat("file")
        got: dict[int, bytes] = {}

        async def read(offset: int) -> None:
            got[offset] = bytes(await ufs.read_range(info, offset, 50_000))

        async with trio.open_nursery() as nursery:
            for offset in range(0, 1_000_000, 50_000):
                nursery.start_soon(read, offset)
        assert b"".join(got[offset] for offset in sorted(got)) == content
        async with trio.open_nursery() as nursery:
            for offset in range(0, 1_000_000, 50_000):
                nursery.start_soon(read, offset)
            nursery.cancel_scope.cancel()
        await read(0)
