"""How fast something may go on."""

from __future__ import annotations

_BURST_S = 1.0


class Rate:
    """A token bucket of bytes. Pure; times are seconds of any clock that never goes back.

    What is larger than the bucket goes at once when nothing is owed, and is owed from then on: over time the rate holds
    whatever the sizes are.
    """

    def __init__(self, bytes_per_s: float, now_s: float) -> None:
        """0 bytes per second: no limit."""
        self._rate = bytes_per_s
        self._have = 0.0
        self._at_s = now_s

    def take(self, size_bytes: float, now_s: float) -> float:
        """Seconds to wait before that many bytes may go on their way."""
        if not self._rate:
            return 0.0
        self._have = min(self._rate * _BURST_S, self._have + (now_s - self._at_s) * self._rate)
        self._at_s = now_s
        wait_s = max(0.0, -self._have / self._rate)
        self._have -= size_bytes
        return wait_s

    def give_back(self, size_bytes: float) -> None:
        """They were taken, and did not go."""
        self._have += size_bytes
