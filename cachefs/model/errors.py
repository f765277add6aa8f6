"""The one tree of errors. `wire` has the table to wire codes, `fuse` the table to errno; tests keep both complete."""

from __future__ import annotations


class CachefsError(Exception):
    """Everything cachefs raises on purpose. The message is for a person."""


class ConfigError(CachefsError):
    """A setting is wrong: names the key, the value and what is accepted."""

    def __init__(self, key: str, value: object, accepted: str) -> None:
        super().__init__(f"{key}: {value!r} is not accepted; expected {accepted}")
        self.key = key
        self.value = value
        self.accepted = accepted


class ProtocolError(CachefsError):
    """A rule of the wire was broken."""


class LocalProtocolError(ProtocolError):
    """We were about to break a rule: a bug on this side."""


class RemoteProtocolError(ProtocolError):
    """The other side broke a rule; its connection is closed."""


class AuthenticationError(CachefsError):
    """The other side is not who it must be, or we are not to it."""


class TransportError(CachefsError):
    """No connection, or it was lost before the answer: the request may or may not have been carried out."""


class HandshakeError(AuthenticationError, TransportError):
    """There is no connection, because one side does not accept what the other one proves, or does not prove."""


class DeadlineError(CachefsError):
    """The answer did not come within the time allowed."""


class NamespaceError(CachefsError):
    """The name or node does not allow what was asked."""


class NotFoundError(NamespaceError):
    """No such name, inode or object."""


class ExistsError(NamespaceError):
    """There is another one of that name already. What differs is named, never what is secret of it."""


class NotADirectory(NamespaceError):
    pass


class IsADirectory(NamespaceError):
    pass


class ReadOnlyError(NamespaceError):
    """The mount does not write."""


class StaleError(CachefsError):
    """The inode is superseded, or belongs to another namespace: look the name up again."""


class ContentChangedError(StaleError):
    """The object in the under-store is no longer the version that was asked for."""


class NamespaceChangedError(StaleError):
    """The master has another namespace than the asker knows: its inode numbers mean nothing there."""


class BlockError(CachefsError):
    """A cached block cannot be used; readers treat it as a miss."""


class BlockMissingError(BlockError):
    """Not (or no longer) cached here."""


class BlockCorruptError(BlockError):
    """Bytes do not match their checksums, or a file is damaged."""


class CapacityError(CachefsError):
    """No room, and nothing may be evicted."""


class TierError(CachefsError):
    """A tier's directory cannot be used: missing, foreign, read-only, or owned by another worker."""


class UnderStoreError(CachefsError):
    """The under-store did not do what was asked."""


class DeniedError(UnderStoreError):
    """Credentials are missing, wrong or not sufficient."""


class ThrottledError(UnderStoreError):
    """The under-store asks for fewer requests (SlowDown, 429)."""

    retry_after_s = 0.0
    """For how long it asked to be left alone; 0 if it did not say."""


class UnavailableError(UnderStoreError):
    """The under-store cannot be reached, or failed to answer properly within the deadline."""
