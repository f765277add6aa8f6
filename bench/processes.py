"""What processes use, as the kernel counts it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")


def processor_seconds(pid: int) -> float:
    """Spent so far. Raises OSError when the process has gone."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def all_processor_seconds(pids: Iterable[int]) -> float:
    """Of those that are there."""
    spent = 0.0
    for pid in pids:
        with suppress(OSError):
            spent += processor_seconds(pid)
    return spent


def memory_bytes(pid: int, what: str = "VmRSS") -> int:
    """`what`: VmHWM, at its highest; VmRSS, now. Raises OSError when the process has gone."""
    for text in Path(f"/proc/{pid}/status").read_text().splitlines():
        if text.startswith(f"{what}:"):
            return int(text.split()[1]) * 1024
    raise ProcessLookupError(f"process {pid} has no {what}")


def process_of(directory: Path, role: str) -> int:
    """The process with this role of the `cachefs up` below this directory; "mount" is the one that answers. Raises
    ProcessLookupError.
    """
    names = {"mount", "mount-server"} if role == "mount" else {role}
    for process in Path("/proc").iterdir():
        if process.name.isdecimal():
            with suppress(OSError):
                arguments = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
                if not names.isdisjoint(arguments) and any(str(directory) in each for each in arguments):
                    return int(process.name)
    raise ProcessLookupError(f"the {role} is not there")


def busiest_of(group: int) -> int:
    """Of a process group the one that does the work. Raises ValueError when there is none."""
    members = [int(each.name) for each in Path("/proc").iterdir() if each.name.isdecimal()]
    return max((pid for pid in members if _in_group(pid, group)), key=lambda pid: all_processor_seconds([pid]))


def _in_group(pid: int, group: int) -> bool:
    try:
        return os.getpgid(pid) == group
    except ProcessLookupError:
        return False
