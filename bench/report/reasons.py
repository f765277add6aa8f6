"""Why others are ahead where they are: written by hand, by whoever has looked into it."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from bench.results import Measure

UNKNOWN = "not looked into"


class Reason(msgspec.Struct, frozen=True, kw_only=True):
    workload: str
    labels: Mapping[str, str] = {}
    """The measure has at least these."""
    systems: frozenset[str] = frozenset()
    """Who is ahead; empty: whoever it is."""
    why: str


_COLD_BYTES = (
    "each byte of a first read passes a worker in Python, which checks its length and version, makes its checksum "
    "and writes it to the cache: 4.4 ms of processor for a megabyte, most of it copying into new pages of the page "
    "cache, on two cores that the S3 server shares"
)
_COLD_FILES = (
    "a small file costs the worker, the mount and the master 2.1 ms of processor when it is read first, on two cores "
    "that the S3 server shares; of the worker's, a third is the interpreter, a third threads that wake each other"
)
_WARM_BYTES = (
    "warm bytes come from the kernel's page cache alone: for them from that of the mounted file; with passthrough each "
    "call goes on to the cached file and the file system below (0.96 of local files where both are read in turns of "
    "milliseconds, see promises), and a single round of a second differs by more than that"
)
_TAILS = "the slowest few calls of a single round; the throughput of the same case is ahead of theirs"
_OPENS = (
    "each open costs 0.15 ms of Python in the one process that answers the mount, so several readers wait for one "
    "another; theirs answers on several threads"
)
_NAMES = (
    "names are answered by one Python process, and at first by a request to the master for each directory; "
    "by its construction: no profile was taken"
)
_KERNEL = "answered by the kernel alone, on both sides: the difference is that of a single round"

REASONS = (
    Reason(workload="fio", labels={"state": "cold"}, why=_COLD_BYTES),
    Reason(workload="small_files", labels={"state": "cold"}, why=_COLD_FILES),
    Reason(workload="resnet", labels={"state": "cold", "format": "files"}, why=_COLD_FILES),
    Reason(workload="resnet", labels={"state": "cold"}, why=_COLD_BYTES),
    Reason(workload="unet3d", labels={"state": "cold"}, why=_COLD_BYTES),
    Reason(workload="cosmoflow", labels={"state": "cold"}, why=_COLD_BYTES),
    Reason(workload="fio", labels={"state": "warm"}, why=_WARM_BYTES),
    Reason(workload="fio", labels={"state": "cached"}, why=_TAILS),
    Reason(workload="small_files", labels={"work": "find"}, why=_NAMES),
    Reason(workload="small_files", labels={"work": "stat"}, why=_KERNEL),
    Reason(workload="small_files", labels={"work": "epoch", "state": "warm"}, why=_OPENS),
    Reason(workload="resnet", labels={"input": "synthetic"}, why="nothing is read: noise of a single round"),
    Reason(workload="unet3d", labels={"input": "synthetic"}, why="nothing is read: noise of a single round"),
    Reason(workload="cosmoflow", labels={"input": "synthetic"}, why="nothing is read: noise of a single round"),
)
"""The first that fits counts: the special ones before the general."""


def why_ahead(theirs: Measure, reasons: tuple[Reason, ...] = REASONS) -> str:
    for reason in reasons:
        if reason.workload != theirs.workload or (reason.systems and theirs.system not in reason.systems):
            continue
        if reason.labels.items() <= theirs.labels.items():
            return reason.why
    return UNKNOWN
