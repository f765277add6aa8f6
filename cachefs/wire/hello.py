"""The first frame in each direction."""

from __future__ import annotations

from typing import Annotated

import msgspec

_Text = Annotated[str, msgspec.Meta(max_length=255, pattern=r"^[^\x00-\x1f\x7f-\x9f\u2028\u2029]*\Z")]
"""It is shown in logs: no line may be forged there."""
_Nonce = Annotated[bytes, msgspec.Meta(max_length=32)]


class Hello(msgspec.Struct, frozen=True, omit_defaults=True):
    """Who is speaking. The version of the protocol is in every frame's header."""

    role: _Text
    """"client", "worker" or "master"."""
    name: _Text = ""
    namespace_id: _Text = ""
    """Of the master that inode numbers come from, where the speaker knows one."""
    nonce: _Nonce = b""
    """32 random bytes of a side with tokens, which demands a proof from the other one; empty: there are none."""
    token: _Text = ""
    """Of an asker with tokens: the role that it will prove, see `auth`."""
