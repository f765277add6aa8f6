"""What jobs do: walk what they are about, and have workers copy and drop blocks.

load   each file below the paths, each block: on enough workers already? else the block's homes copy it
free   each file below the paths, each block: every worker that holds it drops it
drain  each block of a worker that no other holds: another one with room copies it; until it has said that it seals
       nothing more, and nothing is left to do
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping
from contextlib import aclosing

import trio

from cachefs.master.cluster import Cluster
from cachefs.master.namespace import Namespace
from cachefs.master.pins import outermost
from cachefs.master.progress import Portion, Progress
from cachefs.master.quotas import check_fits
from cachefs.master.tasks import TaskQueues
from cachefs.master.walks import Position, Walk
from cachefs.meta import Content, MetaStore
from cachefs.model import BlockId, Geometry, Ino, NotADirectory
from cachefs.policy import HomeCandidate, Rate, rank_homes
from cachefs.wire.cluster import Member
from cachefs.wire.control import JobCounts, JobSpec, JobState, TaskKind, TaskOutcome
from cachefs.wire.messages import PromoteMode

AT_ONCE = 1024
"""Blocks of one job that are under way."""
_TRIES = 3
"""Workers that fail with a block before it counts as failed."""
_SETTLED_S = 15.0
"""After a start of the master, so long is waited for workers that were there before: what they hold need not be
loaded."""
_REPORTED_S = 1.5
"""What a worker seals is reported by then."""
_STALLED_S = 120.0
"""A worker that was filling blocks when its drain began has got nothing for so long: it takes no part any more. Longer
than the deadline of an under-store."""
_LOOK_EVERY_S = 0.25


class Job:
    """One that runs, or did."""

    def __init__(
        self,
        job_id: int,
        spec: JobSpec,
        state: JobState,
        progress: Progress,
        created_ns: int,
        ended_ns: int = 0,
        *,
        dry_run: bool = False,
    ) -> None:
        self.job_id = job_id
        self.spec = spec
        self.state = state
        self.progress = progress
        self.created_ns = created_ns
        self.ended_ns = ended_ns
        self.dry_run = dry_run
        self.waits_for = ""
        self.scope = trio.CancelScope()
        self.over = trio.Event()
        self.rate = Rate(spec.limit_bytes_per_s, trio.current_time())


class _File:
    """A file of which blocks are under way."""

    def __init__(self, portion: Portion, content: Content, blocks: int) -> None:
        self.portion = portion
        self.content = content
        self.left = blocks
        self.reason = ""


EachBlock = Callable[[Job, JobCounts, BlockId, int, Ino], Awaitable[str]]
"""Returns why it failed, or nothing."""


class Work:
    """`do` does a whole job. Called from one trio thread."""

    def __init__(
        self, store: MetaStore, namespace: Namespace, cluster: Cluster, tasks: TaskQueues, geometry: Geometry
    ) -> None:
        self._store = store
        self._namespace = namespace
        self._cluster = cluster
        self._workers = cluster.workers
        self._tasks = tasks
        self._geometry = geometry
        self._settled_at = trio.current_time() + _SETTLED_S

    async def do(self, job: Job) -> None:
        """Returns when it is done, with whatever failed; goes on where it was."""
        if not job.dry_run:
            await self._settled(job)
        if job.spec.kind == "drain":
            await self._drain(job)
        elif job.spec.kind == "free":
            await self._each_file(job, self._drop)
        else:
            if job.progress.position is None:
                await self._list(job)
                quotas, pins = self._namespace.quotas, self._namespace.pins
                await check_fits(outermost(job.spec.paths), job.spec.replicas, quotas, pins, self._geometry)
            job.state = "running"
            await self._each_file(job, self._copy)

    async def _settled(self, job: Job) -> None:
        while trio.current_time() < self._settled_at:
            away = [name for name in self._workers.names() if not self._workers.is_alive(name)]
            if not away:
                break
            job.waits_for = f"workers that were there before the master was restarted: {', '.join(away)}"
            await trio.sleep(_LOOK_EVERY_S)
        job.waits_for = ""

    # ---- files -----------------------------------------------------------------------------------------------------

    async def _list(self, job: Job) -> None:
        """Have all names below the paths known."""
        counts, failed = JobCounts(), list[tuple[str, str]]()
        for path in outermost(job.spec.paths):
            before = counts.total, counts.total_bytes
            try:
                async with aclosing(self._namespace.load(path)) as stream:
                    async for progress in stream:
                        failed += progress.failed
                        counts.total, counts.total_bytes = before[0] + progress.files, before[1] + progress.bytes
                        job.progress.base.total, job.progress.base.total_bytes = counts.total, counts.total_bytes
            except NotADirectory:
                attr = (await self._namespace.resolve_path(path)).attr
                counts.total, counts.total_bytes = counts.total + 1, counts.total_bytes + attr.size_bytes
        job.progress = Progress(Position(), counts)
        for where, reason in failed:
            job.progress.fail(where, reason.removeprefix(f"{where}: "))

    async def _each_file(self, job: Job, each: EachBlock) -> None:
        walk = Walk(self._store, outermost(job.spec.paths), job.progress.position)
        slots = trio.Semaphore(AT_ONCE)
        listed = job.spec.kind == "load"

        async def one(file: _File, index: int) -> None:
            content = file.content
            length = self._geometry.block_length(content.size_bytes, index)
            block = BlockId(content.key, index)
            reason = await each(job, file.portion.counts, block, length, content.ino)
            slots.release()
            file.left -= 1
            file.reason = file.reason or reason
            if not file.left:
                self._end(job, file)

        async with trio.open_nursery() as nursery:
            while not walk.ended:
                contents = walk.next()
                portion = job.progress.begin(walk.position)
                for content in contents:
                    if not listed:
                        portion.counts.total += 1
                        portion.counts.total_bytes += content.size_bytes
                    blocks = self._geometry.block_count(content.size_bytes) if content.size_bytes else 0
                    file = _File(portion, content, blocks)
                    portion.open += 1
                    if not blocks or not content.key:
                        if blocks and listed:
                            file.reason = "it is not cached: its under-store does not tell one version from another"
                        self._end(job, file)
                        continue
                    for index in range(blocks):
                        await slots.acquire()
                        nursery.start_soon(one, file, index)
                portion.open -= 1
                job.progress.settle()
                await trio.lowlevel.checkpoint()

    def _end(self, job: Job, file: _File) -> None:
        portion, content = file.portion, file.content
        if file.reason:
            inode = self._store.get(content.ino)
            portion.counts.failed += 1
            portion.failures.append((self._store.path(inode) if inode is not None else str(content.ino), file.reason))
        else:
            portion.counts.done += 1
            portion.counts.done_bytes += content.size_bytes
        portion.open -= 1
        job.progress.settle()

    # ---- copies ----------------------------------------------------------------------------------------------------

    async def _copy(self, job: Job, counts: JobCounts, block: BlockId, length: int, ino: Ino) -> str:
        spec = job.spec
        made: set[str] = set()
        refused: dict[str, str] = {}
        copied, failures = False, 0
        while True:
            members = self._active(spec.workers)
            held = {name for name in (*made, *self._store.holders(block)) if name in members}
            if len(held) >= spec.replicas:
                counts.present += not copied
                return ""
            targets = _ranked(block, length, members, {*held, *refused})
            if not targets:
                if not members and not job.dry_run:
                    await self._wait_for(job, "workers that take blocks", lambda: bool(self._active(spec.workers)))
                    continue
                return _why(len(held), spec.replicas, refused)
            outcome = await self._have(job, targets[0], "load", block, length, ino, spec.promote)
            if outcome is None:
                continue
            if outcome.end in ("done", "held"):
                made.add(targets[0])
                if outcome.end == "done":
                    copied = True
                    counts.copies, counts.copied_bytes = counts.copies + 1, counts.copied_bytes + length
            elif outcome.end == "changed":
                return "its object was changed or removed meanwhile"
            else:
                refused[targets[0]] = outcome.reason or "no room for it"
                failures += outcome.end == "failed"
                if failures >= _TRIES:
                    return _why(len(held), spec.replicas, refused)

    async def _have(
        self,
        job: Job,
        worker: str,
        kind: TaskKind,
        block: BlockId,
        length: int,
        ino: Ino,
        promote: PromoteMode,
        holders: Collection[str] = (),
    ) -> TaskOutcome | None:
        """Have a worker copy something, as fast as is allowed; None if it is dead."""
        if job.dry_run:
            return TaskOutcome(0, "done", length)
        await trio.sleep(job.rate.take(length, trio.current_time()))
        outcome = await self._tasks.run(worker, kind, block, length, ino, promote, list(holders))
        if outcome is None or outcome.end != "done":
            job.rate.give_back(length)
        return outcome

    def _active(self, only: Collection[str] = ()) -> dict[str, Member]:
        """Workers that are alive and take blocks."""
        return {
            each.name: each
            for each in self._workers.members()
            if each.state == "active" and (not only or each.name in only)
        }

    async def _wait_for(self, job: Job, what: str, there: Callable[[], bool]) -> None:
        job.waits_for = what
        while True:
            if there():
                break
            await trio.sleep(_LOOK_EVERY_S)
        job.waits_for = ""

    # ---- drops -----------------------------------------------------------------------------------------------------

    async def _drop(self, job: Job, counts: JobCounts, block: BlockId, length: int, ino: Ino) -> str:
        reason = ""
        for name in self._store.holders(block):
            if job.spec.workers and name not in job.spec.workers:
                continue
            outcome = self._would_drop(ino, length) if job.dry_run else await self._tasks.run(name, "drop", block, 0)
            if outcome is None:
                reason = f"worker {name}, which holds it, is away"
            elif outcome.end == "done":
                counts.drops, counts.dropped_bytes = counts.drops + 1, counts.dropped_bytes + outcome.size_bytes
            elif outcome.end == "in-use":
                counts.in_use += 1
            elif outcome.end == "pinned":
                counts.pinned += 1
            elif outcome.end != "absent":
                reason = f"worker {name}: {outcome.reason}"
        return reason

    def _would_drop(self, ino: Ino, length: int) -> TaskOutcome:
        inode = self._store.get(ino)
        is_pinned = inode is not None and self._namespace.pins.covers_inode(inode)
        return TaskOutcome(0, "pinned" if is_pinned else "done", length)

    # ---- draining --------------------------------------------------------------------------------------------------

    async def _drain(self, job: Job) -> None:
        (name,) = job.spec.workers
        while True:
            if not job.dry_run:
                # What it took in before it heard of this, and what others did of what was moved, is reported by then.
                await trio.sleep(_REPORTED_S)
            settled = self._is_settled(name)
            job.progress.begin_again()
            before = job.progress.base.copies
            await self._move_all(job, name)
            job.progress.settle()
            if job.dry_run:
                return
            if job.progress.base.copies == before:
                if settled:
                    break
                reason = await self._until_settled(job, name)
                if reason:
                    job.progress.fail(name, reason)
                    break
                if not self._is_settled(name):
                    # It ended, and so did what it was doing.
                    break
        if not job.progress.base.failed:
            await self._cluster.set_state(name, "drained")

    def _is_settled(self, name: str) -> bool:
        """It has said that it seals nothing more, and all that it sealed."""
        unsettled = self._workers.unsettled(name)
        return unsettled is not None and not unsettled.blocks

    async def _until_settled(self, job: Job, name: str) -> str:
        """Why that is not waited for any longer; empty when it is, or its worker is gone."""
        known, since = None, trio.current_time()
        while not self._is_settled(name):
            unsettled, now = self._workers.unsettled(name), trio.current_time()
            if unsettled != known:
                known, since = unsettled, now
            if self._workers.has_left(name):
                what = f"worker {name}, which is away"
                if now - since > _SETTLED_S:
                    break
            elif unsettled is None:
                what = f"worker {name}, to say that it takes no new blocks"
            else:
                what = f"worker {name}, with blocks under way: {unsettled.blocks}"
            if now - since > _STALLED_S:
                job.waits_for = ""
                return f"waited {_STALLED_S:g} s for {what}"
            job.waits_for = what
            await trio.sleep(_LOOK_EVERY_S)
        job.waits_for = ""
        return ""

    async def _move_all(self, job: Job, name: str) -> None:
        portion = job.progress.begin(Position())
        counts = portion.counts
        slots = trio.Semaphore(AT_ONCE)

        async def one(block: BlockId, length: int) -> None:
            reason = await self._move(job, counts, name, block, length)
            slots.release()
            if reason:
                counts.failed += 1
                portion.failures.append((block.filename, reason))
            else:
                counts.done, counts.done_bytes = counts.done + 1, counts.done_bytes + length

        async with trio.open_nursery() as nursery:
            after = None
            while blocks := self._store.blocks_of(name, after, AT_ONCE):
                after = blocks[-1][0]
                for block, length in blocks:
                    counts.total, counts.total_bytes = counts.total + 1, counts.total_bytes + length
                    await slots.acquire()
                    nursery.start_soon(one, block, length)
        portion.open -= 1

    async def _move(self, job: Job, counts: JobCounts, name: str, block: BlockId, length: int) -> str:
        refused: dict[str, str] = {}
        while True:
            members = self._active()
            members.pop(name, None)
            if any(holder in members for holder in self._store.holders(block)):
                counts.present += 1
                return ""
            roomy = {each: member for each, member in members.items() if member.room_bytes >= length}
            targets = _ranked(block, length, roomy, refused)
            if not targets:
                return _why(0, 1, refused)
            if not self._workers.is_alive(name) and not job.dry_run:
                await self._wait_for(job, f"worker {name}, which is away", lambda: self._workers.is_alive(name))
                continue
            outcome = await self._have(job, targets[0], "copy", block, length, Ino(0), "if-space", [name])
            if outcome is None:
                continue
            if outcome.end in ("done", "held"):
                if outcome.end == "done":
                    counts.copies, counts.copied_bytes = counts.copies + 1, counts.copied_bytes + length
                return ""
            refused[targets[0]] = outcome.reason or "no room for it"


def _ranked(block: BlockId, length: int, members: Mapping[str, Member], without: Collection[str]) -> list[str]:
    """Homes of a block, those with room before those that would have to evict for it."""
    candidates = [
        HomeCandidate(each.name, each.capacity_bytes) for name, each in members.items() if name not in without
    ]
    return sorted(rank_homes(block, candidates), key=lambda name: members[name].room_bytes < length)


def _why(have: int, wanted: int, refused: Mapping[str, str]) -> str:
    reasons = ", ".join(f"{name}: {reason}" for name, reason in list(refused.items())[:3])
    reasons = reasons or "no other worker has room for it"
    return f"{have} of {wanted} copies ({reasons})" if wanted > 1 else reasons
