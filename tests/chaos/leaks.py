"""What is left behind: processes, mounts, descriptors, files."""

from __future__ import annotations

import os
from collections import Counter
from contextlib import suppress
from pathlib import Path


def processes_with(text: str) -> dict[int, str]:
    """Pid -> command line, of all processes (but this one) that have it in theirs."""
    found = {}
    for each in Path("/proc").iterdir():
        if each.name.isdigit() and int(each.name) != os.getpid():
            with suppress(OSError):
                command = (each / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                if text in command:
                    found[int(each.name)] = command
    return found


def mounts() -> Counter[str]:
    """Mountpoint -> how many mounts are there, of this process's mount namespace."""
    return Counter(line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines())


def descriptors(pid: int) -> Counter[str]:
    """What a process has open -> how often; numbers in names, such as of sockets, are left out. Empty if it is gone."""
    found: Counter[str] = Counter()
    with suppress(OSError):
        for fd in os.scandir(f"/proc/{pid}/fd"):
            with suppress(OSError):
                found[os.readlink(fd.path).split(":[")[0]] += 1
    return found


def peak_bytes(pid: int) -> int:
    """Most memory that a process had; 0 if it is gone."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


def temporaries(tier: Path) -> list[str]:
    """Files of a tier whose worker has ended that nobody will ever look at."""
    known = {"sealed", "partial", "suspect", "staging", "tier.json", "lock", "lost+found"}
    found = [str(path) for path in tier.iterdir() if path.name not in known]
    found += [str(path) for path in (tier / "staging").glob("**/*") if path.is_file()]
    for kind in ("sealed", "suspect", "partial"):
        names = {path for path in (tier / kind).glob("*/*") if path.is_file()}
        for path in names:
            stem = path.name.removesuffix(".sums")
            if stem.rpartition("-")[0].strip("0123456789abcdef") or not stem.rpartition("-")[2].isdigit():
                found.append(str(path))
            elif kind == "sealed" and path.name.endswith(".sums") and path.with_name(stem) not in names:
                found.append(f"{path} (no data)")
    return sorted(found)
