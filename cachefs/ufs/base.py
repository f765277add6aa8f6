"""What an under-store is to the rest of cachefs."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from cachefs.model import ObjectInfo
from cachefs.ufs.files import Claim, Data, Keep

MAX_NAME_BYTES = 255
"""NAME_MAX of every Linux file system."""


class UnderStore(Protocol):
    """A tree of objects, read only. Paths are relative to its root, "/" between names, none at either end; "" = root.

    Everything may be cancelled at any time and leaves nothing behind. Errors are those of `cachefs.model`:
    NotFoundError; DeniedError; ThrottledError and UnavailableError, after retries within the store's deadline.
    """

    origin: str
    """Endpoint and canonical URL of the root, without credentials: the first part of every content key."""
    hidden_keys: int
    """Times a key was met that cannot be a file's name, and left out."""

    async def stat(self, path: str) -> ObjectInfo:
        """What is there now; a directory (a prefix with something below it) wins over an object of the same name."""

    def list_dir(self, path: str) -> AbstractAsyncContextManager[AsyncIterator[list[ObjectInfo]]]:
        """One level, in chunks of at most about 1000, in no promised order; the next chunk is fetched meanwhile.

        A name is given once as a directory, and may have been given before as an object that the directory shadows.
        """

    async def read_range(self, info: ObjectInfo, offset: int, length: int) -> Data:
        """Exactly `length` bytes, within the object, of exactly the version `info` describes.

        Raises ContentChangedError when the store has another version now, NotFoundError when it has none.
        """

    async def read_files(
        self, infos: Sequence[ObjectInfo], keep: Keep, at_once: int, claim: Claim
    ) -> list[Exception | None]:
        """Whole objects, at most `at_once` of them on their way: for small ones, of which the way of the bytes from
        thread to thread is most of the cost.

        Returns for each what kept it from being kept: an error as of `read_range`, or what `keep` raised. None: it is
        kept, or was not claimed. Cancelled, it returns when no `keep` runs any more.
        """


def is_file_name(name: str) -> bool:
    """Whether a component of a key can be a name in a directory."""
    return (
        name not in ("", ".", "..")
        and "/" not in name
        and "\0" not in name
        and len(name.encode(errors="surrogatepass")) <= MAX_NAME_BYTES
    )
