"""The README of the chart: what is in values.yaml, as a table.

python charts/values_table.py > charts/cachefs/README.md
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import yaml

CHART = Path(__file__).parent / "cachefs"
_HEAD = """# The chart of cachefs

Installs a master, a worker on each node, and a CSI driver whose mounts outlive its upgrades and crashes. How to use it,
with credentials, TLS, upgrades and trouble-shooting, is in [docs/kubernetes.md](../../docs/kubernetes.md). It takes
Kubernetes {kubernetes}. Nobody publishes an image: build the Dockerfile, and push it to a registry of yours first.

```
helm install cachefs charts/cachefs --namespace cachefs --create-namespace \\
  --set image.repository=registry.example.com/cachefs
```

Manifests of volumes and of a training job are in [examples/](examples/).

## Values

Made by `python charts/values_table.py > charts/cachefs/README.md` from [values.yaml](values.yaml); a test keeps it in
step. `values.schema.json` refuses what is not in it.

| value | default | |
|---|---|---|
"""


class Row(NamedTuple):
    path: str
    default: object
    text: str


def rows(text: str) -> Iterator[Row]:
    """A row for each key whose comment, right above it, begins with two dashes."""
    values = yaml.safe_load(text)
    parents: list[tuple[int, str]] = []
    comment = ""
    for line in text.splitlines():
        stripped = line.strip()
        if stripped.startswith("# -- "):
            comment = stripped.removeprefix("# -- ")
            continue
        if not stripped or stripped.startswith("#"):
            comment = ""
            continue
        indent = len(line) - len(line.lstrip())
        key = stripped.partition(":")[0]
        parents = [(depth, name) for depth, name in parents if depth < indent]
        parents.append((indent, key))
        if comment:
            names = [name for _, name in parents]
            found = values
            for name in names:
                found = found[name]
            yield Row(".".join(names), found, comment)
            comment = ""


def readme() -> str:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8"))
    oldest = chart["kubeVersion"].removeprefix(">=").removesuffix(".0-0")
    table = "".join(
        f"| `{row.path}` | `{json.dumps(row.default)}` | {row.text.replace('|', '&#124;')} |\n"
        for row in rows((CHART / "values.yaml").read_text(encoding="utf-8"))
    )
    return _HEAD.format(kubernetes=f"{oldest} or newer") + table


if __name__ == "__main__":
    sys.stdout.write(readme())
