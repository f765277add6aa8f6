"""Sockets that are bound: where services are reached."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager, suppress
from typing import NamedTuple

import trio

from cachefs.model import ConfigError
from cachefs.net.addresses import Address, TcpAddress, UnixAddress

_BACKLOG = 256


class Listener(NamedTuple):
    """A socket that is bound: whoever connects waits until it is served."""

    address: Address
    """Port 0 replaced by the port it got."""
    sock: socket.socket


@asynccontextmanager
async def listening(addresses: Sequence[Address]) -> AsyncGenerator[list[Listener], None]:
    """Listens on all these until the end of the block.

    A unix socket's file is its owner's alone (0600); one that nobody listens on any more is replaced, and it is removed
    at the end.

    Raises ConfigError for an address that cannot be bound.
    """
    with ExitStack() as stack:
        listeners = []
        for address in addresses:
            sock = await (_listen_tcp(address) if isinstance(address, TcpAddress) else _listen_unix(address))
            stack.callback(sock.close)
            if isinstance(address, TcpAddress):
                listeners.append(Listener(TcpAddress(address.host, sock.getsockname()[1]), sock))
            else:
                listeners.append(Listener(address, sock))
                stack.callback(_unlink_own, address.path, os.stat(address.path).st_ino)
        yield listeners


@asynccontextmanager
async def taking_over(path: str) -> AsyncGenerator[tuple[Listener, Callable[[], bool]], None]:
    """Listens on a unix socket until the end of the block, also where somebody else does already: whoever connects from
    now on comes to us. With what tells whether another has taken it over from us.

    Raises ConfigError for a path that cannot be bound.
    """
    new = f"{path}.{os.getpid()}"
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with sock:
        try:
            sock.setblocking(False)
            with suppress(FileNotFoundError):
                os.unlink(new)
            sock.bind(new)
            os.chmod(new, 0o600)
            sock.listen(_BACKLOG)
            ino = os.stat(new).st_ino
            os.rename(new, path)
        except OSError as error:
            accepted = f"a path where a socket can be made ({error.strerror or error})"
            raise ConfigError("--socket", path, accepted) from error

        def is_replaced() -> bool:
            try:
                return os.stat(path).st_ino != ino
            except FileNotFoundError:
                return False

        try:
            yield Listener(UnixAddress(path), sock), is_replaced
        finally:
            _unlink_own(path, ino)


async def _listen_tcp(address: TcpAddress) -> socket.socket:
    try:
        found = await trio.socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
        family, _, protocol, _, name = found[0]
        sock = socket.socket(family, socket.SOCK_STREAM, protocol)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.setblocking(False)
            sock.bind(name)
            sock.listen(_BACKLOG)
        except BaseException:
            sock.close()
            raise
    except OSError as error:
        raise ConfigError("--listen", str(address), f"an address of this machine that is free ({error})") from error
    return sock


async def _listen_unix(address: UnixAddress) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        try:
            sock.bind(address.path)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or _is_alive(address.path):
                raise
            os.unlink(address.path)
            sock.bind(address.path)
        # Between bind and listen nobody can connect, so there is no moment at which others could.
        os.chmod(address.path, 0o600)
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        raise ConfigError(
            "--socket", address.path, f"a path for a socket that nobody listens on ({error.strerror or error})"
        ) from error
    return sock


def _is_alive(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return True


def _unlink_own(path: str, ino: int) -> None:
    # A successor may have put its own socket there already.
    with suppress(FileNotFoundError):
        if os.stat(path).st_ino == ino:
            os.unlink(path)
