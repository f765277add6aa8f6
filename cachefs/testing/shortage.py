"""A process that has almost no descriptors left."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def few_descriptors(count: int = 0) -> Iterator[None]:
    """So many files can be opened in this process, and then EMFILE is what comes."""
    spare = [os.open(os.devnull, os.O_RDONLY) for _ in range(count + 1)]
    limit = spare[-1]
    for fd in spare:
        os.close(fd)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
