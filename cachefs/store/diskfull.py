"""A full disk is a matter of capacity, not a fault."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from cachefs.model import CapacityError

_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def capacity_errors() -> Iterator[None]:
    """Turns ENOSPC and EDQUOT into CapacityError; other errors pass."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise CapacityError(f"the cache's file system is full: {error.strerror}") from error
        raise
