"""An accelerator that takes the time for a step that a real one needs, and does nothing else."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from bench.training.loader import Batch


@dataclass(frozen=True)
class Epoch:
    """What an accelerator made of an epoch. It either computes or stalls; there is nothing else."""

    ids: list[int]
    """Of all samples, in the order in which they came."""
    bytes_read: int
    steps: int
    compute_s: float
    stall_s: float

    @property
    def seconds(self) -> float:
        return self.compute_s + self.stall_s

    @property
    def utilisation(self) -> float:
        """As MLPerf Storage has it, the time that steps take over all time; but that leaves out the first step of each
        epoch, and here the wait for its batch counts.
        """
        return self.compute_s / self.seconds

    @property
    def samples_per_s(self) -> float:
        return len(self.ids) / self.seconds


class Accelerator:
    def __init__(
        self,
        samples_per_s: float,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.samples_per_s = samples_per_s
        self._clock = clock
        self._sleep = sleep

    def train(self, batches: Iterable[Batch]) -> Epoch:
        """One epoch. A step takes as long as its samples do, also a last one of less. All other time is a stall:
        waiting for a batch, and what this machine is late with.
        """
        ids: list[int] = []
        bytes_read = steps = 0
        began = end = self._clock()
        for batch in batches:
            ids += batch.ids
            bytes_read += batch.bytes_read
            steps += 1
            done = self._clock() + len(batch.ids) / self.samples_per_s
            while (left := done - self._clock()) > 0:
                self._sleep(left)
            end = self._clock()
        compute = len(ids) / self.samples_per_s
        return Epoch(ids, bytes_read, steps, compute, max(0.0, end - began - compute))
