"""The table of metrics, made from their declarations: `python -m cachefs.cli.metrics_reference`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from cachefs.cli.node import NODE_METRICS
from cachefs.cli.restarts import RESTART_METRICS
from cachefs.fuse.metrics import MOUNT_METRICS
from cachefs.master.metrics import MASTER_METRICS
from cachefs.metrics import BOUNDS_S, Metric
from cachefs.worker.metrics import WORKER_METRICS

PROCESSES: dict[str, Sequence[Metric[Any]]] = {
    "master": [*MASTER_METRICS, *RESTART_METRICS],
    "worker": [*WORKER_METRICS, *RESTART_METRICS],
    "mount": MOUNT_METRICS,
    "node-mounts": NODE_METRICS,
}

ALSO = {
    "node-mounts": """It shows all of [mount](#mount) as well, of each server that answers within 1.5 s, with the labels
`mount` (its id: that of the volume, or `host:MOUNTPOINT`) and `mountpoint`."""
}
"""What a process shows besides."""

HEAD = f"""# Reference: metrics

Made by `(python -m cachefs.cli.metrics_reference; python -m cachefs_csi.metrics_reference) > docs/metrics.md`; a test
keeps it in step. How to get at them, and
what to look at, is in [operations.md](operations.md#reading-the-metrics).

Every process has `cachefs_build_info` with the labels `version` and `process` (master, worker, mount or node-mounts),
and what Prometheus' own library tells of a process: `process_resident_memory_bytes`, `process_virtual_memory_bytes`,
`process_cpu_seconds_total`, `process_open_fds`, `process_max_fds`, `process_start_time_seconds`.

Counters begin at 0 when their process starts. A label's value is shown from its first event on. A histogram NAME is
shown as `NAME_bucket`, `NAME_sum` and `NAME_count`; its buckets end at so many seconds:
{", ".join(f"{bound:g}" for bound in BOUNDS_S)}.
"""


def metrics_reference() -> str:
    return "\n".join([HEAD, *(line for name in PROCESSES for line in _process(name))])


def _process(name: str) -> Iterator[str]:
    yield f"## {name}\n"
    if name in ALSO:
        yield f"{ALSO[name]}\n"
    yield "| metric | kind | labels | |"
    yield "|---|---|---|---|"
    for metric in PROCESSES[name]:
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        yield f"| `{metric.name}` | {metric.kind} | {labels} | {metric.help} |"
    yield ""


if __name__ == "__main__":
    print(metrics_reference(), end="")
