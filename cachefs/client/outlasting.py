"""What a client remembers of names, as bytes: for one that goes on with its work while the master is away.

They are good for nothing else: what the other one recalls is never believed where somebody can be asked.
"""

from __future__ import annotations

import logging

import msgspec
import trio

from cachefs.client.metadata import Metadata
from cachefs.client.remembered import Copied
from cachefs.model import Ino, MiB

logger = logging.getLogger(__name__)

MOST_NAMES = 100_000
"""Of those that exist, and as many that do not: the newest. Some 120 bytes each."""
MOST_BYTES = 32 * MiB
_VERSION = 1


class _Packed(msgspec.Struct, frozen=True, array_like=True):
    version: int
    namespace_id: str
    copied: Copied
    whole: list[tuple[int, int]]
    """Directories that somebody was told all names of, and how many there were."""


async def pack_names(metadata: Metadata) -> bytes:
    """Cancelling is safe. Empty when that would be more than `MOST_BYTES`."""
    copied, whole = metadata.copy(MOST_NAMES)
    packed = _Packed(_VERSION, metadata.namespace_id, copied, [(int(ino), names) for ino, names in whole])
    data = await trio.to_thread.run_sync(msgspec.msgpack.encode, packed)
    return data if len(data) <= MOST_BYTES else b""


async def recall_names(metadata: Metadata, data: bytes) -> bool:
    """Whether they were of any use: they are of the same namespace, and of a version that is understood."""
    try:
        packed = await trio.to_thread.run_sync(lambda: msgspec.msgpack.decode(data, type=_Packed))
        if packed.version != _VERSION or packed.namespace_id != metadata.namespace_id:
            logger.info("names of an earlier server are of another version or namespace, and not used")
            return False
        for _ in metadata.recall(packed.copied, [(Ino(ino), names) for ino, names in packed.whole]):
            await trio.lowlevel.checkpoint()
    except (msgspec.MsgspecError, ValueError, IndexError) as error:
        logger.warning("names of an earlier server are not understood error=%s", error)
        return False
    logger.info("names of an earlier server are remembered names=%d", len(packed.copied.names))
    return True
