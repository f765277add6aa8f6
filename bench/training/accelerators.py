"""How fast accelerators train, as others have published it. A figure without a source has no place here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

MLPERF_STORAGE = "https://github.com/mlcommons/storage_results_v1.0, Closed/HPE/code/storage-conf/workload"
DLIO = "https://github.com/argonne-lcf/dlio_benchmark, dlio_benchmark/configs/workload"
NVIDIA = (
    "https://github.com/NVIDIA/DeepLearningExamples/blob/master/PyTorch/Classification/ConvNets/resnet50v1.5/README.md"
)
TENSORFLOW = "https://github.com/tensorflow/docs/blob/master/site/en/r1/guide/performance/benchmarks.md"


@dataclass(frozen=True)
class Speed:
    """Of one accelerator that trains one model."""

    samples: int
    """Of a batch as the source has it; 1 where it tells a rate."""
    seconds: float
    """That `samples` take."""
    source: str
    """Address, and what it is called there."""
    batch: int | None = None
    """Of the source, where it tells."""

    @property
    def samples_per_s(self) -> float:
        return self.samples / self.seconds


def _rate(per_second: float, source: str, batch: int | None = None) -> Speed:
    return Speed(1, 1 / per_second, source, batch)


def _step(batch: int, seconds: float, source: str) -> Speed:
    return Speed(batch, seconds, source, batch)


RESNET50: Mapping[str, Speed] = {
    "P100": _rate(219, f"{TENSORFLOW}: DGX-1 (P100), 1 GPU, FP32, synthetic data", batch=64),
    "V100": _rate(367, f"{NVIDIA}: DGX-1 16GB, 1 GPU, FP32"),
    "V100-amp": _rate(1200, f"{NVIDIA}: DGX-1 16GB, 1 GPU, mixed precision"),
    "A100": _step(400, 0.435, f"{MLPERF_STORAGE}/resnet50_a100.yaml (MLPerf Storage v1.0)"),
    "A100-amp": _rate(2470, f"{NVIDIA}: DGX A100, 1 GPU, mixed precision"),
    "H100": _step(400, 0.224, f"{MLPERF_STORAGE}/resnet50_h100.yaml (MLPerf Storage v1.0)"),
}
"""NVIDIA has 938 images/s for an A100 with TF32: what MLPerf Storage lets an A100 do, 920, is not mixed precision."""

UNET3D: Mapping[str, Speed] = {
    "V100": _step(4, 1.3604, f"{DLIO}/unet3d_v100.yaml"),
    "A100": _step(7, 0.636, f"{MLPERF_STORAGE}/unet3d_a100.yaml (MLPerf Storage v1.0)"),
    "H100": _step(7, 0.323, f"{MLPERF_STORAGE}/unet3d_h100.yaml (MLPerf Storage v1.0)"),
}

COSMOFLOW: Mapping[str, Speed] = {
    "V100": _step(1, 0.00936, f"{DLIO}/cosmoflow_v100.yaml"),
    "A100": _step(1, 0.00551, f"{MLPERF_STORAGE}/cosmoflow_a100.yaml (MLPerf Storage v1.0)"),
    "H100": _step(1, 0.0035, f"{MLPERF_STORAGE}/cosmoflow_h100.yaml (MLPerf Storage v1.0)"),
}

TABLES: Mapping[str, Mapping[str, Speed]] = {"resnet": RESNET50, "unet3d": UNET3D, "cosmoflow": COSMOFLOW}
"""By workload."""
