"""From a URL to its under-store."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from cachefs.model import ConfigError
from cachefs.ufs.base import UnderStore
from cachefs.ufs.local import open_local
from cachefs.ufs.s3 import open_s3

_SCHEMES: dict[str, Callable[[str, Mapping[str, str]], AbstractAsyncContextManager[UnderStore]]] = {
    "s3": open_s3,
    "file": open_local,
}


@asynccontextmanager
async def open_under_store(url: str, options: Mapping[str, str]) -> AsyncGenerator[UnderStore, None]:
    """The store at a URL, for as long as the block lasts.

    Raises ConfigError for an unknown scheme, a wrong URL, or options the store does not accept. No request is made.
    """
    scheme, separator, _ = url.partition("://")
    opener = _SCHEMES.get(scheme) if separator else None
    if opener is None:
        accepted = " or ".join(f"{each}://…" for each in sorted(_SCHEMES))
        raise ConfigError("URL", url, accepted)
    async with opener(url, options) as store:
        yield store
