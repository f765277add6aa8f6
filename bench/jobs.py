"""What is told to another process, as JSON; paths included."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, TypeVar

import msgspec

T = TypeVar("T")


def encode(job: msgspec.Struct) -> bytes:
    return msgspec.json.encode(job, enc_hook=_text_of)


def decode(content: bytes, kind: type[T]) -> T:
    """Raises msgspec.ValidationError."""
    return msgspec.json.decode(content, type=kind, dec_hook=_made_of)


def _text_of(value: Any) -> str:
    if isinstance(value, Path):
        return os.fspath(value)
    raise NotImplementedError(f"{value!r} cannot be told as JSON")


def _made_of(kind: type, value: Any) -> Any:
    if kind is Path:
        return Path(value)
    raise NotImplementedError(f"{value!r} is no {kind}")
