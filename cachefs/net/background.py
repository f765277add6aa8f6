"""A nursery for what a resource does in the background."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import trio


@asynccontextmanager
async def open_background() -> AsyncGenerator[trio.Nursery, None]:
    """A nursery whose tasks are cancelled at the end of the block.

    Unlike a plain nursery, an error of the block leaves it as it is, not inside a group: the block is the caller's
    code, and knows nothing of our tasks.
    """
    error: Exception | None = None
    async with trio.open_nursery() as nursery:
        try:
            yield nursery
        except Exception as raised:
            error = raised
        nursery.cancel_scope.cancel()
    if error is not None:
        raise error
