"""Commands that ask a running cluster: which one, and how its errors reach the person."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import click
import trio

from cachefs.cli import params
from cachefs.cli.instances import the_running_one
from cachefs.cli.lifecycle import leaves
from cachefs.cli.security import security_options, security_to_ask
from cachefs.client import Client, ClientConfig, open_client
from cachefs.model import CachefsError
from cachefs.net import Address, parse_address

FIRST_CONTACT_S = 5.0


def master_option(function: params.F) -> params.F:
    """Which master, and what to prove to it."""
    return click.option(
        "--master", "master_address", type=params.ADDRESS, help="Default: that of the `cachefs up` on this machine."
    )(security_options(function))


def run_with_client(
    address: Address | None,
    run: Callable[[Client], Awaitable[None]],
    *,
    with_worker: bool = False,
    admin: bool = False,
    patience_s: float = FIRST_CONTACT_S,
) -> None:
    """Raises CachefsError. `with_worker`: that of this node too. `admin`: `run` asks what only an admin may.
    `patience_s`: how long a master that is away is waited for.
    """
    chosen = address or parse_address(the_running_one().master)
    # Those of `cachefs up` are without, whatever is set for others.
    security = security_to_ask(chosen, admin=admin) if address is not None else None
    config = ClientConfig(
        chosen,
        patience_s=patience_s,
        first_contact_s=patience_s,
        with_worker=with_worker,
        security=security,
    )

    async def main() -> None:
        async with open_client(config) as client:
            await run(client)

    try:
        trio.run(main)
    except* CachefsError as group:
        error = leaves(group)[0]
        assert isinstance(error, CachefsError)
        raise error from None
