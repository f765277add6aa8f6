"""Ports that nobody else gets, for servers that are told where to listen, or listen there again after they ended."""

from __future__ import annotations

import socket


def hold_port(host: str = "127.0.0.1") -> socket.socket:
    """A free TCP port (`getsockname`), until the socket is closed. It is bound and does not listen: whoever connects is
    refused. A server that sets SO_REUSEADDR, as most do, can listen there; the kernel gives the port to nobody who
    wants any, and to no connection, also not while that server is started again.

    `host`: an address of IPv4 or IPv6.
    """
    held = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind((host, 0))
    except BaseException:
        held.close()
        raise
    return held


def port_of(held: socket.socket) -> int:
    port: int = held.getsockname()[1]
    return port
