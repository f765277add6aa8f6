"""From a URL to its under-store."""

from __future__ import annotations

import importlib
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from cachefs.model import ConfigError, without_credentials
from cachefs.ufs.base import UnderStore

_OWN = {
    "s3": ("cachefs.ufs.s3", "open_s3"),
    "s3a": ("cachefs.ufs.s3", "open_s3"),
    "file": ("cachefs.ufs.local", "open_local"),
}
_OTHER = ("cachefs.ufs.fsspec_store", "open_fsspec")
"""Modules are imported when they are used: the client libraries of S3 alone take half a second."""


@asynccontextmanager
async def open_under_store(url: str, options: Mapping[str, str]) -> AsyncGenerator[UnderStore, None]:
    """The store at a URL, for as long as the block lasts.

    Raises ConfigError for an unknown scheme, a wrong URL, or options the store does not accept. No request is made.
    """
    scheme, separator, _ = url.partition("://")
    module, name = _OWN.get(scheme, _OTHER)
    if scheme not in _OWN:
        known: list[str] = importlib.import_module(module).schemes()
        if not separator or scheme not in known:
            raise ConfigError(
                "URL", without_credentials(url), f"SCHEME://…, with a scheme of {', '.join(sorted([*_OWN, *known]))}"
            )
    opener: Callable[[str, Mapping[str, str]], AbstractAsyncContextManager[UnderStore]]
    opener = getattr(importlib.import_module(module), name)
    async with opener(url, options) as store:
        yield store
