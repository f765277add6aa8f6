"""Commands that ask a running cluster: which one, and how its errors reach the person."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager

import click
import trio

from cachefs.cli import params
from cachefs.cli.instances import the_running_one
from cachefs.cli.lifecycle import leaves
from cachefs.client import Client, ClientConfig, open_client
from cachefs.model import CachefsError
from cachefs.net import Address, parse_address

FIRST_CONTACT_S = 5.0

master_option = click.option(
    "--master", "master_address", type=params.ADDRESS, help="Default: that of the `cachefs up` on this machine."
)


def run_with_client(
    address: Address | None, run: Callable[[Client], Awaitable[None]], *, with_worker: bool = False
) -> None:
    """Raises CachefsError. `with_worker`: that of this node too."""
    chosen = address or parse_address(the_running_one().master)

    async def main() -> None:
        async with _client(chosen, with_worker) as client:
            await run(client)

    try:
        trio.run(main)
    except* CachefsError as group:
        error = leaves(group)[0]
        assert isinstance(error, CachefsError)
        raise error from None


@asynccontextmanager
async def _client(address: Address, with_worker: bool) -> AsyncGenerator[Client, None]:
    config = ClientConfig(address, patience_s=FIRST_CONTACT_S, first_contact_s=FIRST_CONTACT_S, with_worker=with_worker)
    async with open_client(config) as client:
        yield client
