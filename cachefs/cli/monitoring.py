"""`--http`: what a process shows to monitoring."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import NamedTuple

import click
import trio

from cachefs.cli import params
from cachefs.metrics import Monitor
from cachefs.model import CachefsError, ConfigError
from cachefs.net import Address, TcpAddress, open_background, serving_http

http_option = click.option(
    "--http",
    type=params.ADDRESS,
    help="Where to serve /metrics (Prometheus), /healthz and /readyz, as plain HTTP without a password; port 0 takes a "
    "free one. Off by default.",
)


logger = logging.getLogger(__name__)

_PAUSE_S = 1.0


class Shown(NamedTuple):
    monitor: Monitor | None
    """None: nobody is to see anything."""
    facts: dict[str, str]
    """To be reported when the service is ready."""
    begin: Callable[[], None] = lambda: None
    """Call it then, too."""


@asynccontextmanager
async def shown_later(role: str, address: Address | None) -> AsyncGenerator[Shown, None]:
    """As `monitored`, for one that takes the place of another: served once it is ready and the address is free, and
    without it whatever happens.
    """
    if not isinstance(address, TcpAddress):
        yield Shown(None, {})
        return
    monitor = Monitor(role)
    ready = trio.Event()

    async def serve(address: TcpAddress) -> None:
        await ready.wait()
        is_said = False
        while True:
            try:
                async with serving_http(address, monitor.answer):
                    await trio.sleep_forever()
            except (CachefsError, OSError) as error:
                if not is_said:
                    logger.warning("monitoring is not served yet address=%s error=%s", address, error)
                is_said = True
            await trio.sleep(_PAUSE_S)

    async with open_background() as nursery:
        nursery.start_soon(serve, address)
        yield Shown(monitor, {}, ready.set)


@asynccontextmanager
async def shown_if_possible(role: str, address: Address | None) -> AsyncGenerator[Shown, None]:
    """As `monitored`, for one that takes the place of another and is needed, whatever becomes of its monitoring."""
    async with AsyncExitStack() as stack:
        try:
            shown = await stack.enter_async_context(monitored(role, address))
        except ConfigError as error:
            logger.warning("monitoring is not served address=%s error=%s", address, error)
            shown = Shown(None, {})
        yield shown


@asynccontextmanager
async def monitored(role: str, address: Address | None) -> AsyncGenerator[Shown, None]:
    """Served until the end of the block, from before the service is ready. Raises ConfigError."""
    if address is None:
        yield Shown(None, {})
        return
    if not isinstance(address, TcpAddress):
        raise ConfigError("--http", str(address), "HOST:PORT")
    monitor = Monitor(role)
    async with serving_http(address, monitor.answer) as bound:
        yield Shown(monitor, {"http": str(bound)})
