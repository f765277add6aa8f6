"""`cachefs verify`: is what is cached still what was cached."""

from __future__ import annotations

import json
import sys

import click
import trio
from rich.console import Console

from cachefs.cli import params
from cachefs.cli.instances import the_running_one
from cachefs.cli.lifecycle import leaves
from cachefs.cli.progress import HowFar, shown
from cachefs.model import CachefsError, format_size
from cachefs.net import Hello, UnixAddress, open_peer
from cachefs.wire.messages import Verify, VerifyProgress


@click.command()
@click.option("--repair", is_flag=True, help="Drop what is damaged, so that it is fetched again when it is next read.")
@click.option("--worker-socket", type=click.Path(), help="Default: that of the `cachefs up` on this machine.")
@params.json_option
def verify(repair: bool, worker_socket: str | None, as_json: bool) -> None:
    """Read every cached block of this node's worker from its disk and compare it with its checksums.

    Without --repair nothing is changed, and the exit status is 1 if something is damaged.
    """
    socket = worker_socket or the_running_one().worker_socket
    damaged: list[str] = []
    console = Console(stderr=True)

    async def main() -> VerifyProgress:
        last: VerifyProgress | None = None

        def look() -> HowFar:
            if last is None:
                return HowFar("no block yet")
            return HowFar(f"{_summary(last)}, {len(damaged)} damaged", last.bytes_done, last.bytes_total)

        async with (
            shown(console, "verifying", look),
            open_peer(UnixAddress(socket), Hello(role="client")) as peer,
            peer.stream(Verify(repair)) as stream,
        ):
            async for progress in stream:
                last = progress
                damaged.extend(progress.damaged)
                for name in progress.damaged:
                    console.print(f"{name}: damaged{', dropped' if repair else ''}", markup=False, highlight=False)
        assert last is not None
        return last

    try:
        result = trio.run(main)
    except* CachefsError as group:
        error = leaves(group)[0]
        assert isinstance(error, CachefsError)
        raise error from None
    if as_json:
        facts = {"blocks": result.blocks_done, "bytes": result.bytes_done, "not_looked_at": result.suspects}
        print(json.dumps({**facts, "damaged": damaged, "repaired": repair}))
    else:
        print(f"{_summary(result)}, {len(damaged)} damaged{' and dropped' if repair and damaged else ''}")
        if result.suspects:
            print(f"{result.suspects} of an earlier boot are not looked at: each is verified before it is next used")
    if damaged and not repair:
        sys.exit(1)


def _summary(progress: VerifyProgress) -> str:
    blocks = f"{progress.blocks_done} of {progress.blocks_total} blocks"
    return f"{blocks}, {format_size(progress.bytes_done)} of {format_size(progress.bytes_total)}"
