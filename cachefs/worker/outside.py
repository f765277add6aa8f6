"""Serving mounts of other hosts, which have no worker of their own: over TCP they get bytes, and never descriptors."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import partial

import msgspec
import trio

from cachefs.model import CachefsError, Ino
from cachefs.net import Answer, FileSlice, Session
from cachefs.wire.messages import Fetch, FetchReply, Promote, PromoteReply
from cachefs.worker.blocks import Blocks
from cachefs.worker.counters import Counters

logger = logging.getLogger(__name__)

MAX_PROMOTING = 64
"""Contents made local at once for mounts that do not wait for them; what is asked beyond that is read all the same."""
_NONE_HELD = 0
"""No serial: what is here always comes with a descriptor."""


class Outside:
    """Handlers of what mounts ask over TCP. Promotions that nobody waits for run in `nursery`."""

    def __init__(
        self,
        blocks: Blocks,
        check_namespace: Callable[[Session], None],
        counters: Counters,
        nursery: trio.Nursery,
    ) -> None:
        self._blocks = blocks
        self._check_namespace = check_namespace
        self._counters = counters
        self._nursery = nursery
        self._promoting: set[Ino] = set()

    async def fetch(self, request: Fetch, session: Session) -> Answer[FetchReply]:
        """The bytes: from what is kept here by `sendfile`, else as they come. Raises as `Blocks.fetch`."""
        self._check_namespace(session)
        answer = await self._blocks.fetch(msgspec.structs.replace(request, held=_NONE_HELD), session)
        self._counters.served_reads += 1
        self._counters.served_bytes += request.length
        if answer.message.serial == 0:
            return answer
        (fd,) = answer.fds
        part = FileSlice(fd, request.offset, request.length)
        return Answer(FetchReply(0, []), part, on_sent=partial(os.close, fd))

    async def promote(self, request: Promote, session: Session) -> PromoteReply:
        """Begin to make a content local, and answer at once that it is not sealed: this reader can open nothing here.
        For one who only wants it kept (`background`) as `Blocks.promote`.
        """
        self._check_namespace(session)
        if request.background:
            return await self._blocks.promote(request, session.id)
        if request.ino not in self._promoting and len(self._promoting) < MAX_PROMOTING:
            self._promoting.add(request.ino)
            self._nursery.start_soon(self._promote, request, session.id)
        return PromoteReply(False)

    async def _promote(self, request: Promote, reader: int) -> None:
        try:
            await self._blocks.promote(request, reader)
        except (CachefsError, OSError) as error:
            # Whoever reads it is told by `fetch`.
            logger.info("not promoted ino=%d error=%s", request.ino, error)
        finally:
            self._promoting.discard(request.ino)
