"""Serving mounts of other hosts, which have no worker of their own: over TCP they get bytes, and never descriptors."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

import msgspec
import trio

from cachefs.model import BlockCorruptError, BlockMissingError, CachefsError, Ino, MiB
from cachefs.net import Answer, Session
from cachefs.store import page_checksum
from cachefs.wire.messages import Fetch, FetchReply, Promote, PromoteReply
from cachefs.worker.blocks import Blocks
from cachefs.worker.checked import CheckedReads
from cachefs.worker.counters import Counters

logger = logging.getLogger(__name__)

MAX_PROMOTING = 64
"""Contents made local at once for mounts that do not wait for them; what is asked beyond that is read all the same."""
_NONE_HELD = 0
"""No serial: what is here always comes with a descriptor."""
_ATTEMPTS = 3
_INLINE_BYTES = MiB
"""Summed up without a thread: a tenth of a millisecond."""


class Outside:
    """Handlers of what mounts ask over TCP. Promotions that nobody waits for run in `nursery`."""

    def __init__(
        self,
        blocks: Blocks,
        checked: CheckedReads,
        check_namespace: Callable[[Session], None],
        counters: Counters,
        nursery: trio.Nursery,
    ) -> None:
        self._blocks = blocks
        self._checked = checked
        self._check_namespace = check_namespace
        self._counters = counters
        self._nursery = nursery
        self._promoting: set[Ino] = set()

    async def fetch(self, request: Fetch, session: Session) -> Answer[FetchReply]:
        """The bytes, with a checksum of them: those of what is kept here are compared before. Raises as
        `Blocks.fetch`.
        """
        self._check_namespace(session)
        answer = await self._fetch(msgspec.structs.replace(request, held=_NONE_HELD), session)
        self._counters.served_reads += 1
        self._counters.served_bytes += request.length
        return answer

    async def _fetch(self, request: Fetch, session: Session) -> Answer[FetchReply]:
        for _ in range(_ATTEMPTS):
            answer = await self._blocks.fetch(request, session)
            if answer.message.serial == 0:
                return await _with_checksum(answer)
            try:
                compared = await self._compared(request, answer, session)
            except OSError as error:
                logger.info("cannot be read, reading through ino=%d error=%s", request.ino, error)
                break
            if compared is not None:
                return compared
            self._check_namespace(session)
        # As of a reader of this node whose disk fails: from elsewhere, and what is here is looked at.
        return await _with_checksum(
            await self._blocks.fetch(msgspec.structs.replace(request, unreadable=True), session)
        )

    async def _compared(
        self, request: Fetch, answer: Answer[FetchReply], session: Session
    ) -> Answer[FetchReply] | None:
        """The bytes of what was confirmed; None: they are damaged, and not here any more. Raises OSError."""
        (fd,) = answer.fds
        try:
            block, known = await self._blocks.known_of(request, answer.message.serial)
            room = await session.room_for_payload(request.length)
            try:
                data = await self._checked.read(fd, block, known, request.offset, request.length)
                return await _with_checksum(Answer(FetchReply(0, []), data, on_sent=room.give_back))
            except BlockCorruptError as error:
                room.give_back()
                first, end = request.offset // known.page_size, -(-(request.offset + request.length) // known.page_size)
                await self._blocks.found_damaged(block, known, range(first, end), error)
            except BaseException:
                room.give_back()
                raise
        except (BlockCorruptError, BlockMissingError) as error:
            # Gone since; or its checksums are, which whoever asks next finds out.
            logger.info("confirmed, but not here any more ino=%d error=%s", request.ino, error)
        finally:
            os.close(fd)
        return None

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


async def _with_checksum(answer: Answer[FetchReply]) -> Answer[FetchReply]:
    """So that whoever gets it sees what became of it on the way."""
    data = answer.payload
    assert isinstance(data, bytes | bytearray | memoryview)
    try:
        if len(data) <= _INLINE_BYTES:
            checksum = page_checksum(data)
        else:
            checksum = await trio.to_thread.run_sync(page_checksum, data)
    except BaseException:
        if answer.on_sent is not None:
            answer.on_sent()
        raise
    return Answer(FetchReply(0, [], checksum), data, on_sent=answer.on_sent)
