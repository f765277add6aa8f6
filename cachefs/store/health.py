"""Whether a tier's disk can be trusted: what its errors and its probes say.

    healthy  --an error-->  limited       nothing new goes there, what is sealed is read on
    limited  --bad probes, or failed reads-->  down       its blocks count as lost, readers go elsewhere
    down     --a good probe-->  probing   as down
    probing  --a bad probe-->  down
    limited, probing  --good probes-->  healthy

A disk that fails again soon after it was healthy has to pass twice as many probes, and so on. A full disk is none of
this. Pure: the caller brings the time, and makes the probes.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from enum import StrEnum


class TierState(StrEnum):
    HEALTHY = "healthy"
    LIMITED = "limited"
    PROBING = "probing"
    DOWN = "down"


@dataclass(frozen=True)
class HealthConfig:
    probe_every_s: float = 5.0
    longest_pause_s: float = 60.0
    """Between probes of a tier that is down: the pause doubles up to here."""
    good_probes: int = 3
    """In a row, and it is healthy."""
    bad_probes: int = 3
    """In a row, and it is down."""
    failed_reads: int = 3
    """Within `reads_within_s`, and it is down; the second makes it limited. One bad sector costs one block only."""
    reads_within_s: float = 60.0
    relapse_within_s: float = 600.0
    most_good_probes: int = 24


class Health:
    """Of one tier. Times are seconds by one monotonic clock. Not thread-safe."""

    def __init__(self, config: HealthConfig | None = None) -> None:
        self._config = config or HealthConfig()
        self.state = TierState.HEALTHY
        self._needed = self._config.good_probes
        self._good = self._bad = 0
        self._pause_s = self._config.probe_every_s
        self._probe_at = 0.0
        self._healthy_since: float | None = None
        """None: since the start."""
        self._failed_reads: deque[float] = deque(maxlen=self._config.failed_reads)

    @property
    def takes_new(self) -> bool:
        """Whether blocks may be put there."""
        return self.state is TierState.HEALTHY

    @property
    def is_served(self) -> bool:
        """Whether its blocks count as being here."""
        return self.state in (TierState.HEALTHY, TierState.LIMITED)

    def write_failed(self, now: float) -> None:
        if self.state is TierState.HEALTHY:
            relapsed = self._healthy_since is not None and now - self._healthy_since < self._config.relapse_within_s
            self._needed = (
                min(2 * self._needed, self._config.most_good_probes) if relapsed else self._config.good_probes
            )
            self._enter(TierState.LIMITED, now)
        self._good = 0

    def read_failed(self, now: float) -> None:
        """A read of the medium, not a comparison of what was read."""
        alone = not self._failed_reads or now - self._failed_reads[-1] > self._config.reads_within_s
        self._failed_reads.append(now)
        if alone and self.state is TierState.HEALTHY:
            # One bad sector costs the block that has it.
            return
        self.write_failed(now)
        few = len(self._failed_reads) < self._config.failed_reads
        if self.is_served and not few and now - self._failed_reads[0] <= self._config.reads_within_s:
            self._enter(TierState.DOWN, now)

    def cannot_remove(self, now: float) -> None:
        """What is damaged there cannot be taken away from its readers, except all of the tier."""
        self._good = 0
        if self.is_served:
            self._enter(TierState.DOWN, now)

    def probe_due(self, now: float) -> bool:
        return self.state is not TierState.HEALTHY and now >= self._probe_at

    def probed(self, good: bool | None, now: float) -> None:
        """What a probe found that was due; None: nothing, as the disk is full, or it could not be tried."""
        if self.state is TierState.HEALTHY:
            return
        if good is None:
            self._probe_at = now + self._pause_s
            return
        if not good:
            self._good = 0
            self._bad += 1
            if self.state is TierState.DOWN:
                self._pause_s = min(2 * self._pause_s, self._config.longest_pause_s)
            elif self.state is TierState.PROBING or self._bad >= self._config.bad_probes:
                self._enter(TierState.DOWN, now)
            self._probe_at = now + self._pause_s
            return
        self._bad = 0
        self._good += 1
        if self._good >= self._needed:
            self._enter(TierState.HEALTHY, now)
            self._healthy_since = now
        elif self.state is TierState.DOWN:
            self._enter(TierState.PROBING, now)
            self._good = 1
        self._probe_at = now + self._pause_s

    def _enter(self, state: TierState, now: float) -> None:
        self.state = state
        self._pause_s = self._config.probe_every_s
        self._good = self._bad = 0
        self._probe_at = now + self._pause_s
        if state is TierState.HEALTHY:
            self._failed_reads.clear()
