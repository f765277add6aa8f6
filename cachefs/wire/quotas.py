"""The messages of quotas: bounds on what contents below a directory take in all caches together.

The master tells workers which contents count for which quotas, as it does of what is pinned. A worker says what it has
of each, and asks for more before it takes more; what it was granted it may take without asking again.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from cachefs.wire.messages import Bytes, Done
from cachefs.wire.requests import Request, StreamRequest

MOST_QUOTAS = 4096
"""In one cluster."""
MOST_BYTES = 2**62
"""Of one quota."""

QuotaId = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
Limit = Annotated[int, msgspec.Meta(ge=0, le=MOST_BYTES)]
_Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


# ---- people and programs -------------------------------------------------------------------------------------------


class QuotaInfo(msgspec.Struct, frozen=True):
    path: str
    limit_bytes: int
    used_bytes: int
    """What the contents below take in the caches of all workers that are alive, as these said last."""
    refused: int
    """Blocks that were not kept because of it, since the workers that say so were started."""
    set_ns: int
    """Unix time at which it was first set."""
    exists: bool
    """As far as is known; a quota stays when its directory is gone, and holds again when it is back."""
    unconfirmed: list[str] = []
    """Workers that have not said that they heard of it. Told when it is set or removed."""


class SetQuota(Request[QuotaInfo], frozen=True):
    """What is at and below a directory, now and later, takes at most so many bytes in the caches of all workers
    together. For good. One that is set already gets that limit; the same again changes nothing.

    Nothing in use is dropped where there is more already: nothing new is kept there until it is less.

    Raises NotFoundError, NotADirectory, UnderStoreError; ConfigError for one quota too many; CapacityError when more
    is pinned there: nothing is changed then.
    """

    path: str
    limit_bytes: Limit


class RemoveQuota(Request[QuotaInfo], frozen=True):
    """What is cached stays, without a bound. Returns how it was. Raises NotFoundError for a path without one."""

    path: str
    dry_run: bool = False
    """Only tell how it is."""


class QuotaList(msgspec.Struct, frozen=True):
    quotas: list[QuotaInfo]
    """By path."""


class ListQuotas(Request[QuotaList], frozen=True):
    """All of them. Answered from memory."""


# ---- workers -------------------------------------------------------------------------------------------------------


class QuotaRule(msgspec.Struct, frozen=True, array_like=True):
    quota_id: QuotaId
    path: str
    limit_bytes: Limit
    outer: QuotaId
    """The next one that the path lies below; 0: there is none."""


class QuotaContents(msgspec.Struct, frozen=True, array_like=True):
    """A part of all contents that count for a quota; the last part puts them in force, in the place of those before."""

    serial: int
    quota_id: QuotaId
    """The innermost one that `keys` count for; what it lies below, they count for too."""
    keys: bytes
    """16 bytes each."""
    last: bool = False
    rules: list[QuotaRule] = []
    """With the last part: all quotas."""
    same_keys: bool = False
    """Only `rules` are others: which contents count stays as it was told last."""


class WatchQuotas(StreamRequest[QuotaContents], frozen=True):
    """Which contents count for which quotas, and again whenever that changes, until the asker leaves."""


class QuotasApplied(Request[Done], frozen=True):
    """What `WatchQuotas` told with that serial is in force on this worker."""

    serial: int


class QuotaUse(msgspec.Struct, frozen=True, array_like=True):
    quota_id: QuotaId
    used_bytes: Bytes
    """By this worker's tiers, what is being filled included."""
    granted_bytes: Bytes
    """What it keeps of its grant: it takes no more than this before it has the answer."""
    refused: _Count
    """Blocks not kept because of it since this worker was started."""
    wanted_bytes: Bytes = 0
    """More than was granted, for what it is about to take."""
    idle_bytes: Bytes = 0
    """Of what is used, as far as it was looked for: what nobody has read for long. Others may need the room."""


class QuotaGrant(msgspec.Struct, frozen=True, array_like=True):
    quota_id: QuotaId
    granted_bytes: Bytes
    """What it may take. Less than it has: nothing new is to be kept, and what is idle is to be given up, since all
    together are over the limit, or others need what is idle here."""
    soon: bool = False
    """It is less than was wanted, and there may be as much in a moment: others have not used what they were granted, or
    have yet to say what they have."""


class QuotaGrants(msgspec.Struct, frozen=True, array_like=True):
    grants: list[QuotaGrant]
    """Of those that were told of."""


class ReportQuotas(Request[QuotaGrants], frozen=True):
    """How much a worker has of what counts for quotas; those that it has nothing of and wants nothing of are left out.
    Of a worker only, one at a time: every second, and when it needs more than it was granted.
    """

    serial: int
    """Of what `WatchQuotas` told, as it is in force there."""
    uses: Annotated[list[QuotaUse], msgspec.Meta(max_length=2 * MOST_QUOTAS)]
