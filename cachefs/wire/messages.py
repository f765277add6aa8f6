"""The messages of cachefs: what a client and a worker ask the master, and what a mount asks its worker. Those that
workers join, report and read from each other by are in `cluster`.

Every class is a struct that msgspec validates on arrival. A request names its reply type in brackets. Names of files
are `str`: keys and names that are not valid UTF-8 are hidden where they enter, in `ufs`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

import msgspec

from cachefs.model import NO_INO, Attr, BlockId, ContentKey, Entry, Geometry, Ino, MiB
from cachefs.wire.requests import Request, StreamRequest

FETCH_LIMIT = 16 * MiB
"""Bytes of one `Fetch`: the largest payload of an answer."""

# What askers send is checked before anybody computes with it: numbers that a database can hold, keys that are keys.
InoField = Annotated[Ino, msgspec.Meta(ge=0, le=2**63 - 1)]
Key = Annotated[ContentKey, msgspec.Meta(min_length=16, max_length=16)]
Index = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
Bytes = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]

PromoteMode = Literal["always", "if-space", "never"]
"""Whether a worker keeps what it reads; see `cachefs.policy.Promote`."""

BlockName = tuple[Key, Index]
"""A `BlockId` on the wire."""


def block_names(blocks: Iterable[BlockId]) -> list[BlockName]:
    return [(block.key, block.block_index) for block in blocks]


def block_ids(names: Iterable[BlockName]) -> list[BlockId]:
    return [BlockId(key, index) for key, index in names]


class Done(msgspec.Struct, frozen=True, array_like=True):
    """It was done; there is nothing to tell."""


class Ping(Request[Done], frozen=True):
    """To master and worker, from anyone: a sign of life. Answered at once, whatever else they do for whoever asks."""


# ---- to the master, from anyone ------------------------------------------------------------------------------------


class ClusterInfo(msgspec.Struct, frozen=True):
    """What every process needs to know before it can begin."""

    cluster_id: str
    namespace_id: str
    """Random, made with the master's database: inode numbers mean nothing under another one."""
    geometry: Geometry
    sync_interval_s: float
    """How long names and attributes may be believed without asking; below 0 = for ever."""


class GetCluster(Request[ClusterInfo], frozen=True):
    pass


class AttrReply(msgspec.Struct, frozen=True, array_like=True):
    attr: Attr
    superseded: bool
    """The name this inode had points at other content now, or at nothing."""


class GetAttr(Request[AttrReply], frozen=True):
    """Raises NotFoundError for a number that was never given out."""

    ino: InoField


class ResolvePath(Request[AttrReply], frozen=True):
    """The inode at a path of the namespace, "/" for its root. Raises NotFoundError, NotADirectory."""

    path: str


class LookupReply(msgspec.Struct, frozen=True, array_like=True):
    attr: Attr | None
    """None: there is no such name."""


class Lookup(Request[LookupReply], frozen=True):
    parent: InoField
    name: str


class ListChunk(msgspec.Struct, frozen=True, array_like=True):
    entries: list[Entry]


class ListDir(StreamRequest[ListChunk], frozen=True):
    """The entries of a directory after inode `after`, in chunks, by ascending inode number: a place to go on from.

    Raises NotFoundError, NotADirectory, StaleError, UnderStoreError and its kinds.
    """

    ino: InoField
    after: InoField = NO_INO


class Changes(msgspec.Struct, frozen=True, array_like=True):
    """Names that may point at something else than before, or at nothing, or that are new."""

    names: list[tuple[Ino, list[str]]]
    """(directory, names in it)."""
    everything: bool = False
    """More changed than could be remembered for this reader: nothing it knows may be believed without asking."""


class Watch(StreamRequest[Changes], frozen=True):
    """What changes from now on, until the asker leaves. The first answer is empty: from then on nothing is missed."""


class RefreshReply(msgspec.Struct, frozen=True):
    directories: int
    """Listed again."""
    changed: int
    """Names that point at something else now, are new or gone."""


class Refresh(Request[RefreshReply], frozen=True):
    """Look at the under-store now: a directory is listed, a file is asked for. Watchers have been told when it is
    answered.

    Raises NotFoundError, NotADirectory, UnderStoreError and its kinds; what was known before is kept then.
    """

    path: str
    recursive: bool = False
    """Also every directory below that was listed before."""


class LoadProgress(msgspec.Struct, frozen=True):
    """Totals so far; the last one of a stream is the result."""

    directories_found: int
    directories_done: int
    files: int
    bytes: int
    """Of all files found."""
    failed: list[tuple[str, str]]
    """(path, reason) of the directories that failed since the last message."""


