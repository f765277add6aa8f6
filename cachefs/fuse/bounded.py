"""Questions to file systems that may hang: each in a thread, and the same one in one thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import TypeVar

T = TypeVar("T")

_lock = threading.Lock()
_waiting: dict[Hashable, tuple[threading.Thread, list[object]]] = {}


def within(limit_s: float, key: Hashable, ask: Callable[[], T], none: T) -> T:
    """What `ask` returns; `none` when that takes longer, and then it goes on. As long as it does, whoever asks with the
    same key waits for that answer: a mount that hangs and is looked at all the time costs one thread. `ask` must not
    raise.
    """
    with _lock:
        thread, answers = _waiting.get(key, (None, []))
        if thread is None:

            def run() -> None:
                try:
                    answers.append(ask())
                finally:
                    with _lock:
                        del _waiting[key]

            # A daemon: what waits for a server that hangs must not keep this process from ending.
            thread = threading.Thread(target=run, name="does the mount answer", daemon=True)
            _waiting[key] = thread, answers
            thread.start()
    thread.join(limit_s)
    return answers[0] if answers else none  # type: ignore[return-value]
