"""`--http`: what a process shows to monitoring."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import NamedTuple

import click

from cachefs.cli import params
from cachefs.metrics import Monitor
from cachefs.model import ConfigError
from cachefs.net import Address, TcpAddress, serving_http

http_option = click.option(
    "--http",
    type=params.ADDRESS,
    help="Where to serve /metrics (Prometheus), /healthz and /readyz, as plain HTTP without a password; port 0 takes a "
    "free one. Off by default.",
)


class Shown(NamedTuple):
    monitor: Monitor | None
    """None: nobody is to see anything."""
    facts: dict[str, str]
    """To be reported when the service is ready."""


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
