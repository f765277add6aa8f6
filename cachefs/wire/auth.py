"""How the two sides of a connection prove to each other that they know the token of a role, without showing it.

Both HELLOs carry a fresh nonce, and the asker's names the role it speaks for. Then the asker sends AUTH with its proof,
and the answerer, once that is right, AUTH with its own. A proof is

    HMAC-SHA256(token, label || direction || role || asker's HELLO || answerer's HELLO || binding)

each part with its length before it (4 bytes, little endian), and the HELLOs as whole frames, as they were on the wire.
The direction, "asker" or "answerer", keeps a proof from being played back to its maker. The binding is the SHA-256 of
the answerer's TLS certificate, empty without TLS: who ends one side's TLS and opens another to the other side is found
out.
"""

from __future__ import annotations

import enum
import hashlib
import hmac
import secrets
from collections.abc import Iterable, Mapping

import msgspec

from cachefs.model import AuthenticationError, ConfigError, LocalProtocolError
from cachefs.wire.hello import Hello

NONCE_BYTES = 32
PROOF_BYTES = hashlib.sha256().digest_size
MIN_TOKEN_CHARACTERS = 32
MAX_TOKEN_CHARACTERS = 4096
_LABEL = b"cachefs handshake 1"


class Role(enum.StrEnum):
    """On whose behalf a connection speaks. Who knows the token of a role has it."""

    CLIENT = "client"
    """Reads: mounts, and commands that only look."""
    WORKER = "worker"
    """Is told how to open the under-stores, and says what is cached where."""
    ADMIN = "admin"
    """Changes what is attached and pinned; may do all that a client may."""


class Tokens:
    """The token of each role this process knows. Shown nowhere: it has no text but the names of the roles."""

    def __init__(self, tokens: Mapping[Role, str]) -> None:
        """Raises ConfigError, which does not show them, for tokens that are too short, not plain, or alike."""
        for role, token in tokens.items():
            if not MIN_TOKEN_CHARACTERS <= len(token) <= MAX_TOKEN_CHARACTERS or not _is_plain(token):
                accepted = f"{MIN_TOKEN_CHARACTERS} to {MAX_TOKEN_CHARACTERS} visible ASCII characters"
                raise ConfigError(f"token of {role}", "(not shown)", accepted)
        if len(set(tokens.values())) < len(tokens):
            raise ConfigError("tokens", "(not shown)", "another one for each role")
        self._keys = {role: token.encode() for role, token in tokens.items()}

    @property
    def roles(self) -> list[Role]:
        return sorted(self._keys)

    def __contains__(self, role: Role) -> bool:
        return role in self._keys

    def __repr__(self) -> str:
        return f"Tokens(roles={[str(role) for role in self.roles]})"

    def proof(self, role: Role, direction: str, parts: Iterable[bytes]) -> bytes:
        mac = hmac.new(self._keys[role], digestmod=hashlib.sha256)
        for part in (_LABEL, direction.encode(), role.encode(), *parts):
            mac.update(len(part).to_bytes(4, "little"))
            mac.update(part)
        return mac.digest()


def _is_plain(token: str) -> bool:
    return token.isascii() and token.isprintable() and " " not in token


class Handshake:
    """What one side of one connection has to remember until both have proved themselves."""

    def __init__(self, tokens: Tokens, *, asking: bool, presents: Role | None = None) -> None:
        """`presents`: the role that an asking side speaks for. Raises LocalProtocolError without its token."""
        if asking and (presents is None or presents not in tokens):
            raise LocalProtocolError(f"there is no token of {presents or 'a role'} to ask with")
        self.role = presents if asking else None
        """The one proved, or to be proved; of an answering side once the other one has named it."""
        self.binding = b""
        """To be set before HELLO is sent: SHA-256 of the certificate that the answering side showed."""
        self.proved = False
        """The other side has."""
        self._tokens = tokens
        self._asking = asking
        self._nonce = secrets.token_bytes(NONCE_BYTES)
        self._ours = b""
        self._theirs = b""

    def greeting(self, hello: Hello) -> Hello:
        """With what the handshake needs in it."""
        role = str(self.role) if self.role is not None else ""
        return msgspec.structs.replace(hello, nonce=self._nonce, token=role)

    def sent(self, frame: bytes) -> None:
        self._ours = frame

    def received(self, hello: Hello, frame: bytes) -> None:
        """Raises AuthenticationError for a side without tokens, or for a role whose token is not known here."""
        self._theirs = frame
        if not hello.nonce:
            raise AuthenticationError("the other side has no tokens")
        if len(hello.nonce) != NONCE_BYTES:
            raise AuthenticationError(f"a nonce of {len(hello.nonce)} bytes")
        if self._asking:
            return
        role = next((each for each in self._tokens.roles if each == hello.token), None)
        if role is None:
            raise AuthenticationError("no token of that role is known here")
        self.role = role

    def proof(self) -> bytes:
        return self._proof(ours=True)

    def check(self, proof: bytes) -> None:
        """Raises AuthenticationError for the wrong one."""
        if not hmac.compare_digest(self._proof(ours=False), proof):
            raise AuthenticationError(f"wrong token of {self.role}")
        self.proved = True

    def _proof(self, *, ours: bool) -> bytes:
        if self.role is None or not self._ours or not self._theirs:
            raise LocalProtocolError("there is nothing to prove before both HELLOs")
        direction = "asker" if ours == self._asking else "answerer"
        hellos = (self._ours, self._theirs) if self._asking else (self._theirs, self._ours)
        return self._tokens.proof(self.role, direction, (*hellos, self.binding))
