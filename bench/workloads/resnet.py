"""ImageNet-like training: images as single files and packed into shards, with the figures of MLPerf Storage v1.0."""

from __future__ import annotations

import importlib.util
import math
import os
import random
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import msgspec

from bench.results import Better, Figure, Gap
from bench.systems.base import Mounted
from bench.systems.native import forget_pages
from bench.training.accelerators import RESNET50
from bench.training.loader import REPOSITORY
from bench.training.plan import Job, Kind
from bench.training.real import Input, RealJob, Trained
from bench.training.samples import SIDE
from bench.workloads.base import Scale
from bench.workloads.training import Amounts, Training

NO_TORCH = "training for real needs torch: pip install torch"
REAL_LIMIT_S = 600.0


class Real(NamedTuple):
    """What a scale makes of real training."""

    batch: int
    steps: int
    side: int


REAL = {
    Scale.SMOKE: Real(batch=4, steps=2, side=64),
    Scale.STANDARD: Real(batch=8, steps=5, side=SIDE),
    Scale.FULL: Real(batch=32, steps=20, side=SIDE),
}
NO_PILLOW = "decoding JPEGs needs Pillow: pip install pillow"


class Resnet(Training):
    name = "resnet"
    what = "ResNet-50 as in MLPerf Storage: images of 115 KB, shuffled, as files and in shards; a simulated accelerator"
    unit = "images"
    mean_bytes = 114_660
    delivered_bytes = SIDE * SIDE * 3
    usual_batch = 400
    accelerator = "H100"
    default_formats = ("files", "tar")
    options: Mapping[str, str] = {
        **Training.common_options(RESNET50, accelerator, Training.accepted_formats, "files+tar"),
        "decode": "no; yes: the loader decodes each image, which then is a real JPEG. Needs Pillow",
        "real": "no; yes: a real ResNet-50 is trained instead, for some steps, fed from the mount, from local files "
        "and with synthetic images in turn. Needs torch",
        "steps": "with real=yes, on each input; a number",
    }
    amounts: Mapping[Scale, Amounts] = {
        Scale.SMOKE: Amounts(samples=60, batch=8, shard=10, workers=2, epochs=2),
        Scale.STANDARD: Amounts(samples=800, batch=40, shard=100),
        Scale.FULL: Amounts(samples=12_510, batch=400, shard=1251),
    }

    def __init__(self, scale: Scale, options: Mapping[str, str] | None = None) -> None:
        super().__init__(scale, options)
        self.decode = self._one_of("decode", "no", ("no", "yes")) == "yes"
        self.real = self._one_of("real", "no", ("no", "yes")) == "yes"
        self.real_amounts = REAL[scale]
        self.steps = self._count("steps", self.real_amounts.steps)
        if self.real:
            self.batch = self._count("batch", self.real_amounts.batch)
            self.kinds = ["files"]
        if self.decode:
            self.suffix, self.remarked = ".jpg", ("JPEGs are decoded",)

    def _data_name(self) -> str:
        return super()._data_name() + ("-jpeg" if self.decode else "")

    def draw_size(self, random_: random.Random) -> float:
        """Log-normal, with the deviation that ImageNet has: 136 KB."""
        variance = math.log(1 + (136_075.82 / self.mean_bytes) ** 2)
        return random_.lognormvariate(math.log(self.mean_bytes) - variance / 2, math.sqrt(variance))

    def sample(self, name: str, size: int) -> bytes | None:
        if not self.decode or importlib.util.find_spec("PIL") is None:
            return None
        from bench.training.jpeg import jpeg

        return jpeg(f"{self.name}/{name}", size)

    def job(self, kind: Kind, root: str, round_: int) -> Job:
        return msgspec.structs.replace(super().job(kind, root, round_), decode=self.decode and kind != "synthetic")

    def measure(self, mounted: Mounted, round_: int) -> Iterator[Figure | Gap]:
        if self.decode and importlib.util.find_spec("PIL") is None:
            yield self._gap(mounted, "missing", NO_PILLOW)
            return
        yield from self._train(mounted, round_) if self.real else super().measure(mounted, round_)

    def limit_s(self) -> float:
        return super().limit_s() + (REAL_LIMIT_S if self.real else 0)

    def _train(self, mounted: Mounted, round_: int) -> Iterator[Figure | Gap]:
        """Of a process of its own, since torch starts threads, and takes memory."""
        if importlib.util.find_spec("torch") is None:
            yield self._gap(mounted, "missing", NO_TORCH)
            return
        roots: dict[str, tuple[Kind, str]] = {
            "mount": ("files", os.fspath(mounted.path)),
            "local files": ("files", os.fspath(mounted.source.native)),
            "synthetic": ("synthetic", ""),
        }
        # As cold as what the mount reads.
        forget_pages(mounted.source.native)
        jobs = {name: self.job(kind, root, round_) for name, (kind, root) in roots.items()}
        inputs = [Input(name=name, job=msgspec.structs.replace(job, workers=2)) for name, job in jobs.items()]
        given = RealJob(inputs=inputs, steps=self.steps, side=self.real_amounts.side, parent=os.getpid())
        process = subprocess.Popen(
            [sys.executable, "-m", "bench.training.real"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=REPOSITORY,
        )
        try:
            told, log = process.communicate(msgspec.json.encode(given), timeout=REAL_LIMIT_S)
        except subprocess.TimeoutExpired:
            yield self._gap(mounted, "hung", f"training did not end within {REAL_LIMIT_S:g} s")
            return
        finally:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout, process.stderr):
                if pipe is not None:
                    pipe.close()
        for each in msgspec.json.Decoder(Trained).decode_lines(told):
            yield from self._trained(each)
        if process.returncode:
            yield self._gap(
                mounted, "failed", f"training ended with {process.returncode}: {log.decode()[-500:].strip()}"
            )

    def _trained(self, trained: Trained) -> Iterator[Figure]:
        seconds = trained.compute_s + trained.stall_s
        labels = {
            "input": trained.name,
            "epoch": "1",
            "accelerator": trained.device,
            "batch": str(self.batch),
            "loader": f"torch {trained.torch}",
        }
        side = self.real_amounts.side
        case = (
            f"a real ResNet-50, {trained.steps} steps, {side} x {side} pixels, batches of {self.batch}, {trained.name}"
        )
        told: tuple[tuple[str, float, str, Better], ...] = (
            ("images_per_s", trained.images / seconds, "1/s", "more"),
            ("utilisation", trained.compute_s / seconds, "", "more"),
            ("stall_s", trained.stall_s, "s", "less"),
            ("first_loss", trained.first_loss, "", ""),
            ("last_loss", trained.last_loss, "", ""),
        )
        for metric, value, unit, better in told:
            yield Figure(case=case, metric=metric, value=value, unit=unit, better=better, labels=labels)
