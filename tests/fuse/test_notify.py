"""What is told to the kernel, by a thread of its own that may hang: against the other end of a socket."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Iterator

import pytest

from cachefs.fuse import notify
from cachefs.fuse.notify import Notifier

ENTRY = struct.Struct("<IiQQII")
EPOCH = struct.pack("<IiQ", 16, 8, 0)
NAMES = [(1, b"one"), (2, b"two")]


@pytest.fixture
def link() -> Iterator[tuple[socket.socket, socket.socket]]:
    wait_for_no_threads()  # those of an earlier test's mount
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.settimeout(20)
    with ours, theirs:
        yield ours, theirs


def entry(parent: int, name: bytes, flags: int) -> bytes:
    return ENTRY.pack(33 + len(name), 3, 0, parent, len(name), flags) + name + b"\0"


def threads() -> int:
    return sum(each.name == "fuse notify" for each in threading.enumerate())


def wait_for_no_threads() -> None:
    deadline = time.monotonic() + 20
    while threads():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_it_is_told_in_order(link: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = link
    notifier = Notifier(ours.fileno(), inc_epoch=True, known_names=lambda: NAMES)
    assert threads() == 0
    notifier.entry(7, b"name", expire_only=False)
    notifier.entry(8, b"dir", expire_only=True)
    assert [theirs.recv(1000), theirs.recv(1000)] == [entry(7, b"name", 0), entry(8, b"dir", 1)]
    notifier.everything()
    assert theirs.recv(1000) == EPOCH
    notifier.close()
    notifier.close()
    wait_for_no_threads()
    notifier.entry(7, b"late", expire_only=False)
    notifier.everything()
    assert threads() == 0


def test_before_616_every_known_name_is_told(link: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = link
    notifier = Notifier(ours.fileno(), inc_epoch=False, known_names=lambda: NAMES)
    notifier.everything()
    assert [theirs.recv(1000) for _ in NAMES] == [entry(1, b"one", 1), entry(2, b"two", 1)]
    notifier.close()
    wait_for_no_threads()


@pytest.mark.parametrize("inc_epoch", [False, True])
def test_too_much_to_tell_becomes_everything(
    link: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch, inc_epoch: bool
) -> None:
    monkeypatch.setattr(notify, "_WAITING", 100)
    ours, theirs = link
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    notifier = Notifier(ours.fileno(), inc_epoch=inc_epoch, known_names=lambda: NAMES)
    sent = 100_000
    for number in range(sent):
        notifier.entry(number, b"x", expire_only=False)
    notifier.everything()
    last = EPOCH if inc_epoch else entry(2, b"two", 1)
    received = 0
    while theirs.recv(1000) != last or received < 5:
        received += 1
    assert received < sent / 10
    notifier.close()
    wait_for_no_threads()


def test_it_ends_though_a_write_hangs(link: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = link
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    notifier = Notifier(ours.fileno(), inc_epoch=True, known_names=list)
    for number in range(1000):
        notifier.entry(number, b"x" * 200, expire_only=False)
    notifier.close()
    # The descriptor may go, and its number may be another file's: the thread has its own.
    ours.close()
    while theirs.recv(1000):
        pass
    wait_for_no_threads()
