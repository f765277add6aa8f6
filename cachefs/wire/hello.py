"""The first frame in each direction."""

from __future__ import annotations

from typing import Annotated

import msgspec

_Text = Annotated[str, msgspec.Meta(max_length=255, pattern=r"^[^\x00-\x1f\x7f-\x9f\u2028\u2029]*\Z")]
"""It is shown in logs: no line may be forged there."""


class Hello(msgspec.Struct, frozen=True):
    """Who is speaking. The version of the protocol is in every frame's header."""

    role: _Text
    """"client", "worker" or "master"."""
    name: _Text = ""
    namespace_id: _Text = ""
    """Of the master that inode numbers come from, where the speaker knows one."""
