"""Jobs of data control: begun by people, kept in the database, and gone on with by a master that was restarted."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

import msgspec
import trio

from cachefs.master.cluster import Cluster
from cachefs.master.namespace import Namespace
from cachefs.master.progress import Progress
from cachefs.master.tasks import TaskQueues
from cachefs.master.walks import Position
from cachefs.master.work import Job, Work
from cachefs.master.writer import Writer
from cachefs.meta import MetaStore, StoredJob, normalise_mount_path
from cachefs.model import CachefsError, ConfigError, Geometry, NotFoundError
from cachefs.net import Service, Session
from cachefs.wire import control as k
from cachefs.wire.messages import Done

logger = logging.getLogger(__name__)

KEPT = 100
"""Jobs that ended and can still be looked at."""
LISTED_PATHS = 10
"""Of each job, in a list of all."""
_SAVED_EVERY_S = 1.0


class Jobs:
    """Handlers of requests; jobs run in `nursery`."""

    def __init__(
        self,
        store: MetaStore,
        writer: Writer,
        namespace: Namespace,
        cluster: Cluster,
        geometry: Geometry,
        nursery: trio.Nursery,
    ) -> None:
        self._store = store
        self._writer = writer
        self._namespace = namespace
        self._cluster = cluster
        self._nursery = nursery
        self.tasks = TaskQueues(cluster.workers.is_alive)
        self._work = Work(store, namespace, cluster, self.tasks, geometry)
        cluster.on_dead.append(self.tasks.lost)
        self._jobs = {each.job_id: _restored(each) for each in store.jobs()}
        for job in self._jobs.values():
            if not job.ended_ns:
                logger.info("job goes on id=%d kind=%s", job.job_id, job.spec.kind)
                nursery.start_soon(self._run, job)

    def add_to(self, service: Service) -> None:
        service.on_stream(k.WatchTasks, self.watch_tasks)
        service.on(k.TasksDone, self.tasks_done)
        service.on(k.StartJob, self.start_job)
        service.on(k.GetJob, self.get_job)
        service.on(k.ListJobs, self.list_jobs)
        service.on(k.CancelJob, self.cancel_job)
        service.on(k.UndrainWorker, self.undrain_worker)
        service.on(k.ForgetWorker, self.forget_worker)

    @property
    def running(self) -> int:
        """How many have not ended."""
        return sum(not job.ended_ns for job in self._jobs.values())

    # ---- workers ---------------------------------------------------------------------------------------------------

    async def watch_tasks(self, request: k.WatchTasks, session: Session) -> AsyncGenerator[k.Tasks, None]:
        async with aclosing(self.tasks.watch(self._cluster.workers.name_of(session))) as batches:
            async for tasks in batches:
                yield tasks

    async def tasks_done(self, request: k.TasksDone, session: Session) -> Done:
        self.tasks.ended(self._cluster.workers.name_of(session), request.outcomes)
        return Done()

    async def undrain_worker(self, request: k.UndrainWorker, session: Session) -> Done:
        self._cluster.workers.state(request.name)
        drain = self._drain_of(request.name)
        if drain is not None:
            await self._cancel(drain)
        await self._cluster.set_state(request.name, "active")
        return Done()

    async def forget_worker(self, request: k.ForgetWorker, session: Session) -> Done:
        drain = self._drain_of(request.name)
        await self._cluster.forget(request.name)
        if drain is not None:
            await self._cancel(drain)
        return Done()

    def _drain_of(self, worker: str) -> Job | None:
        return next(
            (
                job
                for job in self._jobs.values()
                if not job.ended_ns and job.spec.kind == "drain" and job.spec.workers == [worker]
            ),
            None,
        )

    # ---- people ----------------------------------------------------------------------------------------------------

    async def start_job(self, request: k.StartJob, session: Session) -> k.JobInfo:
        spec = await self._checked(request.spec)
        state: k.JobState = "listing" if spec.kind == "load" else "running"
        if request.dry_run:
            job = Job(0, spec, state, Progress(), time.time_ns(), dry_run=True)
            await self._work.do(job)
            job.progress.settle()
            job.state = "done"
            return _info(job)
        if spec.kind == "drain":
            running = self._drain_of(spec.workers[0])
            if running is not None:
                return _info(running)
            await self._cluster.set_state(spec.workers[0], "draining")
        text = msgspec.json.encode(spec).decode()

        def begin(stored: StoredJob) -> None:
            job = self._jobs[stored.job_id] = _restored(stored)
            self._nursery.start_soon(self._run, job)

        stored = await self._writer.run(lambda: self._store.add_job(text, state), begin)
        logger.info("job begins id=%d kind=%s paths=%s", stored.job_id, spec.kind, ",".join(spec.paths[:3]))
        return _info(self._jobs[stored.job_id])

    async def _checked(self, spec: k.JobSpec) -> k.JobSpec:
        """With normalised paths. Raises as `StartJob` says."""
        workers = self._cluster.workers
        known = workers.names()
        for name in spec.workers:
            if name not in known:
                raise ConfigError("WORKER", name, f"one of {', '.join(known) or 'none that ever registered'}")
        if spec.kind == "drain":
            if len(spec.workers) != 1 or spec.paths:
                raise ConfigError("WORKER", ", ".join(spec.workers), "one worker to be drained")
            return spec
        if not spec.paths:
            raise ConfigError("PATH", "", "at least one path")
        paths = [normalise_mount_path(path, "PATH") for path in spec.paths]
        for path in paths:
            await self._namespace.resolve_path(path)
            by = self._namespace.pins.covers(path)
            if spec.kind == "free" and by is not None:
                raise ConfigError("PATH", path, f"a path that is not pinned: cachefs unpin {by} comes first")
        if spec.kind == "load":
            for name in spec.workers:
                if workers.state(name) != "active":
                    raise ConfigError("--on", name, f"a worker that takes blocks; it is {workers.state(name)}")
            most = len([name for name in spec.workers or known if workers.state(name) == "active"])
            if spec.replicas > max(1, most):
                raise ConfigError("--replicas", spec.replicas, f"at most {most}, the number of workers to copy to")
        return msgspec.structs.replace(spec, paths=paths)

    async def get_job(self, request: k.GetJob, session: Session) -> k.JobInfo:
        return _info(self._job(request.job_id))

    async def list_jobs(self, request: k.ListJobs, session: Session) -> k.JobList:
        return k.JobList([_in_short(_info(job)) for job in self._jobs.values()])

    async def cancel_job(self, request: k.CancelJob, session: Session) -> k.JobInfo:
        job = self._job(request.job_id)
        if job.ended_ns:
            raise ConfigError("ID", job.job_id, f"a job that runs; this one is {job.state}")
        await self._cancel(job)
        if job.spec.kind == "drain":
            await self._cluster.set_state(job.spec.workers[0], "active")
        return _info(job)

    def _job(self, job_id: int) -> Job:
        job = self._jobs.get(job_id)
        if job is None:
            raise NotFoundError(f"no job {job_id}; there are {', '.join(map(str, self._jobs)) or 'none'}")
        return job

    # ---- running ---------------------------------------------------------------------------------------------------

    async def _cancel(self, job: Job) -> None:
        """Returns when it runs no more."""
        job.scope.cancel()
        await job.over.wait()

    async def _run(self, job: Job) -> None:
        state: k.JobState = "cancelled"
        with job.scope:
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._keep_saved, job)
                    await self._work.do(job)
                    nursery.cancel_scope.cancel()
                state = "done"
            except* CachefsError as group:
                state = "failed"
                job.progress.fail(job.spec.kind, str(_first(group)))
            except* Exception as group:
                logger.exception("job failed id=%d", job.job_id)
                state = "failed"
                job.progress.fail(job.spec.kind, repr(_first(group)))
        if job.scope.cancelled_caught:
            state = "cancelled"
        await self._end(job, state)

    async def _end(self, job: Job, state: k.JobState) -> None:
        job.progress.settle()
        # What was under way when it was cancelled, and is done, counts too.
        job.progress = Progress(job.progress.position, job.progress.counts(), job.progress.failures())
        job.state, job.ended_ns, job.waits_for = state, time.time_ns(), ""
        stored = _stored(job)

        def write() -> None:
            self._store.save_job(stored)
            self._store.forget_ended_jobs(KEPT)

        try:
            await self._writer.run(write)
        except Exception:
            # It is over all the same; a restarted master goes on with it where it was saved last.
            logger.exception("the end of a job cannot be written id=%d", job.job_id)
        ended = [each.job_id for each in self._jobs.values() if each.ended_ns]
        for job_id in ended[:-KEPT]:
            del self._jobs[job_id]
        logger.info("job ended id=%d state=%s failed=%d", job.job_id, state, job.progress.base.failed)
        job.over.set()

    async def _keep_saved(self, job: Job) -> None:
        saved = None
        while True:
            job.progress.settle()
            stored = _stored(job)
            if stored != saved:
                try:
                    await self._writer.run(lambda stored=stored: self._store.save_job(stored))  # type: ignore[misc]
                    saved = stored
                except Exception:
                    # Tried again: what is not saved is done again after a restart, which costs a look at each block.
                    logger.exception("how far a job is cannot be written id=%d", job.job_id)
            await trio.sleep(_SAVED_EVERY_S)


def _in_short(info: k.JobInfo) -> k.JobInfo:
    """Many of them fit into one answer; `ShowJob` tells all."""
    spec = msgspec.structs.replace(info.spec, paths=info.spec.paths[:LISTED_PATHS])
    return msgspec.structs.replace(info, failures=[], spec=spec)


def _first(group: BaseExceptionGroup[Exception]) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _info(job: Job) -> k.JobInfo:
    progress = job.progress
    return k.JobInfo(
        job_id=job.job_id,
        spec=job.spec,
        state=job.state,
        counts=progress.counts(),
        failures=progress.failures(),
        created_ns=job.created_ns,
        ended_ns=job.ended_ns,
        waits_for=job.waits_for,
    )


def _stored(job: Job) -> StoredJob:
    progress = job.progress
    return StoredJob(
        job_id=job.job_id,
        spec=msgspec.json.encode(job.spec).decode(),
        state=job.state,
        position=msgspec.json.encode(progress.position).decode() if progress.position is not None else "",
        counts=msgspec.json.encode(progress.base).decode(),
        failures=msgspec.json.encode(progress.base_failures).decode(),
        created_ns=job.created_ns,
        ended_ns=job.ended_ns,
    )


def _restored(stored: StoredJob) -> Job:
    position = msgspec.json.decode(stored.position, type=Position) if stored.position else None
    counts = msgspec.json.decode(stored.counts, type=k.JobCounts) if stored.counts else None
    failures = msgspec.json.decode(stored.failures, type=list[tuple[str, str]]) if stored.failures else None
    spec = msgspec.json.decode(stored.spec, type=k.JobSpec)
    state: k.JobState = stored.state  # type: ignore[assignment]
    return Job(stored.job_id, spec, state, Progress(position, counts, failures), stored.created_ns, stored.ended_ns)
