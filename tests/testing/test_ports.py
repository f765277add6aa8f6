"""A port that is held: refused to whoever connects, there for its server again and again, and for nobody else."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

from cachefs.testing.networks import why_no_networks
from cachefs.testing.ports import hold_port, port_of


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "::1"])
def test_its_server_may_come_and_go_and_nobody_else_gets_it(host: str) -> None:
    try:
        held = hold_port(host)
    except OSError:
        pytest.skip(f"no {host} here")
    with held:
        port = port_of(held)
        to = "127.0.0.1" if host == "0.0.0.0" else host
        for _ in range(2):
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection((to, port), 10)
            with (
                socket.create_server((host, port), family=held.family) as server,
                socket.create_connection((to, port), 10),
            ):
                server.accept()[0].close()


# Takes every port that there is to have, in a network of its own with a few.
ALL = """
import socket
from cachefs.testing.networks import why_no_networks
from cachefs.testing.ports import hold_port, port_of
open("/proc/sys/net/ipv4/ip_local_port_range", "w").write("40000 40019")
held = hold_port()
taken = []
try:
    while True:
        taken.append(hold_port())
except OSError:
    pass
assert len(taken) == 19 and port_of(held) not in map(port_of, taken)
"""


def test_whoever_wants_any_port_gets_another() -> None:
    command = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh", sys.executable, "-c", ALL]
    if (reason := why_no_networks()) is not None:
        pytest.skip(reason)
    done = subprocess.run(command, timeout=60)
    if done.returncode == 77:
        pytest.skip("the settings of this network cannot be changed")
    assert done.returncode == 0
