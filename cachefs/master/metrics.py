"""What a master shows to monitoring: the numbers others keep, read when somebody asks for them."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import trio

from cachefs.master.jobs import Jobs
from cachefs.master.namespace import Namespace
from cachefs.master.quotas import QuotaShares
from cachefs.master.workers import Workers
from cachefs.master.writer import Writer
from cachefs.meta import MetaStore
from cachefs.metrics import Metric, Monitor, Times, by_label, counter, errors_of, gauge, histogram

logger = logging.getLogger(__name__)

COUNTED_EVERY_S = 60.0
"""Counting what workers hold looks at all of it, and writes wait meanwhile: a fifth of a second for a million."""

WRITTEN_EVERY_S = 5.0
"""At most so often the database is written for whoever asks whether it can be."""


@dataclass
class MasterParts:
    """Where the numbers are."""

    store: MetaStore
    writer: Writer
    namespace: Namespace
    workers: Workers
    jobs: Jobs
    quotas: QuotaShares
    requests: Times[str] = field(default_factory=Times)
    leases: Callable[[], int] | None = None
    """How many origin leases are granted."""
    open_stores: Callable[[], int] | None = None
    """How many under-stores are open."""
    held: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Worker -> (blocks, bytes), as counted last."""


MASTER_METRICS: Sequence[Metric[MasterParts]] = (
    histogram(
        "cachefs_request_seconds",
        "Requests of mounts, tools and workers, until their answer is sent.",
        lambda parts: parts.requests,
        "operation",
    ),
    counter(
        "cachefs_request_errors_total",
        "Of those, the ones answered with an error.",
        lambda parts: errors_of(parts.requests),
        "operation",
    ),
    gauge("cachefs_workers_connected", "Workers that are connected now.", lambda parts: parts.workers.connected),
    gauge(
        "cachefs_workers",
        "Workers that ever registered, by what is known of them: active, draining or drained; silent, which have a "
        "connection and say nothing; away, which have none.",
        lambda parts: by_label(parts.workers.by_state()),
        "state",
    ),
    gauge(
        "cachefs_worker_blocks",
        "Blocks a worker said it holds, counted once a minute.",
        lambda parts: by_label({worker: blocks for worker, (blocks, _) in parts.held.items()}),
        "worker",
    ),
    gauge(
        "cachefs_worker_block_bytes",
        "What these blocks take.",
        lambda parts: by_label({worker: size for worker, (_, size) in parts.held.items()}),
        "worker",
    ),
    counter(
        "cachefs_inodes_total",
        "Inode numbers given out since the namespace was made: files and directories, earlier versions included.",
        lambda parts: parts.store.numbers_given(),
    ),
    gauge("cachefs_listings_running", "Directories that are being listed.", lambda parts: parts.namespace.listings),
    gauge("cachefs_writes_waiting", "Writes that wait for the next transaction.", lambda parts: parts.writer.waiting),
    gauge("cachefs_watchers", "Mounts that are told what changes.", lambda parts: len(parts.namespace.watchers)),
    gauge("cachefs_under_stores", "Under-stores that are attached.", lambda parts: len(parts.namespace.mounts.all())),
    gauge(
        "cachefs_under_stores_open",
        "Under-stores it has open: those that are attached, and for a while those that are tried, replaced or removed.",
        lambda parts: parts.open_stores and parts.open_stores(),
    ),
    gauge(
        "cachefs_under_stores_failing",
        "Of those, the ones at which the last look failed.",
        lambda parts: sum(each.health.is_failing for each in parts.namespace.mounts.all()),
    ),
    gauge(
        "cachefs_under_store_failing_seconds",
        "For how long an under-store has done nothing that it was asked; 0: it answered the last time.",
        lambda parts: by_label({each.mount.path: each.health.failing_s for each in parts.namespace.mounts.all()}),
        "path",
    ),
    counter(
        "cachefs_under_store_failures_total",
        "Looks at an under-store that failed, after their retries.",
        lambda parts: by_label({each.mount.path: each.health.failures for each in parts.namespace.mounts.all()}),
        "path",
    ),
    gauge("cachefs_volumes", "Volumes that exist.", lambda parts: parts.store.count_volumes()),
    counter(
        "cachefs_served_stale_total",
        "Looks at an under-store that failed, so that what was known before was served.",
        lambda parts: sum(each.serving_stale for each in parts.namespace.mounts.all()),
    ),
    counter(
        "cachefs_hidden_keys_total",
        "Keys met that cannot be names of files.",
        lambda parts: sum(each.ufs.hidden_keys for each in parts.namespace.mounts.all()),
    ),
    gauge(
        "cachefs_leases_granted",
        "Blocks that one worker fetches for all.",
        lambda parts: parts.leases and parts.leases(),
    ),
    gauge("cachefs_jobs_running", "Jobs of data control that have not ended.", lambda parts: parts.jobs.running),
    gauge(
        "cachefs_tasks_waiting",
        "Blocks that workers are to fetch, copy or drop for jobs, and have not said that they did.",
        lambda parts: len(parts.jobs.tasks),
    ),
    gauge(
        "cachefs_quota_limit_bytes",
        "What a quota allows. A line for each quota that is set, of which there are 4096 at most.",
        lambda parts: parts.quotas.by_path(lambda quota_id: parts.quotas.limit_bytes(quota_id)),
        "path",
    ),
    gauge(
        "cachefs_quota_used_bytes",
        "What is below its path in all caches of workers that are alive, and what is being fetched to them.",
        lambda parts: parts.quotas.by_path(lambda quota_id: parts.quotas.used_bytes(quota_id)),
        "path",
    ),
    gauge(
        "cachefs_quota_refused_blocks",
        "Times that a block was not kept because of it, as counted by workers that are alive since they were started.",
        lambda parts: parts.quotas.by_path(lambda quota_id: parts.quotas.refused(quota_id)),
        "path",
    ),
)


class _Database:
    """Whether it can be read, and was written a moment ago."""

    def __init__(self, store: MetaStore, writer: Writer) -> None:
        self._store = store
        self._writer = writer
        self._one = trio.Lock()
        self._write_again_at = -math.inf
        self._unwritten: str | None = None
        """Why it could not be written the last time."""

    async def why_not(self) -> str | None:
        """Cancelled before a write is done, it is not known for a while whether it can be."""
        async with self._one:
            try:
                self._store.fact("geometry")
                if trio.current_time() < self._write_again_at:
                    # It writes nothing, but waits behind all that do: one that hangs is found out by the time it takes.
                    await self._writer.run(lambda: None)
                    return self._unwritten
                self._write_again_at = trio.current_time() + WRITTEN_EVERY_S
                self._unwritten = "a write of the database takes long"
                await self._writer.run(self._store.prove_writable)
                self._unwritten = None
            except Exception as error:
                self._unwritten = f"the database fails: {error.__cause__ or error}"
            return self._unwritten


async def watch_master(monitor: Monitor, parts: MasterParts) -> None:
    """Show it from now on. Runs until cancelled."""
    monitor.watch(MASTER_METRICS, parts)
    monitor.ready_if(_Database(parts.store, parts.writer).why_not)
    while True:
        try:
            parts.held = await parts.writer.run(parts.store.replica_totals)
        except Exception as error:
            # Nobody's request: the master goes on, and what was counted before stays.
            logger.warning("what workers hold was not counted error=%s", error)
        await trio.sleep(COUNTED_EVERY_S)
