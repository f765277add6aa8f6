"""The worker service: owns the tiers of a node, fetches what mounts ask for, and seals it."""

from cachefs.worker.config import WorkerConfig
from cachefs.worker.worker import default_name, run_worker

__all__ = ["WorkerConfig", "default_name", "run_worker"]
