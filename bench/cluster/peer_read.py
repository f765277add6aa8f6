"""Reading a sealed block from another worker, against plain `sendfile` to `recv` of the same file.

Both go over TCP on loopback from one process to another: a real worker that sends what it has, to a process that asks
as workers do, page by page, several at once, and compares every checksum; and a process that only sends the worker's
file, to one that only receives it. In turns, round by round.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.cluster.row import row
from bench.harness import random_bytes, run_readers
from bench.results import Measure
from cachefs.model import GiB, MiB
from cachefs.testing.processes import running

ROUNDS = 41
BLOCK_BYTES = 64 * MiB
IN_FLIGHT = 4
RECEIVED_AT_ONCE = 8 * MiB
"""A page, as the other side has it."""
LOOPBACK = ["--insecure", "--listen", "127.0.0.1:0", "--log-level", "WARNING"]


def peer_read(directory: Path) -> Iterator[Measure]:
    place = directory / "peer"
    place.mkdir()
    source = place / "data"
    source.mkdir()
    with (source / "block").open("wb") as file:
        for number in range(BLOCK_BYTES // MiB):
            file.write(random_bytes(f"block {number}", MiB))
    os.utime(source / "block", (time.time() - 60, time.time() - 60))
    namespace = ["--data-dir", place / "master", "--mount", f"/=file://{source}", "--ufs-option", "settle=0"]
    with running("master", *namespace, *LOOPBACK) as master:
        address = master.facts["listen"]
        worker_socket = place / "worker.sock"
        command = ["--master", address, "--socket", worker_socket, "--tier", f"ssd:{place / 'tier'}:{4 * GiB}"]
        with running("worker", "--name", "holder", *command, *LOOPBACK) as worker:
            subprocess.run(
                [sys.executable, "-m", "cachefs", "load", "--master", address, "/block"],
                check=True,
                capture_output=True,
            )
            (sealed,) = (place / "tier" / "sealed").glob("*/*-0")
            with running_sender(sealed) as plain_port:
                job = {
                    "holder": worker.facts["listen"],
                    "block": sealed.name,
                    "length": BLOCK_BYTES,
                    "in_flight": IN_FLIGHT,
                    "plain": plain_port,
                    "rounds": ROUNDS,
                }
                (result,) = run_readers([job], "bench.cluster.asking")
    peers, plain = result["peer_s"], result["plain_s"]
    ratios = [two / one for one, two in zip(peers, plain, strict=True)]
    rate, plain_rate = (BLOCK_BYTES / statistics.median(each) / 1e6 for each in (peers, plain))
    yield row(
        "reading a sealed block from a worker / plain sendfile to recv",
        0.7,
        statistics.median(ratios),
        at_most=False,
        note=f"{min(ratios):.2f} to {max(ratios):.2f} in {ROUNDS} rounds; {rate:,.0f} and {plain_rate:,.0f} MB/s",
    )


@contextmanager
def running_sender(path: Path) -> Iterator[int]:
    """A process that sends the file to whoever connects, by sendfile(2); its port."""
    command = [sys.executable, "-m", "bench.cluster.peer_read", str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield json.loads(process.stdout.readline())
        finally:
            process.kill()


def send(path: str) -> None:
    """On the port that is printed, the whole file on each connection."""
    with socket.create_server(("127.0.0.1", 0)) as server, open(path, "rb") as file:
        print(server.getsockname()[1], flush=True)
        size = os.fstat(file.fileno()).st_size
        while True:
            connection: Any
            connection, _ = server.accept()
            with connection:
                offset = 0
                while offset < size:
                    offset += os.sendfile(connection.fileno(), file.fileno(), offset, size - offset)


if __name__ == "__main__":
    send(sys.argv[1])
