"""The life of a process: logging, signals, readiness, and being told to end by a supervisor.

A supervisor hands its child one end of a socket pair. The child writes one line of JSON when it is ready; end-of-file
from the supervisor, who may have been killed, is the order to end, the same as SIGTERM.
"""

from __future__ import annotations

import ctypes
import gc
import json
import logging
import resource
import signal
import socket
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import click
import trio

from cachefs.model import CachefsError, ConfigError, MiB

# Of <malloc.h>.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_OWN_MEMORY_FROM = 4 * MiB
"""More than a READ is answered with: memory for those is used again."""
_HEAPS = 2
"""glibc gives each thread a heap of its own, up to eight for each processor, and each keeps what it once had: under 256
readers a worker held 440 MB, and so 270. Python's threads seldom allocate at the same moment anyway."""

LEAST_OPEN_FILES = 256
"""For connections, the database, and the libraries of an under-store."""

_ENDING = (signal.SIGINT, signal.SIGTERM)

ENDED_WELL = b'{"ended": 0}\n'
"""What a supervisor is told by a service whose process it may not be able to wait for."""

Report = Callable[[dict[str, Any]], None]
"""Call it once, when the service is ready, with what a supervisor or a person wants to know."""


def set_up_logging(role: str, level: str = "INFO") -> None:
    logging.basicConfig(
        stream=sys.stderr, level=level, format=f"%(asctime)s %(levelname)s {role} %(name)s %(message)s", force=True
    )
    for library in ("botocore", "aiobotocore", "s3fs", "fsspec", "asyncio", "urllib3"):
        logging.getLogger(library).setLevel(logging.WARNING)


def _collect_less() -> None:
    """Modules stay, and of what a service makes little is in cycles: the collector's usual haste costs some percent."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def _share_heaps() -> None:
    """Before the first thread: what has a heap keeps it."""
    with suppress(AttributeError):  # no glibc
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, _HEAPS)


def keep_tables_apart() -> None:
    """For a service that keeps much in large dictionaries: each of their tables is memory of its own, and goes back to
    the system when it is outgrown or given up.

    Otherwise the first one that goes lets glibc put all later ones on the heap, where tables that come and go leave
    holes: a mount that had listed a million names twice held 370 bytes for each, and so 285.
    """
    with suppress(AttributeError):  # no glibc
        libc = ctypes.CDLL(None)
        # With the one fixed, glibc would also give back every bit of free memory at once.
        libc.mallopt(_M_TRIM_THRESHOLD, 2 * _OWN_MEMORY_FROM)
        libc.mallopt(_M_MMAP_THRESHOLD, _OWN_MEMORY_FROM)


def run_service(
    role: str,
    service: Callable[[Report], Awaitable[None]],
    supervised_fd: int | None,
    *,
    as_json: bool = False,
    least_open_files: int = LEAST_OPEN_FILES,
) -> None:
    """Run until SIGINT, SIGTERM, the supervisor's end or the service's own; then exit, with status 0 if that was clean.
    `as_json`: how a person, or a program that is no supervisor, is told that it is ready. `least_open_files`: with a
    lower limit it does not start.

    Raises click.ClickException for an error of the service, in one line. A supervisor that still waits for the service
    to be ready is told instead, and tells it.
    """
    ready = False
    _share_heaps()
    _collect_less()
    supervisor = socket.socket(fileno=supervised_fd) if supervised_fd is not None else None

    def report(facts: dict[str, Any]) -> None:
        nonlocal ready
        ready = True
        if supervisor is not None:
            supervisor.sendall(json.dumps(facts).encode() + b"\n")
        elif as_json:
            click.echo(json.dumps({"ready": role, **facts}))
        else:
            click.echo(" ".join([f"cachefs {role} is ready", *(f"{name}={value}" for name, value in facts.items())]))

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(cancel_on_signal, nursery.cancel_scope)
            if supervisor is not None:
                nursery.start_soon(_cancel_at_end, supervisor, nursery.cancel_scope)
            await service(report)
            nursery.cancel_scope.cancel()

    handlers = {number: signal.getsignal(number) for number in _ENDING}
    try:
        raise_open_files(role, least_open_files)
        trio.run(main)
    except* CachefsError as group:
        message = " ".join(str(error) for error in leaves(group))
        if supervisor is None or ready:
            raise click.ClickException(message) from group
        with suppress(OSError):
            supervisor.sendall(json.dumps({"error": message}).encode() + b"\n")
        raise SystemExit(1) from None
    finally:
        for number, handler in handlers.items():
            if handler is not None:  # not set in Python
                signal.signal(number, handler)
        if supervisor is not None:
            supervisor.close()


def raise_open_files(role: str, least: int) -> None:
    """As many as the system allows: what is read and cached holds descriptors, and the usual limit is 1024.

    Raises ConfigError where that is less than `least`: it would be want of descriptors all day, and look like a slow
    cache.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    if most != resource.RLIM_INFINITY and most < least:
        accepted = f"at least {least} for a {role}: ulimit -Hn, or LimitNOFILE= in systemd"
        raise ConfigError("open files (hard limit)", most, accepted)


async def cancel_on_signal(
    scope: trio.CancelScope, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """Cancel the scope at the first SIGINT or SIGTERM. Later ones change nothing: ending is under way. Nor does one
    that comes after the scope was cancelled by somebody else, until the caller puts the handlers back.
    """
    early: list[int] = []
    for each in _ENDING:
        # What the receiver puts back when it ends, while others still clean up.
        signal.signal(each, lambda number, frame: early.append(number))
    with trio.open_signal_receiver(*_ENDING) as signals:
        if early:
            scope.cancel()
        async for number in signals:
            logging.getLogger(__name__).info("ending signal=%s", signal.Signals(number).name)
            scope.cancel()


async def _cancel_at_end(supervisor: socket.socket, scope: trio.CancelScope) -> None:
    stream = trio.socket.from_stdlib_socket(supervisor)
    try:
        await stream.recv(1)
    except OSError:
        pass
    logging.getLogger(__name__).info("ending supervisor=gone")
    scope.cancel()


def leaves(error: BaseException) -> list[BaseException]:
    """The errors in a group of groups."""
    if isinstance(error, BaseExceptionGroup):
        return [leaf for each in error.exceptions for leaf in leaves(each)]
    return [error]
