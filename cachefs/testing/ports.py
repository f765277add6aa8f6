"""Ports for servers that are told theirs, or that are started again where they were."""

from __future__ import annotations

import random
import socket
from contextlib import ExitStack, suppress
from pathlib import Path

_random = random.SystemRandom()
"""Whatever else is seeded: two processes that look for ports at once must not find the same ones."""


def free_ports(count: int) -> list[int]:
    """TCP ports of loopback that nobody listens on now, at random, and none that the kernel gives to connections and to
    whoever does not ask for a certain one: while nobody listens there, it would give them away.
    """
    lowest, _ = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
    candidates = range(10_000, max(int(lowest), 20_000))
    with ExitStack() as held:
        ports: list[int] = []
        while len(ports) < count:
            port = _random.choice(candidates)
            with suppress(OSError):
                held.enter_context(socket.create_server(("127.0.0.1", port)))
                ports.append(port)
        return ports
