"""The asking side of `peer_read`. Takes a job as JSON on standard input, prints the seconds of each round as JSON."""

from __future__ import annotations

import json
import socket
import sys
import time
from typing import Any

import trio

from cachefs.model import NO_INO, BlockId, Geometry
from cachefs.net import Hello
from cachefs.store import page_checksum
from cachefs.wire.cluster import Member
from cachefs.worker.counters import Counters
from cachefs.worker.members import Members
from cachefs.worker.peers import Peers

HOLDER = "holder"


async def ask(job: dict[str, Any]) -> dict[str, list[float]]:
    members = Members("asker", {})
    members.learn([Member(HOLDER, job["holder"], {}, 0, 0, "active")])
    key, _, index = job["block"].rpartition("-")
    block = BlockId(bytes.fromhex(key), int(index))  # type: ignore[arg-type]
    peer_s, plain_s = [], []
    buffer = bytearray(Geometry().page_size)
    async with trio.open_nursery() as nursery:
        peers = Peers(members, lambda: Hello(role="worker", name="asker"), Counters(), nursery)
        for round_ in range(job["rounds"] + 1):
            for ask_peer in (True, False) if round_ % 2 else (False, True):
                began = time.perf_counter()
                if ask_peer:
                    await read_block(peers, block, job["length"], job["in_flight"])
                else:
                    receive_plainly(job["plain"], job["length"], buffer)
                # The first round warms both.
                if round_:
                    (peer_s if ask_peer else plain_s).append(time.perf_counter() - began)
        nursery.cancel_scope.cancel()
    return {"peer_s": peer_s, "plain_s": plain_s}


async def read_block(peers: Peers, block: BlockId, length: int, in_flight: int) -> None:
    """Every page, each compared with its checksum. Raises SystemExit for one that is not there or is wrong."""
    geometry = Geometry()
    pages = iter(range(geometry.page_count(length)))

    async def work() -> None:
        for page in pages:
            offset, span = geometry.page_span(length, page)
            got = await peers.read(HOLDER, block, offset, span, "held", NO_INO)
            if got is None or await trio.to_thread.run_sync(page_checksum, got.data) != got.checksum:
                raise SystemExit(f"page {page} is not there, or is wrong")

    async with trio.open_nursery() as nursery:
        for _ in range(in_flight):
            nursery.start_soon(work)


def receive_plainly(port: int, length: int, buffer: bytearray) -> None:
    with socket.create_connection(("127.0.0.1", port)) as sock:
        received = 0
        while count := sock.recv_into(buffer):
            received += count
    if received != length:
        raise SystemExit(f"{received} of {length} bytes came")


if __name__ == "__main__":
    json.dump(trio.run(ask, json.load(sys.stdin)), sys.stdout)
