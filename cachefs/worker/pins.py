"""Which contents are pinned, as the master tells it, put in force in the store."""

from __future__ import annotations

import logging
from collections.abc import Callable

import trio

from cachefs.model import TransportError
from cachefs.net import Peer
from cachefs.store import PinnedKeys
from cachefs.wire.messages import PinsApplied, WatchPins

logger = logging.getLogger(__name__)


class Pins:
    """What was told last stays in force while the master is away."""

    def __init__(self) -> None:
        self.keys = PinnedKeys()
        self.apply: Callable[[], None] = lambda: None
        """Called in a thread when other contents are pinned than before."""
        self.known = trio.Event()
        """The master has told the first time: from then on it may be evicted."""
        self._disk = trio.CapacityLimiter(1)

    async def follow(self, peer: Peer) -> None:
        """Hear of pins until the connection is lost, or cancelled."""
        try:
            async with peer.stream(WatchPins()) as parts:
                begun = False
                async for part in parts:
                    if not begun:
                        self.keys.begin()
                        begun = True
                    self.keys.collect(part.keys)
                    if part.last:
                        begun = False
                        ordered = await trio.to_thread.run_sync(self.keys.ordered, limiter=self._disk)
                        self.keys.finish(ordered)
                        await trio.to_thread.run_sync(self.apply, limiter=self._disk)
                        self.known.set()
                        await peer.call(PinsApplied(part.serial))
        except TransportError as error:
            logger.debug("pins not heard of error=%s", error)
