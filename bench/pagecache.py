"""What the kernel remembers of files, taken away so that reading shows what is below."""

from __future__ import annotations

import os
from pathlib import Path

_DROP = Path("/proc/sys/vm/drop_caches")


class CannotDrop(Exception):
    """The page cache cannot be dropped here; the message says why."""


def drop_page_cache() -> None:
    """Of all files of the machine, once what is to be written is. Names and attributes stay. Raises CannotDrop."""
    os.sync()
    try:
        _DROP.write_text("1")
    except OSError as error:
        raise CannotDrop(f"the page cache can be dropped by root alone ({_DROP}: {error.strerror})") from None
