"""Many samples of some megabytes and very short steps: CosmoFlow, with the figures of MLPerf Storage v1.0."""

from __future__ import annotations

import random
from collections.abc import Mapping

from bench.training.accelerators import COSMOFLOW
from bench.workloads.base import Scale
from bench.workloads.training import Amounts, Training


class Cosmoflow(Training):
    name = "cosmoflow"
    what = "CosmoFlow as in MLPerf Storage: samples of 2.83 MB, a file each, batches of one; a simulated accelerator"
    unit = "samples"
    mean_bytes = 2_828_486
    delivered_bytes = 2_828_486
    usual_batch = 1
    accelerator = "A100"
    accepted_formats = ("files",)
    options: Mapping[str, str] = Training.common_options(COSMOFLOW, accelerator, accepted_formats, "files")
    amounts: Mapping[Scale, Amounts] = {
        Scale.SMOKE: Amounts(samples=12, batch=1, cut=16, workers=2, epochs=2),
        Scale.STANDARD: Amounts(samples=60, batch=1),
        Scale.FULL: Amounts(samples=1000, batch=1),
    }

    def draw_size(self, random_: random.Random) -> float:
        return random_.normalvariate(self.mean_bytes, 71_311)