class LoadMetadata(StreamRequest[LoadProgress], frozen=True):
    """List a directory and everything below it, many directories at a time. What is fresh is not listed again.

    Raises NotFoundError, NotADirectory; a directory that cannot be listed is told in `failed` and the rest goes on.
    """

    path: str


class MountInfo(msgspec.Struct, frozen=True):
    """An under-store attached at a path of the namespace."""

    path: str
    url: str
    """Without credentials."""
    directories: int
    files: int
    """Known so far: directories are listed when they are first asked for."""
    hidden_keys: int
    """Keys seen that cannot be names of files."""
    serving_stale: int
    """Listings that failed, so that an older one was served."""
    by_hand: bool = False
    """Attached while the master ran, by `AddStore`."""
    failing_s: float = 0.0
    """For how many seconds every look has failed; 0: it answered the last time."""
    failures: int = 0
    """Looks that failed since the master started, each after its retries."""
    last_error: str = ""
    """Of the last of them."""


class AddStore(Request[MountInfo], frozen=True):
    """Attach one more under-store, for good. Holds credentials: never logged, never shown.

    Raises ConfigError for a path, URL or option that will not do; NotFoundError, UnderStoreError and its kinds when the
    store cannot be listed; CapacityError for more stores than workers can be told of. Nothing is changed then.
    """

    path: str
    url: str
    options: dict[str, str]


class RemoveStore(Request[MountInfo], frozen=True):
    """Detach an under-store, for good, and tell how it was. Nothing in it is touched, and what is cached stays.

    Raises ConfigError for a path without one, for the last one, for one that others are attached in, and for that of a
    volume.
    """

    path: str
    dry_run: bool = False
    """Only tell."""


class WorkerInfo(msgspec.Struct, frozen=True):
    """A worker as it registered itself."""

    name: str
    address: str
    socket: str
    """Path of its unix socket on its own node."""
    host_boot_id: str
    """Of the kernel it runs under: a mount finds the worker of its own node by it."""
    connected: bool
    """It is alive: connected, and heard of lately."""
    blocks: int
    block_bytes: int
    state: str = "active"
    """Or draining, drained."""
    labels: dict[str, str] = {}
    capacity_bytes: int = 0
    room_bytes: int = 0
    """What it would take in without giving up the last copy of anything in use, as it said last."""
    epoch: int = 0
    """Of its last registration."""
    heard_s: float = -1.0
    """Seconds since it was last heard of; below 0: not since this master started."""
    silent: bool = False
    """It has a connection and says nothing: it hangs, or the network swallows what it says."""


class MasterStatus(msgspec.Struct, frozen=True):
    cluster: ClusterInfo
    uptime_s: float
    mounts: list[MountInfo]
    workers: list[WorkerInfo]


class GetMasterStatus(Request[MasterStatus], frozen=True):
    """Counts what is known, and what workers hold: for people. Who only looks for workers asks `ListWorkers`."""


class WorkerList(msgspec.Struct, frozen=True):
    workers: list[WorkerInfo]
    """By name, all that ever registered. What they hold is not counted: `blocks` and `block_bytes` are 0."""


class ListWorkers(Request[WorkerList], frozen=True):
    """Who is alive, and where. Answered from memory: mounts ask whenever a worker is slow."""


class PinReply(msgspec.Struct, frozen=True):
    """What is pinned, and may be. Sizes are those of contents, but `needed_bytes`: what all of them take on a disk."""

    files: int
    """Known below the paths that were asked for."""
    bytes: int
    needed_bytes: int
    """Of everything that is pinned, these paths included."""
    limit_bytes: int
    """What may be pinned."""
    capacity_bytes: int
    """Of all tiers of the workers that are connected."""
    unconfirmed: list[str]
    """Workers that have not said that they heard of it."""


class Pin(Request[PinReply], frozen=True):
    """Never evict contents at or below these paths, now and later, until they are unpinned. For good.

    Raises NotFoundError, NotADirectory, UnderStoreError; CapacityError when it does not fit: nothing is changed then.
    """

    paths: list[str]
    dry_run: bool = False
    """Only tell, also if it does not fit."""


class UnpinReply(msgspec.Struct, frozen=True):
    unconfirmed: list[str]


class Unpin(Request[UnpinReply], frozen=True):
    """Raises NotFoundError for a path that is not pinned itself: nothing is changed then."""

    paths: list[str]
    dry_run: bool = False
    """Only tell whether they are."""


class PinInfo(msgspec.Struct, frozen=True):
    path: str
    pinned_ns: int
    """Unix time."""
    exists: bool
    """As far as is known; a pin stays when its path is gone, and holds again when it is back."""
    files: int
    bytes: int
    cached_files: int
    """Of which some worker has everything."""
    cached_bytes: int


