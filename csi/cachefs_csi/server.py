"""The driver's process: a gRPC server on a unix socket, beside the trio that does the work."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress

import grpc
import trio

from cachefs.metrics import Metric, counter, histogram
from cachefs.model import ConfigError
from cachefs.net import UnixAddress, parse_address
from cachefs_csi.calls import Calls

GRACE_S = 10.0
"""For calls that run when the driver is to end. Kubernetes gives a process 30."""
_AT_ONCE = 64
"""Calls; more of them wait. A thread for each, which does nothing but wait."""

CSI_METRICS: Sequence[Metric[Calls]] = (
    counter(
        "cachefs_csi_calls_total",
        "Calls of the Container Storage Interface, by method and code of gRPC.",
        lambda calls: calls.codes,
        "method",
        "code",
    ),
    histogram("cachefs_csi_call_seconds", "How long calls took.", lambda calls: calls.times, "method"),
)


def endpoint_of(text: str) -> str:
    """The path of the socket. Raises ConfigError."""
    address = parse_address(text, "--endpoint")
    if not isinstance(address, UnixAddress):
        raise ConfigError("--endpoint", text, "unix:///PATH of a socket to make")
    return os.path.abspath("/" + address.path.lstrip("/"))


async def until_ended(service: Callable[[trio.Event], Awaitable[None]]) -> None:
    """Run `service` to its own end; cancelled, it is told by an event, so that what runs in it can be finished."""
    ending = trio.Event()

    async def tell() -> None:
        try:
            await trio.sleep_forever()
        finally:
            ending.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(tell)
        with trio.CancelScope(shield=True):
            await service(ending)
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def serving(path: str, services: Mapping[str, object]) -> AsyncGenerator[Calls, None]:
    """Answers calls on a unix socket, which is its owner's alone (0600), until the end of the block; then those that
    run have `GRACE_S`, and are cancelled. A socket that nobody listens on is replaced.

    Raises ConfigError for a path that cannot be had.
    """
    _check_free(path)
    calls = Calls(services)
    threads = ThreadPoolExecutor(_AT_ONCE, "csi")
    server = grpc.server(threads, options=[("grpc.so_reuseport", 0)])
    server.add_generic_rpc_handlers((calls,))
    before = os.umask(0o177)
    try:
        server.add_insecure_port(f"unix:{path}")
        os.chmod(path, 0o600)
        made = os.stat(path).st_ino
    except (OSError, RuntimeError) as error:
        raise ConfigError("--endpoint", path, f"a path where a socket can be made ({error})") from error
    finally:
        os.umask(before)
    server.start()
    try:
        yield calls
    finally:
        stopped = server.stop(GRACE_S)
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(stopped.wait, GRACE_S + 5)
        threads.shutdown(wait=False)
        with suppress(OSError):
            if os.stat(path).st_ino == made:
                os.unlink(path)


def _check_free(path: str) -> None:
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise ConfigError("--endpoint", path, f"a path where a socket can be made ({error.strerror})") from error
    if not stat.S_ISSOCK(status.st_mode):
        raise ConfigError("--endpoint", path, "a socket, or nothing; there is something else")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
        try:
            asking.connect(path)
        except OSError:
            os.unlink(path)
            return
    raise ConfigError("--endpoint", path, "a socket that no other driver listens on")
