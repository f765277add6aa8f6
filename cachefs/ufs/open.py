"""From a URL to its under-store."""

from __future__ import annotations

import importlib
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from cachefs.model import ConfigError
from cachefs.ufs.base import UnderStore

_SCHEMES = {"s3": ("cachefs.ufs.s3", "open_s3"), "file": ("cachefs.ufs.local", "open_local")}
"""Modules are imported when they are used: the client libraries of S3 alone take half a second."""


@asynccontextmanager
async def open_under_store(url: str, options: Mapping[str, str]) -> AsyncGenerator[UnderStore, None]:
    """The store at a URL, for as long as the block lasts.

    Raises ConfigError for an unknown scheme, a wrong URL, or options the store does not accept. No request is made.
    """
    scheme, separator, _ = url.partition("://")
    if not separator or scheme not in _SCHEMES:
        accepted = " or ".join(f"{each}://…" for each in sorted(_SCHEMES))
        raise ConfigError("URL", url, accepted)
    module, name = _SCHEMES[scheme]
    opener: Callable[[str, Mapping[str, str]], AbstractAsyncContextManager[UnderStore]]
    opener = getattr(importlib.import_module(module), name)
    async with opener(url, options) as store:
        yield store
