"""What one master takes of look-ups and reports, and what a million blocks cost it."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import trio
import xxhash

from bench.cluster.row import row
from bench.results import Measure
from cachefs.model import ContentKey
from cachefs.net import Hello, Peer, open_peer, parse_address
from cachefs.testing.processes import Running, running
from cachefs.wire.cluster import (
    ASKED_AT_ONCE,
    REPORTED_AT_ONCE,
    AskBlocks,
    HeldBlock,
    RegisterWorker,
    ReportBlocks,
)

BLOCKS = 1_000_000
LOOK_UPS = 200_000
BEFORE = 100_000
"""Reported before anything is measured."""
REQUIRED = 10_000
LOOPBACK = ["--insecure", "--listen", "127.0.0.1:0", "--log-level", "WARNING"]


@dataclass
class Measured:
    reported_per_s: float = 0.0
    looked_up_per_s: float = 0.0
    told_again_per_s: float = 0.0


def master_rate(directory: Path) -> Iterator[Measure]:
    place = directory / "rate"
    (place / "data").mkdir(parents=True)
    measured = Measured()

    def master(stack: ExitStack) -> tuple[Running, float]:
        began = time.perf_counter()
        namespace = ["--data-dir", place / "master", "--mount", f"/=file://{place / 'data'}"]
        process = stack.enter_context(running("master", *namespace, *LOOPBACK))
        return process, time.perf_counter() - began

    with ExitStack() as stack:
        process, empty_s = master(stack)
        empty_bytes = resident_bytes(process.process.pid)
        trio.run(fill, process.facts["listen"], measured)
        full_bytes = resident_bytes(process.process.pid)
    size = sum(each.stat().st_size for each in (place / "master").iterdir() if each.is_file())
    with ExitStack() as stack:
        process, full_s = master(stack)
        started_bytes = resident_bytes(process.process.pid)
        trio.run(tell_again, process.facts["listen"], measured)
        told_bytes = resident_bytes(process.process.pid)
    yield row(
        "blocks reported to the master a second, 10,000 at a time, until it knows a million",
        REQUIRED,
        measured.reported_per_s,
        at_most=False,
        unit="1/s",
        note=f"{measured.told_again_per_s:,.0f}/s when a worker says it all again after a restart of the master",
    )
    yield row(
        "blocks looked up at the master a second, 1,000 at a time, among a million",
        REQUIRED,
        measured.looked_up_per_s,
        at_most=False,
        unit="1/s",
        note=f"memory {mib(empty_bytes)} empty, {mib(full_bytes)} with a million, {mib(started_bytes)} when started, "
        f"{mib(told_bytes)} when told again; database {mib(size)}; started in {full_s:.1f} s, empty in {empty_s:.1f} s",
    )


def mib(size: int) -> str:
    return f"{size / (1 << 20):,.0f} MiB"


def resident_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("the master has gone")


def key(number: int) -> ContentKey:
    return ContentKey(xxhash.xxh3_128_digest(str(number).encode()))


def held(start: int, end: int) -> list[HeldBlock]:
    return [HeldBlock(key(number), 0, 110_000) for number in range(start, end)]


async def fill(address: str, measured: Measured) -> None:
    """Two workers: one reports, while another one that counts is there; that one looks up then."""
    async with registered(address, "one") as (one, epoch), registered(address, "two") as (two, other_epoch):
        for peer, each in ((one, epoch), (two, other_epoch)):
            # From then on it counts.
            await peer.call(ReportBlocks(each, [], [], full=True))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(heartbeats, two, other_epoch)
            for start in range(0, BEFORE, REPORTED_AT_ONCE):
                await one.call(ReportBlocks(epoch, held(start, start + REPORTED_AT_ONCE), []))
            spent = 0.0
            for start in range(BEFORE, BLOCKS, REPORTED_AT_ONCE):
                report = ReportBlocks(epoch, held(start, start + REPORTED_AT_ONCE), [])
                began = time.perf_counter()
                await one.call(report)
                spent += time.perf_counter() - began
            measured.reported_per_s = (BLOCKS - BEFORE) / spent
            nursery.start_soon(heartbeats, one, epoch)
            spent = 0.0
            for start in range(0, LOOK_UPS, ASKED_AT_ONCE):
                # Every one of them, far from one another.
                asked = [(key(number * 7919 % BLOCKS), 0) for number in range(start, start + ASKED_AT_ONCE)]
                began = time.perf_counter()
                places = (await two.call(AskBlocks(asked, lease=True))).message.places
                spent += time.perf_counter() - began
                if any(place.holders != ["one"] for place in places):
                    raise SystemExit("the master does not know who holds a block")
            measured.looked_up_per_s = LOOK_UPS / spent
            nursery.cancel_scope.cancel()


async def tell_again(address: str, measured: Measured) -> None:
    async with registered(address, "one") as (one, epoch):
        spent = 0.0
        for start in range(0, BLOCKS, REPORTED_AT_ONCE):
            more = start + REPORTED_AT_ONCE < BLOCKS
            report = ReportBlocks(epoch, held(start, start + REPORTED_AT_ONCE), [], full=True, more=more)
            began = time.perf_counter()
            await one.call(report)
            spent += time.perf_counter() - began
        measured.told_again_per_s = BLOCKS / spent


@asynccontextmanager
async def registered(address: str, name: str) -> AsyncGenerator[tuple[Peer, int], None]:
    """A worker's connection, and its epoch."""
    async with open_peer(parse_address(address), Hello(role="worker", name=name)) as peer:
        registration = RegisterWorker(name, "127.0.0.1:1", f"/nowhere/{name}.sock", "", 1 << 40)
        yield peer, (await peer.call(registration)).message.epoch


async def heartbeats(peer: Peer, epoch: int) -> None:
    while True:
        await peer.call(ReportBlocks(epoch, [], []))
        await trio.sleep(1)
