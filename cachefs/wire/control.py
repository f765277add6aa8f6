"""The messages of data control: jobs that people start at the master, and the tasks of workers that they are made of.

A job brings contents into caches, or takes them out. The master walks what it is about, and gives each worker small
tasks of one block each; a worker holds a stream open for them, and tells what became of each.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from cachefs.model import NO_INO
from cachefs.wire.messages import Bytes, Done, Index, InoField, Key, PromoteMode
from cachefs.wire.requests import Request, StreamRequest

TASKS_AT_ONCE = 32
"""Tasks that a worker has been given and has not finished."""

Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


# ---- tasks of workers ----------------------------------------------------------------------------------------------

TaskKind = Literal["load", "copy", "drop"]


class BlockTask(msgspec.Struct, frozen=True, array_like=True):
    task_id: Count
    kind: TaskKind
    """`load`: have a sealed copy, from wherever it is to be had. `copy`: the same, from other workers only: no inode is
    known. `drop`: have none, unless it is in use or pinned."""
    key: Key
    block_index: Index
    length: Bytes
    ino: InoField = NO_INO
    """Of that content, for `load`."""
    promote: PromoteMode = "always"
    """What may be evicted for it."""
    holders: list[str] = []
    """Workers to have it from, for `copy`."""


class Tasks(msgspec.Struct, frozen=True, array_like=True):
    tasks: list[BlockTask]


class WatchTasks(StreamRequest[Tasks], frozen=True):
    """What this worker is to do, as it comes up, until the asker leaves: whatever it has not told of by `TasksDone`
    until then is given again to whoever asks next for the same worker, or to another one when this one is dead.
    """


TaskEnd = Literal["done", "held", "full", "changed", "failed", "in-use", "pinned", "absent"]


class TaskOutcome(msgspec.Struct, frozen=True, array_like=True):
    task_id: Count
    end: TaskEnd
    """`held`: it was here before. `full`: there is no room that may be taken for it. `changed`: the object has another
    version, or is gone. `in-use`, `pinned`, `absent`: of what was to be dropped."""
    size_bytes: Bytes = 0
    """Made or dropped."""
    reason: str = ""


class TasksDone(Request[Done], frozen=True):
    """Tasks that the master no longer knows are passed over."""

    outcomes: Annotated[list[TaskOutcome], msgspec.Meta(max_length=1000)]


class BlockLength(msgspec.Struct, frozen=True, array_like=True):
    length: Bytes


class MeasureBlock(Request[BlockLength], frozen=True):
    """How long a block is that this worker holds sealed; from a worker. Raises BlockMissingError."""

    key: Key
    block_index: Index


# ---- jobs ----------------------------------------------------------------------------------------------------------

JobKind = Literal["load", "free", "drain"]
JobState = Literal["listing", "running", "done", "cancelled", "failed"]


class JobSpec(msgspec.Struct, frozen=True):
    kind: JobKind
    paths: list[str] = []
    """Of the namespace; none for `drain`."""
    workers: list[str] = []
    """Only these; none: all that take blocks. Of `drain`: the one."""
    replicas: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 1
    """Copies of each block, on different workers."""
    limit_bytes_per_s: Bytes = 0
    """Over the cluster; 0: as fast as it goes."""
    promote: PromoteMode = "always"


class JobCounts(msgspec.Struct):
    """So far. Things are files, and of `drain` blocks."""

    total: int = 0
    """Found."""
    total_bytes: int = 0
    done: int = 0
    """Also those that needed nothing; without those that failed."""
    done_bytes: int = 0
    failed: int = 0
    copies: int = 0
    """Blocks that were copied."""
    copied_bytes: int = 0
    present: int = 0
    """Blocks of which there were copies enough."""
    drops: int = 0
    dropped_bytes: int = 0
    in_use: int = 0
    """Not dropped."""
    pinned: int = 0


class JobInfo(msgspec.Struct, frozen=True):
    job_id: Count
    """0: it was only asked what it would do."""
    spec: JobSpec
    state: JobState
    counts: JobCounts
    failures: list[tuple[str, str]]
    """(path or block, reason): the first of those that failed."""
    created_ns: int
    """Unix time."""
    ended_ns: int = 0
    waits_for: str = ""
    """What keeps it from going on."""


class StartJob(Request[JobInfo], frozen=True):
    """Begin a job; it goes on until it is done or cancelled, whether the master is restarted or not. A drain that runs
    already is not begun again.

    Raises ConfigError for workers that are not there and more replicas than workers; NotFoundError, NotADirectory,
    UnderStoreError and its kinds for the paths.
    """

    spec: JobSpec
    dry_run: bool = False
    """Only tell what would be done, as far as is known."""


class GetJob(Request[JobInfo], frozen=True):
    """Raises NotFoundError."""

    job_id: Count


class JobList(msgspec.Struct, frozen=True):
    jobs: list[JobInfo]
    """The oldest first, without their failures."""


class ListJobs(Request[JobList], frozen=True):
    """Those that run, and the last of those that ended."""


class CancelJob(Request[JobInfo], frozen=True):
    """What it has done stays done, but a worker that was being drained takes blocks again. Raises NotFoundError;
    ConfigError for one that has ended.
    """

    job_id: Count


class UndrainWorker(Request[Done], frozen=True):
    """It takes blocks again. Raises NotFoundError."""

    name: str


class ForgetWorker(Request[Done], frozen=True):
    """What it was said to hold, too. Raises NotFoundError; ConfigError for one that is alive."""

    name: str
