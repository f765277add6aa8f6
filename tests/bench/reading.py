"""A workload for the tests of the runner: reads everything once, and does what its option says meanwhile."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping

from bench.results import Figure, Gap
from bench.systems.base import Mounted
from bench.workloads.base import Data, Workload


class Reading(Workload):
    name = "reading"
    what = "every file once"
    options: Mapping[str, str] = {"do": "what happens on a system: SYSTEM:stop, :kill, :raise, :gap; none by default"}

    def data(self) -> Data:
        return Data(name="reading_data", files={"a/1": 100_000, "a/2": 3, "b/empty": 0, "large": 3_000_000})

    def content(self, path: str, size: int) -> bytes | None:
        return b"own" if path == "a/2" else None

    def limit_s(self) -> float:
        return float(self.chosen.get("limit_s", "60"))

    def measure(self, mounted: Mounted, round_: int) -> Iterator[Figure | Gap]:
        total = 0
        begin = time.perf_counter()
        for path, size in self.data().files.items():
            content = (mounted.path / path).read_bytes()
            assert content == (mounted.source.native / path).read_bytes()
            assert len(content) == size
            total += size
        spent = time.perf_counter() - begin
        yield Figure(case="all", metric="bytes_per_s", value=total / spent, unit="B/s", better="more")
        system, _, what = self.chosen.get("do", "").partition(":")
        if system != mounted.system:
            return
        if what == "gap":
            yield Gap(workload=self.name, system="", kind="skipped", why="asked for", case="other")
        elif what == "raise":
            raise ValueError("asked to fail")
        else:
            os.kill(mounted.pids[0], {"stop": 19, "kill": 9}[what])
            if what == "kill":
                while os.path.exists(f"/proc/{mounted.pids[0]}/exe"):
                    time.sleep(0.01)
            os.stat(mounted.path / "was never there")
