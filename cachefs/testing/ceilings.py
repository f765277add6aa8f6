"""A cluster of real processes under four times the load that a mount lets the kernel put on it: what memory they take.

Two nodes, each with a worker and a mount in cached mode, and one master. Caches hold two thirds of what is read, so
that blocks are fetched, evicted, given to the other node and read through all the time; both nodes are told to load
everything meanwhile. The master is asked for names, and listed, by as many tasks as there are readers, over eight
connections; on each, some follow changes and listings and take nothing of what they are told.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import trio

from cachefs.fusewire import InitOptions
from cachefs.model import Ino, MiB
from cachefs.net import Hello, Peer, open_peer, parse_address
from cachefs.testing.pressure import Memory, Pressed, memory_of, pressing
from cachefs.testing.processes import Running, child_of, mountpoint_below, running
from cachefs.wire.messages import ListDir, Lookup, ResolvePath, Watch

READERS = 4 * InitOptions.max_background
CONNECTIONS = 8
_LISTENERS = 4
"""Of the tasks on a connection, how many are told of changes; and as many begin to list and do not go on."""
_LOOK_EVERY_S = 0.1
_PATIENCE_S = 60.0
_ASKED = ("listings", "look-ups")

NAMES = 5000
"""Small files, whose names everybody comes to know."""
SQLITE_CACHE = 32 * MiB
CEILINGS = {"mount": 256_000_000 + 350 * 2 * NAMES, "worker": 512_000_000, "master": 256_000_000 + SQLITE_CACHE}
"""Bytes: what is promised of each role."""


class Found(NamedTuple):
    memory: dict[str, Memory]
    """Role and node -> at its highest."""
    pressed: list[Pressed]
    """Of each node."""
    asked: Counter[str]
    """What the master answered."""


def measure(
    directory: Path,
    url: str,
    options: Mapping[str, str],
    large: int,
    tier: str,
    seconds: float,
    *,
    readers: int = READERS,
    stderr: int | None = subprocess.DEVNULL,
) -> Found:
    """`url` has what `make_files` made, of `large` files and NAMES small ones; `tier`: the size of each node's."""
    loopback = ["--listen", "127.0.0.1:0", "--insecure"]
    known = [each for name, value in options.items() for each in ("--ufs-option", f"{name}={value}")]
    namespace = ["--data-dir", str(directory / "master"), "--mount", f"/={url}", *known]
    with ExitStack() as stack:
        master = stack.enter_context(running("master", *namespace, *loopback, stderr=stderr))
        where = ["--master", master.facts["listen"]]
        pids = {"master": master.process.pid}
        mountpoints = []
        for node in ("first", "second"):
            place = directory / node
            place.mkdir()
            socket = ["--socket", str(place / "socket"), "--tier", f"ssd:{place / 'tier'}:{tier}"]
            flags = [*where, *socket, *loopback, "--name", node, "--promote", "always"]
            worker = stack.enter_context(running("worker", *flags, stderr=stderr))
            mountpoint = stack.enter_context(mountpoint_below(place))
            flags = [*where, "--insecure", "--worker-socket", str(place / "socket"), "--open-mode", "cached"]
            mount = stack.enter_context(running("mount", mountpoint, *flags, stderr=stderr))
            pids |= {f"worker {node}": worker.process.pid, f"mount {node}": child_of(mount, "mount")}
            mountpoints.append(mountpoint)
        presses = [stack.enter_context(pressing(each, large, NAMES, readers)) for each in mountpoints]
        load = _loading(stack, master)
        highest, asked = trio.run(_ask_and_look, master.facts["listen"], pids, readers, seconds)
        pressed = [press.stop() for press in presses]
        load.kill()
        load.wait()
        _look(pids, highest)
    return Found(highest, pressed, asked)


def _loading(stack: ExitStack, master: Running) -> subprocess.Popen[bytes]:
    command = ["load", "/large", "--replicas", "2", "--master", master.facts["listen"], "--insecure"]
    load = subprocess.Popen(
        [sys.executable, "-m", "cachefs", *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    stack.callback(load.wait)
    stack.callback(load.kill)
    return load


def _look(pids: Mapping[str, int], highest: dict[str, Memory]) -> None:
    for name, pid in pids.items():
        now = memory_of(pid)
        highest[name] = Memory(*map(max, now, highest.get(name, now)))


async def _ask_and_look(
    address: str, pids: Mapping[str, int], tasks: int, seconds: float
) -> tuple[dict[str, Memory], Counter[str]]:
    highest, asked = dict[str, Memory](), Counter[str]()
    end = time.monotonic() + seconds
    async with trio.open_nursery() as nursery:
        for _ in range(CONNECTIONS):
            nursery.start_soon(_ask, address, tasks // CONNECTIONS, asked)
        # On a busy machine a listing may take longer than all that.
        while time.monotonic() < end or (len(asked) < len(_ASKED) and time.monotonic() < end + _PATIENCE_S):
            await trio.sleep(_LOOK_EVERY_S)
            _look(pids, highest)
        nursery.cancel_scope.cancel()
    return highest, asked


async def _ask(address: str, tasks: int, asked: Counter[str]) -> None:
    async with open_peer(parse_address(address), Hello(role="client", name="pressure")) as peer:
        directory = (await peer.call(ResolvePath("/small"))).message.attr.ino
        async with trio.open_nursery() as nursery:
            for number in range(tasks):
                if number < _LISTENERS:
                    nursery.start_soon(_stand, peer, directory)
                else:
                    nursery.start_soon(_list if number % 2 else _look_up, peer, directory, asked)


async def _stand(peer: Peer, directory: Ino) -> None:
    async with peer.stream(Watch()), peer.stream(ListDir(directory)):
        await trio.sleep_forever()


async def _list(peer: Peer, directory: Ino, asked: Counter[str]) -> None:
    while True:
        await trio.lowlevel.checkpoint()  # when all is over, that comes before an error of the connection
        count = 0
        async with peer.stream(ListDir(directory)) as chunks:
            async for chunk in chunks:
                count += len(chunk.entries)
        assert count == NAMES
        asked["listings"] += 1


async def _look_up(peer: Peer, directory: Ino, asked: Counter[str]) -> None:
    number = 0
    while True:
        await trio.lowlevel.checkpoint()
        number = (number + 7919) % NAMES
        assert (await peer.call(Lookup(directory, f"{number:05d}"))).message.attr is not None
        asked["look-ups"] += 1
