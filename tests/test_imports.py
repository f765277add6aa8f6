"""The tree shows the architecture: packages import only along the arrows of the design."""

from __future__ import annotations

import ast
from pathlib import Path

import cachefs_csi
import pytest

import cachefs

PACKAGE = Path(cachefs.__file__).parent

# What a package may import, directly; what it may import is reached through its own arrows too.
ARROWS = {
    "model": set[str](),
    "metrics": {"model"},
    "policy": {"model"},
    "wire": {"model"},
    "fusewire": {"model"},
    "ufs": {"model"},
    "store": {"model", "policy"},
    "meta": {"model", "policy"},
    "net": {"wire"},
    "master": {"meta", "ufs", "net", "metrics"},
    "worker": {"store", "policy", "ufs", "net", "metrics"},
    "client": {"net", "store", "policy", "metrics"},
    "fuse": {"client", "fusewire", "metrics"},
    "testing": {
        "model",
        "metrics",
        "policy",
        "wire",
        "fusewire",
        "ufs",
        "store",
        "meta",
        "net",
        "master",
        "worker",
        "client",
        "fuse",
    },
}
ONLY_IMPORTER = {
    "fsspec": {"ufs"},
    "s3fs": {"ufs", "testing"},
    "pyfuse3": {"fuse"},
    "sqlite3": {"meta"},
    "click": {"cli"},
    "rich": {"cli"},
    "h11": {"net"},
    "prometheus_client": {"metrics"},
}


def reachable(package: str) -> set[str]:
    """The package itself and whatever its arrows lead to."""
    seen = {package}
    todo = [package]
    while todo:
        for target in ARROWS[todo.pop()] - seen:
            seen.add(target)
            todo.append(target)
    return seen


def imports(path: Path) -> list[tuple[int, str]]:
    """(line, dotted name) of every import in a file, also those inside functions."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            found.append((node.lineno, node.module or ""))
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names if node.module == "cachefs"]
    return found


def packages() -> list[str]:
    return sorted(path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists())


def test_every_package_is_in_the_design() -> None:
    assert set(packages()) == {*ARROWS, "cli"}


@pytest.mark.parametrize("package", sorted(ARROWS))
def test_imports_go_down_the_arrows(package: str) -> None:
    allowed = reachable(package)
    wrong = []
    for path in sorted((PACKAGE / package).rglob("*.py")):
        for line, name in imports(path):
            parts = name.split(".")
            if parts[0] == "cachefs" and len(parts) > 1 and parts[1] in {*ARROWS, "cli"} and parts[1] not in allowed:
                wrong.append(f"{path.relative_to(PACKAGE)}:{line} imports {name}")
    assert not wrong


# What the driver for Kubernetes is made of: it asks, and holds nothing.
CSI = {"client", "net", "fuse", "wire", "model", "metrics", "cli"}


def test_the_driver_for_kubernetes_imports_what_asks_and_nothing_imports_it() -> None:
    wrong = []
    for path in sorted(Path(cachefs_csi.__file__).parent.rglob("*.py")):
        for line, name in imports(path):
            parts = name.split(".")
            if parts[0] == "cachefs" and len(parts) > 1 and parts[1] in {*ARROWS, "cli"} - CSI:
                wrong.append(f"{path.name}:{line} imports {name}")
    for path in sorted(PACKAGE.rglob("*.py")):
        for line, name in imports(path):
            if name.split(".")[0] in ("cachefs_csi", "grpc", "google"):
                wrong.append(f"{path.relative_to(PACKAGE)}:{line} imports {name}")
    assert not wrong


@pytest.mark.parametrize("library", sorted(ONLY_IMPORTER))
def test_a_library_stays_behind_its_package(library: str) -> None:
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        package = path.relative_to(PACKAGE).parts[0]
        for line, name in imports(path):
            if name.split(".")[0] == library and package not in ONLY_IMPORTER[library]:
                wrong.append(f"{path.relative_to(PACKAGE)}:{line} imports {name}")
    assert not wrong


def test_the_walk_sees_what_it_must() -> None:
    """A guard of the guard: the helpers find an import that breaks the rule."""
    assert "meta" not in reachable("client")
    assert "model" in reachable("net")
    assert "pytest" in [name for _, name in imports(Path(__file__))]
