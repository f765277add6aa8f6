"""Files that a worker passed: so many stay open, and whoever reads through one keeps it."""

from __future__ import annotations

import os
import resource
from contextlib import ExitStack
from pathlib import Path

import pytest
import trio

from cachefs.client.files import ContentReader
from cachefs.client.passed import PassedFiles, most_passed
from cachefs.model import Attr, ContentKey, Geometry, Ino, KiB, Kind
from cachefs.net import Answer
from cachefs.wire.messages import Fetch, FetchReply


def opened() -> int:
    return os.open(os.devnull, os.O_RDONLY)


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def test_the_one_used_longest_ago_makes_room() -> None:
    files = PassedFiles(2)
    dropped = list[str]()
    fds = [opened() for _ in range(3)]
    first, second = (files.add(fd, lambda name=name: dropped.append(name)) for fd, name in zip(fds, "ab", strict=False))  # type: ignore[misc]
    files.touch(first)
    third = files.add(fds[2], lambda: dropped.append("c"))
    assert dropped == ["b"] and not is_open(second.fd) and len(files) == 2
    for file in (first, third):
        files.drop(file)
    assert dropped == ["b"] and not any(map(is_open, fds))


def test_what_is_read_through_stays_open_until_that_is_over() -> None:
    files = PassedFiles(1)
    one = files.add(opened(), pytest.fail)
    with one as fd, one:
        files.add(opened(), lambda: None)  # nothing can make room
        assert len(files) == 2
        files.drop(one)
        assert is_open(fd)
    assert not is_open(fd)


def test_after_a_burst_there_are_as_few_as_before() -> None:
    files = PassedFiles(2)
    dropped = list[int]()
    with ExitStack() as burst:
        added = [files.add(opened(), lambda number=number: dropped.append(number)) for number in range(2)]  # type: ignore[misc]
        for each in added:
            burst.enter_context(each)
        for number in range(2, 6):
            added.append(files.add(opened(), lambda number=number: dropped.append(number)))  # type: ignore[misc]
            burst.enter_context(added[-1])
        assert len(files) == 6 and dropped == []
        with added[0]:
            files.touch(added[0])
        assert len(files) == 6  # somebody else reads through it still
    # The last that came were the first that nobody read through any more.
    assert len(files) == 2 and dropped == [5, 4, 3, 2]
    assert [is_open(each.fd) for each in added] == [True, True, False, False, False, False]
    for each in added[:2]:
        files.drop(each)
    assert len(files) == 0 and not any(is_open(each.fd) for each in added)


def test_one_that_was_given_up_while_it_was_read_through_makes_no_room_twice() -> None:
    files = PassedFiles(1)
    one = files.add(opened(), pytest.fail)
    with one:
        files.drop(one)
        two = files.add(opened(), pytest.fail)
    assert len(files) == 1 and is_open(two.fd) and not is_open(one.fd)
    files.drop(two)


async def test_a_burst_of_readers_leaves_no_more_open_than_may_be(tmp_path: Path) -> None:
    """Each read through its own file at once, which all may be open as long as it is."""
    data = tmp_path / "block"
    data.write_bytes(b"a" * 64 * KiB)
    files, most = PassedFiles(2), 0
    gates = [tmp_path / f"{number}" for number in range(8)]

    async def fetch(request: Fetch) -> Answer[FetchReply]:
        return Answer(FetchReply(7, [(0, 1)]), fds=(os.open(gates[request.ino - 2], os.O_RDONLY),))

    async def read(reader: ContentReader) -> None:
        nonlocal most
        for _ in range(20):
            assert bytes(await reader.read(0, 10)) == b"a" * 10
            most = max(most, len(files))

    readers = []
    for number, path in enumerate(gates):
        path.hardlink_to(data)
        attr = Attr(Ino(2 + number), Kind.FILE, 64 * KiB, 0, 0o444, 0, 0, ContentKey(b"k" * 16))
        readers.append(ContentReader(attr, Geometry(page_size=64 * KiB), fetch, files=files))
    before = len(os.listdir("/proc/self/fd"))
    async with trio.open_nursery() as nursery:
        for reader in readers:
            nursery.start_soon(read, reader)
    assert most > 2 and len(files) <= 2
    assert len(os.listdir("/proc/self/fd")) - before <= 2
    for reader in readers:
        reader.close()
    assert len(files) == 0


def test_half_of_what_the_process_may_open() -> None:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert most_passed() == soft // 2


async def test_what_was_given_up_while_more_of_it_was_asked_for_is_asked_for_anew(tmp_path: Path) -> None:
    """A worker does not pass again what the asker said it had."""
    page = 64 * KiB
    (tmp_path / "block").write_bytes(b"a" * page + b"b" * page)
    files = PassedFiles(1)
    asked = list[int]()

    async def fetch(request: Fetch) -> Answer[FetchReply]:
        asked.append(request.held)
        if len(asked) == 2:
            files.add(opened(), lambda: None)  # another file, for which this one has to make room
        fds = () if request.held else (os.open(tmp_path / "block", os.O_RDONLY),)
        at = request.offset // page
        return Answer(FetchReply(7, [(at, at + 1)]), fds=fds)

    attr = Attr(Ino(2), Kind.FILE, 2 * page, 0, 0o444, 0, 0, ContentKey(b"k" * 16))
    reader = ContentReader(attr, Geometry(page_size=page), fetch, files=files)
    assert bytes(await reader.read(0, 10)) == b"a" * 10
    assert bytes(await reader.read(page, 10)) == b"b" * 10
    assert asked == [0, 7, 0]
    reader.close()
