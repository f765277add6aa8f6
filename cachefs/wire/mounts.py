"""The messages of a node's mount service: which mounts a node is to have, asked by whoever brings volumes to jobs.

Spoken over a unix socket of the node only. Credentials are no part of it: mounts have those of the service.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from cachefs.wire.messages import Done
from cachefs.wire.requests import Request

MOST_ID_BYTES = 1024
_Text = Annotated[str, msgspec.Meta(max_length=4096)]


class MountState(msgspec.Struct, frozen=True):
    id: str
    """As it was given: whose mount it is."""
    mountpoint: str
    path: str
    """The directory of the namespace that it shows."""
    options: dict[str, str]
    state: Literal["serving", "starting", "dead"]
    """starting: no server answers just now, and one is on its way. dead: not mounted, and nobody mounts it again until
    somebody asks."""
    why: str = ""
    """Of what is not serving."""
    device: str = ""
    """`major:minor`, as in mountinfo, while it is mounted."""
    server_pid: int = 0
    keeper_socket: str = ""
    restarts: int = 0
    """Servers that were started in the place of one that ended, since this service was started."""


class EnsureMount(Request[MountState], frozen=True):
    """Have it mounted there, for good: also after a restart of the service. Answered when the file system answers. The
    same again, also at the same time, changes nothing; what is dead is mounted anew.

    Raises ConfigError for a path, mountpoint or option that will not do; ExistsError when something else is mounted
    there; UnavailableError with what a server says that does not come up: nothing is left of it then.
    """

    id: str
    mountpoint: _Text
    """Absolute; directories are made as needed."""
    path: _Text
    """A directory of the namespace, absolute."""
    options: dict[str, str] = msgspec.field(default_factory=dict)
    """Flags of `cachefs mount` about how a file system behaves, without dashes in front; "true" or "" for those
    without a value."""


class RemoveMount(Request[Done], frozen=True):
    """Unmount it, and forget it. One that is not there is no error.

    Raises NamespaceError when it is in use, or mounted at other places as well: nothing is changed then.
    """

    mountpoint: _Text


class MountList(msgspec.Struct, frozen=True):
    mounts: list[MountState]


class ListMounts(Request[MountList], frozen=True):
    """Those that somebody asked for."""