class PinList(msgspec.Struct, frozen=True):
    pins: list[PinInfo]
    needed_bytes: int
    limit_bytes: int
    """As of `PinReply`."""


class ListPins(Request[PinList], frozen=True):
    sizes: bool
    """Without, only paths and times are told, at once: all sizes are 0."""


# ---- to the master, from workers -----------------------------------------------------------------------------------


class StoreInfo(msgspec.Struct, frozen=True):
    """How to open one under-store. Holds credentials: never logged, never shown."""

    store_id: int
    url: str
    options: dict[str, str]


class Stores(msgspec.Struct, frozen=True):
    stores: list[StoreInfo]


class GetStores(Request[Stores], frozen=True):
    """All that are attached now: asked by a worker that meets one it has not heard of."""


class StoresInUse(msgspec.Struct, frozen=True, array_like=True):
    """Which under-stores are attached, without what it takes to open them."""

    store_ids: list[int]
    newest: int
    """The largest number that was ever given to one: what has a number up to it and is not among these is gone for
    good."""
    renewed: int
    """How many times one has got other options since the master started; these are told by `GetStores`."""


class WatchStores(StreamRequest[StoresInUse], frozen=True):
    """Which are attached, and again whenever that or the options of one change, until the asker leaves."""


class PinnedContents(msgspec.Struct, frozen=True, array_like=True):
    """A part of all contents that are pinned; the last part puts them in force, in the place of those before."""

    serial: int
    keys: bytes
    """16 bytes each."""
    last: bool


class WatchPins(StreamRequest[PinnedContents], frozen=True):
    """Which contents are pinned, and again whenever that changes, until the asker leaves."""


class PinsApplied(Request[Done], frozen=True):
    """What `WatchPins` told with that serial is in force on this worker."""

    serial: int


class ObjectLocation(msgspec.Struct, frozen=True):
    """Which object of which under-store an inode's content comes from."""

    attr: Attr
    superseded: bool
    store_id: int
    path: str
    tag: str
    pinned: bool = False
    """Whoever gets it after `WatchPins` told which contents are pinned learns of a new one by this."""
    quota: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)] = 0
    """The innermost quota that it counts for: the same, of `WatchQuotas`. 0: none."""


class Resolve(Request[ObjectLocation], frozen=True):
    """Raises NotFoundError, IsADirectory."""

    ino: InoField


class NextLocations(msgspec.Struct, frozen=True):
    files: list[ObjectLocation]
    """By ascending inode number, as entries are listed."""
    until: InoField
    """How far was looked: the last inode number there is, when nothing is left."""


class ResolveNext(Request[NextLocations], frozen=True):
    """The files known in the directory of inode `ino` that come after inode `after`: those that whoever reads the
    directory in its order asks for next. The under-store is not asked.

    Raises NotFoundError.
    """

    ino: InoField
    after: InoField
    count: Annotated[int, msgspec.Meta(gt=0, le=1000)]
    """Entries to look at."""


class ReportChanged(Request[Done], frozen=True):
    """The under-store no longer has the version this inode stands for: look again."""

    ino: InoField


# ---- to the worker, from mounts on its node, or on one without a worker --------------------------------------------


class TierInfo(msgspec.Struct, frozen=True):
    kind: str
    path: str
    capacity_bytes: int
    used_bytes: int
    reserved_bytes: int
    blocks: int
    partials: int
    evictions: int
    pinned_bytes: int = 0
    """Of `used_bytes`: never evicted."""
    state: str = "healthy"
    """Of its disk: healthy; limited, nothing new goes there; down or probing, its blocks count as lost."""


class FetchCounters(msgspec.Struct, frozen=True):
    """Since the worker started."""

    under_store_bytes: int
    under_store_reads: int
    pages_fetched: int
    blocks_sealed: int
    changed: int
    """Reads that found the object changed."""
    corrupt: int
    """Pages whose checksum did not match when they were read back."""
    not_admitted: int
    files_ahead: int
    """Small files fetched before anybody asked for them."""
    peer_bytes: int = 0
    """Read from other workers."""
    peer_reads: int = 0
    peer_failures: int = 0
    """Reads from other workers that failed; the bytes came from elsewhere."""
    served_bytes: int = 0
    """Sent to other workers, and to mounts of other hosts."""
    served_reads: int = 0
    leases: int = 0
    """Origin leases taken so far."""
    drops: int = 0
    """Blocks given up because others hold them too."""


class OpenCounts(msgspec.Struct, frozen=True):
    """How files were opened."""

    passthrough: int
    cached: int


