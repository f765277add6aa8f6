"""The messages of a cluster: how workers join and report, who holds what, and what workers ask of each other.

A block is found in three steps, each of them a hint that checksums make harmless when it is wrong: the master says who
holds it (`AskBlocks`), a holder sends its pages (`ReadBlock`), and if there is none, the one worker that was given the
origin lease reads the under-store, and sends the others what arrives.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from cachefs.model import NO_INO
from cachefs.wire.messages import (
    FETCH_LIMIT,
    BlockName,
    Bytes,
    ClusterInfo,
    Done,
    Index,
    InoField,
    Key,
    StoreInfo,
)
from cachefs.wire.requests import Request, StreamRequest

ASKED_AT_ONCE = 1000
"""Blocks of one `AskBlocks` or `AskDrops`."""
REPORTED_AT_ONCE = 10_000
"""Blocks of one `ReportBlocks`: some 300 KB."""

WorkerState = Literal["active", "draining", "drained"]
"""Draining: its last copies are being moved elsewhere, and it takes no new ones; drained: that is done."""


# ---- workers join and report ---------------------------------------------------------------------------------------


class Registered(msgspec.Struct, frozen=True):
    cluster: ClusterInfo
    stores: list[StoreInfo]
    epoch: int
    """Of this registration: larger than all before. Reports of an older one are refused."""


_Printable = r"^[^\x00-\x1f\x7f-\x9f\u2028\u2029]*\Z"
"""They are shown in logs and tables: no line may be forged there."""
WorkerName = Annotated[str, msgspec.Meta(min_length=1, max_length=255, pattern=_Printable)]
_Address = Annotated[str, msgspec.Meta(max_length=300, pattern=_Printable)]
_LabelText = Annotated[str, msgspec.Meta(max_length=255, pattern=_Printable)]
Labels = Annotated[dict[_LabelText, _LabelText], msgspec.Meta(max_length=32)]
BlockBytesField = Annotated[int, msgspec.Meta(ge=0, le=2**50)]
"""Sums of many of these fit into what a database can hold."""


class RegisterWorker(Request[Registered], frozen=True):
    """First request of a worker's connection; the registration ends with the connection.

    Raises ConfigError when another worker of that name is alive.
    """

    name: WorkerName
    address: _Address
    """Where other workers reach it."""
    socket: Annotated[str, msgspec.Meta(max_length=4096)]
    host_boot_id: str
    capacity_bytes: Bytes = 0
    """Of all its tiers."""
    instance: str = ""
    """Random, of this process: tells a worker that comes back from another one of the same name."""
    labels: Labels = msgspec.field(default_factory=dict)
    """Where it is, such as {"rack": "r7"}."""


class HeldBlock(msgspec.Struct, frozen=True, array_like=True):
    key: Key
    block_index: Index
    length: BlockBytesField


class ReportReply(msgspec.Struct, frozen=True, array_like=True):
    """What became of this worker's blocks by what others reported, since the last report."""

    shared: list[BlockName]
    """Held by another worker too now."""
    sole: list[BlockName]
    """Held by no other one any more."""
    moved: list[BlockName]
    """Of `fetching`: their origin lease is another worker's now."""


class Unsettled(msgspec.Struct, frozen=True, array_like=True):
    """What a worker may seal yet although it takes no new blocks."""

    blocks: Bytes
    missing_bytes: Bytes
    """Of blocks that are being filled, as far as is known: falls while something comes."""


class ReportBlocks(Request[ReportReply], frozen=True):
    """The heartbeat: sealed blocks this worker has got or lost since its last report, and how it is. Sent every second;
    a worker that is not heard of for a while counts as dead, and its leases are given to others.

    A full report, the first after each registration, is a series: all but the last say `more`. What the master knew of
    this worker before and was not told in it is forgotten at its end.

    Raises StaleError for another epoch than that of the worker's last registration.
    """

    epoch: int
    added: Annotated[list[HeldBlock], msgspec.Meta(max_length=REPORTED_AT_ONCE)]
    removed: Annotated[list[BlockName], msgspec.Meta(max_length=REPORTED_AT_ONCE)]
    full: bool = False
    more: bool = False
    fetching: Annotated[list[BlockName], msgspec.Meta(max_length=REPORTED_AT_ONCE)] = msgspec.field(
        default_factory=list
    )
    """Under an origin lease that is still needed."""
    released: Annotated[list[BlockName], msgspec.Meta(max_length=REPORTED_AT_ONCE)] = msgspec.field(
        default_factory=list
    )
    """No longer fetched, and not sealed."""
    room_bytes: Bytes = 0
    """What it would take in without giving up the last copy of anything that is in use."""
    capacity_bytes: Bytes = 0
    """Of the tiers that work."""
    unsettled: Unsettled | None = None
    """What it sealed before it said so is reported by then. None: it takes new blocks, or has more to report."""


