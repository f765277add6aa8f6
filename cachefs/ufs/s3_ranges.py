"""Range reads of S3 by obstore: the same requests as those of `s3.py`, at a fifth of the processor's time.

obstore normalises paths and refuses control characters, so it cannot address every key: `can_read` says which; the
others are left to s3fs.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import obstore
from obstore.exceptions import BaseError, PermissionDeniedError, PreconditionError, UnauthenticatedError
from obstore.store import S3Store as ObjectStore

from cachefs.model import (
    CachefsError,
    ContentChangedError,
    DeniedError,
    NotFoundError,
    ObjectInfo,
    ThrottledError,
    UnavailableError,
    UnderStoreError,
)
from cachefs.ufs.bridge import Bridge
from cachefs.ufs.files import Claim, Keep

_ASK_AGAIN = timedelta(minutes=5)
"""Credentials of the session are asked for so often; the session itself knows when to refresh them."""
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_STATUS = re.compile(r"status code: (\d{3})")


class RangeReader:
    """Made by `open_ranges`. Its coroutines run on an asyncio loop."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    def can_read(self, key: str) -> bool:
        """Whether obstore addresses exactly this key."""
        return all(part not in ("", ".", "..") for part in key.split("/")) and _CONTROL.search(key) is None

    async def read(self, key: str, info: ObjectInfo, offset: int, length: int) -> memoryview:
        """Exactly those bytes of exactly that version; cancelling ends the request.

        Raises ContentChangedError, NotFoundError, UnderStoreError and its kinds.
        """
        options: dict[str, Any] = {"range": (offset, offset + length)}
        if info.tag:
            options["if_match"] = f'"{info.tag}"'
        try:
            result = await obstore.get_async(self._store, key, options=options)  # type: ignore[arg-type]
            try:
                _check(result, info, offset, length)
                data = memoryview(await result.bytes_async())
            finally:
                # An answer that is not read to its end keeps its connection, and an error keeps this frame.
                del result
        except CachefsError:
            raise
        except (BaseError, OSError, ValueError) as error:
            raise _translate(info.path, error) from error
        if len(data) != length:
            raise UnavailableError(f"{info.path}: the answer broke off after {len(data)} of {length} bytes")
        return data

    async def read_files(
        self, wanted: Sequence[tuple[str, ObjectInfo]], keep: Keep, at_once: int, claim: Claim, bridge: Bridge
    ) -> list[Exception | None]:
        """As `UnderStore.read_files` of (key, object): each is asked for once, and no more when one is throttled.

        UnavailableError is also the outcome of what this reader cannot address.
        """
        outcomes: list[Exception | None] = [None] * len(wanted)
        numbers = iter(range(len(wanted)))
        throttled: ThrottledError | None = None

        async def work() -> None:
            nonlocal throttled
            for number in numbers:
                if throttled is not None:
                    outcomes[number] = throttled
                    continue
                if not claim(number):
                    continue
                key, info = wanted[number]
                if not info.size_bytes or not self.can_read(key):
                    outcomes[number] = UnavailableError(f"{info.path}: only other readers address it")
                    continue
                try:
                    data = await self.read(key, info, 0, info.size_bytes)
                    await bridge.in_thread(partial(keep, number, data))
                except Exception as error:
                    outcomes[number] = error
                    if isinstance(error, ThrottledError):
                        throttled = error

        async with asyncio.TaskGroup() as tasks:
            for _ in range(min(at_once, len(wanted))):
                tasks.create_task(work())
        return outcomes


def _check(result: Any, info: ObjectInfo, offset: int, length: int) -> None:
    """Some servers ignore If-Match: what came is believed, not what was asked for. Raises ContentChangedError."""
    etag = (result.meta["e_tag"] or "").strip('"')
    came, size = tuple(result.range), result.meta["size"]
    del result
    if info.tag and etag != info.tag:
        raise ContentChangedError(f"{info.path}: etag is {etag} now, it was {info.tag}")
    if came != (offset, offset + length) or size != info.size_bytes:
        raise ContentChangedError(
            f"{info.path}: got {came} of {size} for {offset}-{offset + length} of {info.size_bytes}"
        )


def _translate(path: str, error: Exception) -> CachefsError:
    text = str(error).partition("\n")[0]
    if isinstance(error, PreconditionError):
        return ContentChangedError(f"{path}: the object changed")
    if isinstance(error, FileNotFoundError):
        return NotFoundError(f"{path}: no such object")
    if isinstance(error, (PermissionDeniedError, UnauthenticatedError)):
        return DeniedError(f"{path}: access denied")
    if text.endswith("Received non-partial response when range requested"):
        return UnderStoreError(f"{path}: the server sends no ranges")
    # Only the message has the status; it has times and addresses too, so that nothing else in it may be looked for.
    match = _STATUS.search(text)
    status = int(match[1]) if match else 0
    if status == 416:
        return ContentChangedError(f"{path}: the object is shorter than it was")
    if status in (429, 503):
        return ThrottledError(f"{path}: the store asks for fewer requests")
    return UnavailableError(f"{path}: {text}")


async def open_ranges(
    bucket: str, session: Mapping[str, Any], client: Any, botocore_session: Any
) -> RangeReader | None:
    """A reader with the endpoint, region and credentials that `client` was set up with; None if there are none.

    `session` are the arguments of s3fs. Runs in asyncio.
    """
    config = session["config_kwargs"]
    arguments: dict[str, Any] = {
        "region": client.meta.region_name or "us-east-1",
        # The only retries are ours, so that one deadline bounds them all.
        "retry_config": {"max_retries": 0, "retry_timeout": timedelta(seconds=1)},
        "client_options": {
            "allow_http": True,
            "connect_timeout": timedelta(seconds=config["connect_timeout"]),
            "read_timeout": timedelta(seconds=config["read_timeout"]),
            "timeout": timedelta(hours=1),
        },
    }
    endpoint = str(client.meta.endpoint_url)
    if not endpoint.endswith(".amazonaws.com"):
        arguments["endpoint"] = endpoint
    if session["anon"]:
        arguments["skip_signature"] = True
    elif await botocore_session.get_credentials() is None and "key" not in session:
        return None
    elif "key" in session:
        arguments |= {"access_key_id": session["key"], "secret_access_key": session["secret"]}
        if "token" in session:
            arguments["token"] = session["token"]
    else:

        async def credentials() -> Any:
            found = await botocore_session.get_credentials()
            frozen = await found.get_frozen_credentials()
            return {
                "access_key_id": frozen.access_key,
                "secret_access_key": frozen.secret_key,
                "token": frozen.token,
                "expires_at": datetime.now(UTC) + _ASK_AGAIN,
            }

        arguments["credential_provider"] = credentials
    return RangeReader(ObjectStore(bucket, **arguments))
