"""The messages of volumes: what an orchestrator makes, hands to its jobs and takes away again, by name.

A volume is a path of the namespace: an under-store of its own, attached for it below `/volumes`, or a directory that is
there anyway. It can have a quota. Nothing that is asked here ever changes an object of an under-store.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from cachefs.wire.messages import Done
from cachefs.wire.quotas import Limit
from cachefs.wire.requests import Request

MOST_NAME_BYTES = 1024
"""Of a volume's name, in UTF-8."""
MOST_LISTED = 1000
"""In one answer."""


class VolumeInfo(msgspec.Struct, frozen=True):
    """What may be known of it by everybody: options of its under-store are not told, nor credentials in its URL."""

    id: str
    """Follows from the name alone."""
    name: str
    path: str
    """Of the namespace: what a mount shows of it."""
    url: str
    """Of its own under-store; "": it is a directory that is there anyway."""
    quota_bytes: int
    """That it was given; 0: none."""
    used_bytes: int
    """What the contents below `path` take in all caches, as `QuotaInfo.used_bytes`; 0 where that path has no quota."""
    context: dict[str, str]
    """As it was given."""
    created_s: float
    """Unix time."""


class CreateVolume(Request[VolumeInfo], frozen=True):
    """Make a volume, for good. The same again, also at the same time, gives the same one. May hold credentials: never
    logged, never shown.

    Raises ConfigError for a name, path, URL or option that will not do, and for one quota too many; ExistsError when
    there is one of that name that is not the same; NotFoundError, NotADirectory, UnderStoreError and its kinds when the
    directory is not there, or the under-store cannot be listed; CapacityError when more is pinned than its quota.
    Nothing is changed then.
    """

    name: str
    url: str = ""
    """Of an under-store to attach for it, or else `path`."""
    path: str = ""
    """Of a directory that exists, or else `url`."""
    options: dict[str, str] = msgspec.field(default_factory=dict)
    """Of the under-store, as for `AddStore`."""
    quota_bytes: Limit = 0
    """What its contents may take in all caches together; 0: no bound of its own."""
    context: dict[str, str] = msgspec.field(default_factory=dict)
    """Kept for the asker, and told to everybody: nothing secret."""
    replaces_options: bool = False
    """Where one of that name differs in its options alone, it gets these, once the under-store is seen to list with
    them: its credentials were renewed. Until then, and when they will not do, those it has stay in force."""


class DeleteVolume(Request[Done], frozen=True):
    """Take away the under-store that was attached for it, and its quota. No object is touched, and what is cached
    stays. One that is not there is no error.

    Raises ConfigError when another under-store is attached in it, or another volume is a directory of it: nothing is
    changed then.
    """

    id: str


class GetVolume(Request[VolumeInfo], frozen=True):
    """Raises NotFoundError."""

    id: str


class VolumeList(msgspec.Struct, frozen=True):
    volumes: list[VolumeInfo]
    """By id."""
    next: str = ""
    """Where the next ones begin, as `ListVolumes.after`; "": there are none."""


class ListVolumes(Request[VolumeList], frozen=True):
    """A part of them."""

    after: str = ""
    """An id, also one that is not there any more."""
    limit: Annotated[int, msgspec.Meta(ge=1, le=MOST_LISTED)] = MOST_LISTED


class SetVolumeQuota(Request[VolumeInfo], frozen=True):
    """Another quota, for good; 0: none. Raises NotFoundError; ConfigError and CapacityError as `CreateVolume`."""

    id: str
    quota_bytes: Limit


class RenewVolume(Request[VolumeInfo], frozen=True):
    """Other credentials for the under-store of a volume, for good, once it is seen to list with them; until then, and
    when they will not do, those it has stay in force. The same again asks nobody. Never logged, never shown.

    Raises NotFoundError; ExistsError where something differs that is no credential, as it would be another volume;
    ConfigError for a volume that has no under-store of its own; UnderStoreError and its kinds.
    """

    id: str
    options: dict[str, str]
    """Names and values as of `CreateVolume.options`; what is not given stays, but for a session token, which goes with
    the key that it is of."""
