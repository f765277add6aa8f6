"""What both drivers do about answers: errors become errno and are logged, short reads are found."""

from __future__ import annotations

import errno
import logging
import os

import trio

from cachefs.fuse.errno import EXPECTED, errno_of
from cachefs.fuse.protocol import Operations
from cachefs.fusewire import Opcode
from cachefs.model import CachefsError, LocalProtocolError, LogLimiter

logger = logging.getLogger(__name__)

REFUSED_OPEN_FLAGS = os.O_ACCMODE | os.O_TRUNC
"""Of open(2): what would write."""


class ErrorAnswers:
    """Errors end requests, never the session. What fails thousands of times a second is logged ten times."""

    def __init__(self) -> None:
        self._log = LogLimiter(logger)
        self._bugs_seen: set[tuple[int, type[BaseException]]] = set()

    def errno_for(self, opcode: int, error: Exception) -> int:
        """What the caller is told of an error, which is logged. Never raises."""
        code = errno_of(error)
        name = _name(opcode)
        if code is None:
            # One traceback for each kind of bug: an application may run into it thousands of times a second.
            kind = (opcode, type(error))
            trace = None if kind in self._bugs_seen else error
            self._log.log(logging.ERROR, ("bug", *kind), "bug request=%s error=%r", name, error, exc_info=trace)
            self._bugs_seen.add(kind)
            return errno.EIO
        if code not in EXPECTED:
            code_name = errno.errorcode.get(code, str(code))
            message = "request failed request=%s errno=%s error=%s"
            self._log.log(logging.WARNING, (name, code_name), message, name, code_name, error)
        return code

    def lost(self, opcode: int, error: OSError) -> None:
        """An answer could not be given."""
        self._log.log(logging.ERROR, "lost", "answer lost request=%s error=%s", _name(opcode), error)


def check_length(operations: Operations, node: int, offset: int, size: int, length: int) -> None:
    """A short answer ends the file for the reader, without any error, so it must really end there.

    That operations answer in full is their promise; this is the belt to those braces, where the size is known. Raises
    LocalProtocolError.
    """
    if length > size:
        raise LocalProtocolError(f"{length} bytes instead of the {size} asked for")
    try:
        size_bytes = operations.getattr_nowait(node).attr.size_bytes
    except (trio.WouldBlock, CachefsError, OSError):
        return
    expected = min(size, max(0, size_bytes - offset))
    if length != expected:
        raise LocalProtocolError(f"node {node} at {offset}: {length} bytes read instead of {expected}")


def _name(opcode: int) -> str:
    try:
        return Opcode(opcode).name
    except ValueError:
        return str(opcode)
