"""What the numbers were measured on."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from bench.results import Machine

LIBRARIES = ("trio", "msgspec", "obstore", "torch")
_ROOT = Path(__file__).parent.parent


def medium_of(path: Path) -> str:
    """The type of the file system a directory lies on."""
    device = os.stat(path).st_dev
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        mount, _, filesystem = line.partition(" - ")
        if mount.split()[2] == f"{os.major(device)}:{os.minor(device)}":
            return filesystem.split()[0]
    return "an unknown file system"


def machine(directory: Path) -> Machine:
    """This one, with caches and native data in `directory`."""
    return Machine(
        kernel=f"{platform.system()} {platform.release()}",
        cpu=_cpu(),
        processors=len(os.sched_getaffinity(0)),
        memory_bytes=memory("MemTotal"),
        medium=medium_of(directory),
        python=platform.python_version(),
    )


def memory(what: str) -> int:
    """Bytes, of a line in /proc/meminfo."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith(f"{what}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/meminfo has no {what}")


def library_versions() -> dict[str, str]:
    """Of those installed that a figure may depend on."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def revision() -> str:
    """Of git, with "+" where the tree was changed; "unknown" where there is no git, or none that knows this tree."""
    try:
        commit = _git("rev-parse", "--short=12", "HEAD")
        return commit + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(_ROOT), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout.strip()


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("model name", "Model"):
            return value.strip()
    return platform.machine() or "unknown"
