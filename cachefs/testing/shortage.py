"""A process that has almost no descriptors left."""

from __future__ import annotations

import gc
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def few_descriptors(count: int = 0) -> Iterator[None]:
    """So many files can be opened in this process, and then EMFILE is what comes.

    No garbage is collected meanwhile: what was left to that of files would make room.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    gc.disable()
    try:
        spare = [os.open(os.devnull, os.O_RDONLY) for _ in range(count + 1)]
        limit = spare[-1]
        for fd in spare:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        gc.enable()
