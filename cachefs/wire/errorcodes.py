"""Errors on the wire: one table, error class <-> code. The message travels as text."""

from __future__ import annotations

import msgspec

from cachefs.model import errors

CODES: dict[str, type[errors.CachefsError]] = {
    "error": errors.CachefsError,
    "config": errors.ConfigError,
    "protocol": errors.ProtocolError,
    "protocol-local": errors.LocalProtocolError,
    "protocol-remote": errors.RemoteProtocolError,
    "authentication": errors.AuthenticationError,
    "transport": errors.TransportError,
    "handshake": errors.HandshakeError,
    "deadline": errors.DeadlineError,
    "namespace": errors.NamespaceError,
    "not-found": errors.NotFoundError,
    "exists": errors.ExistsError,
    "not-a-directory": errors.NotADirectory,
    "is-a-directory": errors.IsADirectory,
    "read-only": errors.ReadOnlyError,
    "stale": errors.StaleError,
    "content-changed": errors.ContentChangedError,
    "namespace-changed": errors.NamespaceChangedError,
    "block": errors.BlockError,
    "block-missing": errors.BlockMissingError,
    "block-corrupt": errors.BlockCorruptError,
    "capacity": errors.CapacityError,
    "tier": errors.TierError,
    "under-store": errors.UnderStoreError,
    "denied": errors.DeniedError,
    "throttled": errors.ThrottledError,
    "unavailable": errors.UnavailableError,
}
_NAMES = {error_class: code for code, error_class in CODES.items()}
# What the other side calls "transport" or "local" is an answer here: the connection is fine, nobody should reconnect
# or blame this side for it.
_AS_RECEIVED: dict[str, type[errors.CachefsError]] = {
    "transport": errors.UnavailableError,
    "handshake": errors.UnavailableError,
    "protocol-local": errors.RemoteProtocolError,
    "protocol-remote": errors.LocalProtocolError,
}
_MAX_TEXT = 4000
"""Characters of one text of an error."""


class ErrorMeta(msgspec.Struct, frozen=True, array_like=True):
    """Meta of an ERROR frame."""

    code: str
    message: str
    detail: list[str] = []
    """For "config": key, value, what is accepted."""


def to_wire(error: BaseException) -> ErrorMeta:
    """Anything that is not a CachefsError becomes "internal error": its text is for our log, not for the network."""
    if isinstance(error, errors.ConfigError):
        return ErrorMeta("config", _text(error), [_text(error.key), _text(error.value), _text(error.accepted)])
    for error_class in type(error).__mro__:
        code = _NAMES.get(error_class)
        if code is not None:
            return ErrorMeta(code, _text(error))
    return ErrorMeta("error", "internal error; the log of the answering process has the details")


def _text(value: object) -> str:
    """What can always be sent: names of files may be too long, and not text (surrogates)."""
    return str(value)[:_MAX_TEXT].encode(errors="replace").decode()


def from_wire(meta: ErrorMeta) -> errors.CachefsError:
    """An error of the class that was raised over there; of the root class for a code we do not know."""
    if meta.code == "config" and len(meta.detail) == 3:
        key, value, accepted = meta.detail
        return errors.ConfigError(key, value, accepted)
    error_class = _AS_RECEIVED.get(meta.code) or CODES.get(meta.code, errors.CachefsError)
    if error_class is errors.ConfigError:
        error_class = errors.CachefsError
    return error_class(meta.message)
