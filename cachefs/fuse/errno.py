"""The one table from our errors to what a system call reports."""

from __future__ import annotations

import errno

from cachefs import model

ERRNO: dict[type[model.CachefsError], int] = {
    model.CachefsError: errno.EIO,
    model.ConfigError: errno.EINVAL,
    model.ProtocolError: errno.EIO,
    model.LocalProtocolError: errno.EIO,
    model.RemoteProtocolError: errno.EIO,
    model.AuthenticationError: errno.EACCES,
    # Only after whoever asked has waited for as long as it was told to.
    model.TransportError: errno.ETIMEDOUT,
    model.HandshakeError: errno.EIO,
    model.DeadlineError: errno.ETIMEDOUT,
    model.NamespaceError: errno.EINVAL,
    model.NotFoundError: errno.ENOENT,
    model.ExistsError: errno.EEXIST,
    model.NotADirectory: errno.ENOTDIR,
    model.IsADirectory: errno.EISDIR,
    model.ReadOnlyError: errno.EROFS,
    # From OPEN, ESTALE makes the kernel look the name up again and open what it finds.
    model.StaleError: errno.ESTALE,
    model.ContentChangedError: errno.ESTALE,
    model.NamespaceChangedError: errno.ESTALE,
    model.BlockError: errno.EIO,
    model.BlockMissingError: errno.EIO,
    model.BlockCorruptError: errno.EIO,
    model.CapacityError: errno.ENOSPC,
    model.TierError: errno.EIO,
    model.UnderStoreError: errno.EIO,
    model.DeniedError: errno.EACCES,
    # Not EAGAIN: programs that read files do not retry, and some loop without waiting.
    model.ThrottledError: errno.EIO,
    model.UnavailableError: errno.EIO,
}

EXPECTED = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EROFS, errno.ESTALE, errno.EINTR})
"""Answers of a healthy file system, not worth a warning."""


def errno_of(error: BaseException) -> int | None:
    """The errno that tells a caller of this error; None if the error is not meant for callers (a bug).

    A class that is not in the table has its nearest ancestor's. An OSError passes its own errno through. An exception
    group around one single error (a nursery's) counts as that error.
    """
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    if isinstance(error, model.CachefsError):
        return next(ERRNO[cls] for cls in type(error).__mro__ if cls in ERRNO)
    if isinstance(error, OSError) and error.errno:
        return error.errno
    return None
