"""What a successor needs while the master is away: the names that this server remembers, kept with what is open."""

from __future__ import annotations

import logging
from functools import partial

import trio

from cachefs.client import Client, pack_names
from cachefs.fuse.kept import Kept

logger = logging.getLogger(__name__)

_LOOK_EVERY_S = 0.5
_WORTH_KEEPING_S = 1.0
"""An outage that is shorter is a restart."""
_SETTLED_S = 5.0
"""By then a server that has just begun knows whether the master is away."""


async def keep_names(client: Client, kept: Kept) -> None:
    """As long as the master is away, and not longer: what changes once it is back would not be in them. Runs until
    cancelled.

    Nothing is learned meanwhile, so they are written once. Those that an earlier server left are as good, if it was not
    killed while it wrote.
    """
    begun = trio.current_time()
    if kept.has_names and not kept.names():
        kept.drop_names()
    while True:
        is_away = client.reach.is_away
        if is_away and client.reach.away_s > _WORTH_KEEPING_S and not kept.has_names:
            names = await pack_names(client.metadata)
            try:
                await trio.to_thread.run_sync(partial(kept.save_names, names))
                logger.info("names are kept for whoever goes on bytes=%d", len(names))
            except OSError as error:
                logger.warning("names are not kept for whoever goes on error=%s", error)
                return
        elif not is_away and kept.has_names and trio.current_time() > begun + _SETTLED_S:
            kept.drop_names()
        await trio.sleep(_LOOK_EVERY_S)
