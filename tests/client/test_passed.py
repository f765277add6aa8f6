"""Files that a worker passed: so many stay open, and whoever reads through one keeps it."""

from __future__ import annotations

import os
import resource

import pytest

from cachefs.client.passed import PassedFiles, most_passed


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
