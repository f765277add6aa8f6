"""Files that a worker passed: so many stay open, and whoever reads through one keeps it."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest

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