class StoreState(msgspec.Struct, frozen=True):
    """How reads from one under-store go, of one worker."""

    origin: str
    """Endpoint and URL, without credentials."""
    failing_s: float
    """For how many seconds every read has failed; 0: it answered the last time."""
    failures: int
    """Reads that failed since the worker started, each after its retries."""
    last_error: str


class WorkerStatus(msgspec.Struct, frozen=True):
    name: str
    namespace_id: str
    uptime_s: float
    tiers: list[TierInfo]
    counters: FetchCounters
    opens: OpenCounts
    """By the mounts of this node, as far as they have told."""
    stores: list[StoreState] = []
    """Those it has read from and has open."""
    master_away_s: float = 0.0
    """For how many seconds it has had no master; 0: it is registered."""
    open_stores: int = 0
    """Under-stores it has open, with those that were removed and are still read from, or are being closed."""


class GetWorkerStatus(Request[WorkerStatus], frozen=True):
    pass


class PromoteReply(msgspec.Struct, frozen=True, array_like=True):
    sealed: bool
    """False: not admitted, there is no room that may be taken for it; read it with `Fetch`."""
    reason: str = ""
    """Why not, where it is not just that the tiers have no room."""


class Promote(Request[PromoteReply], frozen=True):
    """Make the whole content local and answer when it is sealed. For contents of one block.

    Raises StaleError (the object changed), UnderStoreError and its kinds.
    """

    ino: InoField
    promote: PromoteMode | None = None
    """None: as the worker was told."""
    background: bool = False
    """Nobody waits to read it: it delays no reader."""
    reader: int = 0
    """Tells those who open files through one mount apart: what each opens in order is fetched ahead of it."""


class FetchReply(msgspec.Struct, frozen=True, array_like=True):
    """Either a confirmation, or (serial 0, and always over TCP) the bytes themselves as payload.

    A confirmation says that the pages `present` can be read, at their offsets in the block, through the descriptor that
    belongs to `serial`. It comes with the reply unless the asker named that serial as `held`.
    """

    serial: int
    present: list[tuple[int, int]]
    """Half-open ranges of pages, ascending. They cover what was asked for."""
    checksum: int | None = None
    """xxh3_64 of the payload, over TCP. The worker compared what it has with the checksums of its pages before."""


class Fetch(Request[FetchReply], frozen=True):
    """Make [offset, offset+length) of a block readable: `length` bytes, within the block, at most 16 MiB.

    Raises StaleError (the object changed, and these bytes of the old version are not cached), UnderStoreError and its
    kinds.
    """

    ino: InoField
    block_index: Index
    offset: Bytes
    length: Annotated[int, msgspec.Meta(gt=0, le=FETCH_LIMIT)]
    held: int
    unreadable: bool = False
    """Reading through the descriptor held failed: answer with the bytes, and see what is damaged."""
    promote: PromoteMode | None = None


class BlockStatus(msgspec.Struct, frozen=True, array_like=True):
    tier: str
    """`kind:path` of the tier that holds it sealed or in part; empty for none."""
    cached_bytes: int


class GetBlockStatus(Request[BlockStatus], frozen=True):
    """What this worker has of a block."""

    key: Key
    block_index: Index


class FreeReply(msgspec.Struct, frozen=True, array_like=True):
    freed_blocks: int
    freed_bytes: int
    in_use: int
    """Blocks that somebody has open: left as they are."""
    pinned: int = 0
    """Blocks that are pinned: the same."""


class Free(Request[FreeReply], frozen=True):
    """Drop these blocks from the tiers of this worker, but for those in use, or pinned. What is not sealed is passed
    over.
    """

    blocks: Annotated[list[BlockName], msgspec.Meta(max_length=1000)]


class VerifyProgress(msgspec.Struct, frozen=True):
    """So far; the last one of a stream is the result."""

    blocks_done: int
    blocks_total: int
    bytes_done: int
    bytes_total: int
    suspects: int
    """Blocks of an earlier boot, not looked at: each is verified before it is next used."""
    damaged: list[str]
    """Found since the last message."""


class Verify(StreamRequest[VerifyProgress], frozen=True):
    """Read every sealed block from its disk and compare."""

    repair: bool
    """Drop what is damaged; else nothing is changed."""


class OpenedReply(msgspec.Struct, frozen=True, array_like=True):
    follows: bool
    """Files are being fetched ahead of this reader: what it opens next should be told soon."""
    down: list[str] = []
    """Paths of tiers whose disks fail: sealed files are not to be opened there, until a reply without them."""


class Opened(Request[OpenedReply], frozen=True):
    """What was opened since the last such message: for eviction, and to be counted."""

    blocks: list[BlockName]
    """Opened sealed, each named once."""
    counts: OpenCounts