class Member(msgspec.Struct, frozen=True, array_like=True):
    """A worker that is alive, as others see it."""

    name: str
    address: str
    labels: dict[str, str]
    capacity_bytes: int
    room_bytes: int
    """As it reported last."""
    state: WorkerState


class Members(msgspec.Struct, frozen=True):
    workers: list[Member]
    """All that are alive."""


class WatchMembers(StreamRequest[Members], frozen=True):
    """Who is alive, and again whenever that changes, until the asker leaves; changes of room alone now and then."""


# ---- who holds what ------------------------------------------------------------------------------------------------


class Holders(msgspec.Struct, frozen=True, array_like=True):
    workers: list[str]
    """Names of those that said they hold it, which may be out of date."""


class Locate(Request[Holders], frozen=True):
    key: Key
    block_index: Index


class BlockPlace(msgspec.Struct, frozen=True, array_like=True):
    holders: list[str]
    """Workers that are alive and said they hold it sealed."""
    origin: str
    """The worker that fetches it from the under-store, if there are no holders: the asker's own name is a grant."""


class BlockPlaces(msgspec.Struct, frozen=True, array_like=True):
    places: list[BlockPlace]
    """In the order asked."""


class AskBlocks(Request[BlockPlaces], frozen=True):
    """Where to get blocks from; of a worker only.

    An origin lease is a grant for as long as its holder reports it in `ReportBlocks.fetching` and is alive. It ends
    when the block is reported sealed, or released; and it is moved to whoever asks `without` its holder.
    """

    blocks: Annotated[list[BlockName], msgspec.Meta(max_length=ASKED_AT_ONCE)]
    lease: bool
    """Grant the origin lease of those that nobody holds or fetches; without, `origin` may be empty."""
    without: Annotated[list[str], msgspec.Meta(max_length=ASKED_AT_ONCE)] = msgspec.field(default_factory=list)
    """Workers that could not be read from: do not name them."""


class Granted(msgspec.Struct, frozen=True, array_like=True):
    blocks: list[BlockName]


class AskDrops(Request[Granted], frozen=True):
    """Blocks that this worker would evict because others hold them as well. Answered by those it may: from then on it
    does not count as a holder of them, so that no two holders drop "the other copy" at once.
    """

    blocks: Annotated[list[BlockName], msgspec.Meta(max_length=ASKED_AT_ONCE)]


# ---- between workers -----------------------------------------------------------------------------------------------


class BlockBytes(msgspec.Struct, frozen=True, array_like=True):
    """With the bytes as payload, unless they are not there yet."""

    checksum: int
    """xxh3_64 of the payload. Of a whole page it is the one made when it entered from the under-store."""
    pending: bool = False
    """It is being fetched, and takes a while: ask again. Whoever does not even say that is stuck."""


Effort = Literal["held", "origin", "home"]


class ReadBlock(Request[BlockBytes], frozen=True):
    """[offset, offset+length) of a block, within one page; from a worker.

    Raises BlockMissingError when it is not here. When it was to be fetched: CapacityError if it cannot be kept,
    StaleError, UnderStoreError and its kinds.
    """

    key: Key
    block_index: Index
    offset: Bytes
    length: Annotated[int, msgspec.Meta(gt=0, le=FETCH_LIMIT)]
    effort: Effort
    """`held`: only what is there. `origin`: the asker believes that this worker fetches the block. `home`: nobody has
    it; this worker may take it in, since the asker cannot."""
    ino: InoField = NO_INO
    """An inode of that content, where it may have to be fetched."""


class DoubtBlock(Request[Done], frozen=True):
    """What this worker sent of a block did not match its checksum: it is to look at its copy, and to drop a bad one."""

    key: Key
    block_index: Index
