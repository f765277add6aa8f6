"""The driver's part of docs/metrics.md, after that of cachefs: `python -m cachefs_csi.metrics_reference`."""

from __future__ import annotations

from cachefs_csi.server import CSI_METRICS


def metrics_reference() -> str:
    lines = ["", "## CSI driver", "", "Controller and node plugin; `process` is csi-controller or csi-node.", ""]
    lines += ["| metric | kind | labels | |", "|---|---|---|---|"]
    for metric in CSI_METRICS:
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        lines.append(f"| `{metric.name}` | {metric.kind} | {labels} | {metric.help} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    print(metrics_reference(), end="")
