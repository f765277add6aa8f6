"""A bound on what the contents below a path take in all caches: how it is shared among workers, and what fits in it.

Each worker is granted bytes and takes no more than those. What is granted to all together is never more than the quota,
so no two of them can go over it at once, and nobody has to ask for each block. What a worker was granted and does not
use it gives back with its next report.
"""

from __future__ import annotations

from collections.abc import Callable

from cachefs.policy.admission import Promote

_PARTS = 2
"""A worker is granted this part of its even share of what is left, or more if it needs more now."""
_MOVED = 100
"""At least this part of a quota is taken at a time from a worker that has it idle, for those that need it."""


class Shares:
    """Of one quota: what each worker takes of it, and what it was granted. Not thread-safe."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._held: dict[str, tuple[int, int]] = {}
        """Worker -> (used, promised): what it takes, and the most that it may take before it reports again."""
        self._used = 0
        self._promised = 0
        self._short: dict[str, int] = {}
        """Worker -> what it wanted last and did not get."""

    @property
    def used_bytes(self) -> int:
        """By all that were told of."""
        return self._used

    @property
    def promised_bytes(self) -> int:
        return self._promised

    def unused_by_others(self, worker: str) -> int:
        """What others were granted and have not taken yet, and may give back."""
        used, promised = self._held.get(worker, (0, 0))
        return self._promised - promised - (self._used - used)

    def told(self, worker: str, used_bytes: int, granted_bytes: int) -> None:
        """A worker says what it takes, and what of its grant it keeps."""
        self._forget(worker)
        promised = max(used_bytes, granted_bytes)
        if promised:
            self._held[worker] = used_bytes, promised
            self._used += used_bytes
            self._promised += promised

    def gone(self, worker: str) -> None:
        """It is dead: what it holds helps nobody, and takes nobody's room."""
        self._forget(worker)
        self._short.pop(worker, None)

    def _forget(self, worker: str) -> None:
        used, promised = self._held.pop(worker, (0, 0))
        self._used -= used
        self._promised -= promised

    def grant(self, worker: str, wanted_bytes: int, workers: int, idle_bytes: int = 0) -> int:
        """What that worker may take from now on, having asked for so much more; `workers` is how many there are.

        Less than it has where all together are over the quota: each is to get below by the part that it has of it; and
        where others did not get what they wanted, and `idle_bytes` of what it has are idle.
        """
        used, promised = self._held.get(worker, (0, 0))
        left = self.limit_bytes - self._promised
        granted = promised
        if left < 0:
            # The limit was lowered, or a worker is back that was taken for dead: what is promised and not used is not.
            granted = used
        elif wanted_bytes:
            even = left if workers <= 1 else left // (_PARTS * workers)
            granted += min(left, max(wanted_bytes, even))
        self.told(worker, used, granted)
        over = self._used - self.limit_bytes
        if over > 0:
            return used - -(-over * used // self._used)
        if wanted_bytes:
            self._short.pop(worker, None)
        if wanted_bytes > left:
            self._short[worker] = wanted_bytes - max(0, left)
        elif idle_bytes and self._short and not wanted_bytes:
            moved = min(used, idle_bytes, max(sum(self._short.values()), self.limit_bytes // _MOVED))
            self._short.clear()
            return used - moved
        return granted


def fits_quota(
    mode: Promote,
    *,
    lacking_bytes: int,
    used_bytes: int,
    free_bytes: Callable[[], tuple[int, int]],
    first_copy: bool = True,
) -> bool:
    """Whether a block may be kept as far as one quota goes: what `policy.admits` is for a tier.

    `lacking_bytes`: what the block takes more than this node was granted; `used_bytes`: what this node has of that
    quota's contents, and could evict; `free_bytes()`: (what of that is idle or superseded, what of that other nodes
    hold as well, for a first copy to displace).
    """
    if lacking_bytes <= 0:
        return mode is not Promote.NEVER
    if mode is Promote.NEVER or lacking_bytes > used_bytes:
        return False
    if mode is Promote.ALWAYS:
        return True
    idle_bytes, shared_bytes = free_bytes()
    return lacking_bytes <= idle_bytes + (shared_bytes if first_copy else 0)
