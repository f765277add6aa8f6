"""Two hosts on one machine, as network namespaces with a cable between them that can be cut. Root only.

    this namespace --- 198.18.x.1   198.18.x.2 --- a
                   --- 198.18.x.5   198.18.x.6 --- b
                                                   a 198.18.x.9 --- 198.18.x.10 b

Nothing is left of them when this process has ended, however it did.
"""

from __future__ import annotations

import ipaddress
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache

from cachefs.testing.real_cluster import Host

_PROGRAMS = ("ip", "unshare", "nsenter")
_NETWORK = ipaddress.ip_network("198.18.0.0/15")
"""Set aside for tests of networks (RFC 2544)."""


@dataclass(frozen=True)
class TwoHosts:
    """`master` of each is where it reaches this namespace; `listen` its end of the cable to the other."""

    a: Host
    b: Host

    @contextmanager
    def cut(self) -> Iterator[None]:
        """What one sends to the other is lost without a word, as behind a broken switch."""
        both = ((self.a, self.b), (self.b, self.a))
        for host, other in both:
            # Sent to a card that nobody has.
            wrong = ("lladdr", "02:00:00:00:00:00", "nud", "permanent")
            _ip(host.prefix, "neigh", "replace", other.listen, *wrong, "dev", "side")
        try:
            yield
        finally:
            for host, other in both:
                _ip(host.prefix, "neigh", "del", other.listen, "dev", "side")


@cache
def why_no_networks() -> str | None:
    """Why `two_hosts` cannot be had here; None if it can."""
    for program in _PROGRAMS:
        if shutil.which(program) is None:
            return f"{program} is missing (packages iproute2 and util-linux)"
    tried = subprocess.run(
        ["unshare", "--net", "ip", "link", "add", "cachefs0", "type", "veth", "peer", "name", "cachefs1"],
        capture_output=True,
        text=True,
    )
    return None if tried.returncode == 0 else f"no network namespaces: {tried.stderr.strip()}"


@contextmanager
def two_hosts() -> Iterator[TwoHosts]:
    """Raises subprocess.CalledProcessError where `why_no_networks` says why."""
    # One set of addresses and names for each process that does this.
    mine = os.getpid()
    first = _NETWORK.network_address + (mine * 16) % _NETWORK.num_addresses
    links = [[str(first + 4 * number + end) for end in (1, 2)] for number in range(3)]
    names = [f"cf{mine}{letter}" for letter in "ab"]
    with ExitStack() as stack:
        a, b = (stack.enter_context(_namespace()) for _ in range(2))
        for name, host, (here, there) in zip(names, (a, b), links[:2], strict=True):
            _ip((), "link", "add", name, "type", "veth", "peer", "name", "home", "netns", str(host))
            # It goes with the namespace; unless that one lives on for a moment.
            stack.callback(subprocess.run, ["ip", "link", "del", name], capture_output=True)
            _set_up((), name, here)
            _set_up(_inside(host), "home", there)
            _ip(_inside(host), "link", "set", "lo", "up")
        _ip(_inside(a), "link", "add", "side", "type", "veth", "peer", "name", "side", "netns", str(b))
        _set_up(_inside(a), "side", links[2][0])
        _set_up(_inside(b), "side", links[2][1])
        yield TwoHosts(
            Host(links[2][0], links[0][0], _inside(a)),
            Host(links[2][1], links[1][0], _inside(b)),
        )


@contextmanager
def _namespace() -> Iterator[int]:
    """A process in a network namespace of its own, which lasts as long as it."""
    with subprocess.Popen(
        ["unshare", "--net", "sh", "-c", "echo; read -r _"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdout.readline()
        yield process.pid


def _inside(pid: int) -> tuple[str, ...]:
    return ("nsenter", f"--net=/proc/{pid}/ns/net", "--")


def _set_up(prefix: Sequence[str], name: str, address: str) -> None:
    _ip(prefix, "address", "add", f"{address}/30", "dev", name)
    _ip(prefix, "link", "set", name, "up")


def _ip(prefix: Sequence[str], *arguments: str) -> None:
    subprocess.run([*prefix, "ip", *arguments], check=True, capture_output=True)
