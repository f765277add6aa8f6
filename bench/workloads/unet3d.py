"""Few large samples, one file each: 3D U-Net on medical images, with the figures of MLPerf Storage v1.0."""

from __future__ import annotations

import random
from collections.abc import Mapping

from bench.training.accelerators import UNET3D
from bench.workloads.base import Scale
from bench.workloads.training import Amounts, Training


class Unet3d(Training):
    name = "unet3d"
    what = "3D U-Net as in MLPerf Storage: large samples (146.6 MB), a file each, shuffled; a simulated accelerator"
    unit = "samples"
    mean_bytes = 146_600_628
    delivered_bytes = 2_097_152
    usual_batch = 7
    accelerator = "V100"
    accepted_formats = ("files",)
    options: Mapping[str, str] = Training.common_options(UNET3D, accelerator, accepted_formats, "files")
    amounts: Mapping[Scale, Amounts] = {
        Scale.SMOKE: Amounts(samples=6, batch=2, cut=256, workers=2, epochs=2),
        Scale.STANDARD: Amounts(samples=16, batch=1, cut=16),
        Scale.FULL: Amounts(samples=28, batch=4),
    }

    def draw_size(self, random_: random.Random) -> float:
        return random_.normalvariate(self.mean_bytes, 68_341_808)
