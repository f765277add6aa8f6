"""What a process of the benchmark owes to the machine and to its parent."""

from __future__ import annotations

import ctypes
import os
import signal

PR_SET_PDEATHSIG = 1
PR_SET_TIMERSLACK = 29


def die_with_parent(parent: int) -> None:
    """Be killed when `parent`, who started this process, has ended; also while it waits for a mount that hangs."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def sleep_exactly() -> None:
    """Let sleeps of this thread end when they should; by default Linux lets them take 50 microseconds more."""
    _prctl(PR_SET_TIMERSLACK, 1)


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl {option}")
