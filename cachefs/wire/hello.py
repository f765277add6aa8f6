"""The first frame in each direction."""

from __future__ import annotations

import msgspec


class Hello(msgspec.Struct, frozen=True):
    """Who is speaking. The version of the protocol is in every frame's header."""

    role: str
    """"client", "worker" or "master"."""
    name: str = ""
    namespace_id: str = ""
    """Of the master that inode numbers come from, where the speaker knows one."""
