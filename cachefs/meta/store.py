"""The store as the master uses it: look-ups inline, writes in transactions from one thread.

Reading methods are point look-ups or one bounded page: shorter than a thread hop, to be called inline from the one
event-loop thread. Writing methods commit (with an fsync) before they return: to be called in a worker thread, one at a
time; the store does not lock. Several of them inside `batch` share one commit.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager

from cachefs.meta import inodes, jobs, mounts, pins, quotas, replicas, volumes, workers
from cachefs.meta.database import Database, open_database
from cachefs.meta.inodes import Found, Inode, Merged
from cachefs.meta.jobs import StoredJob
from cachefs.meta.mounts import Added, Mount, check_mounts, normalise_mount_path
from cachefs.meta.pins import Content
from cachefs.meta.quotas import Quota
from cachefs.meta.replicas import Standing
from cachefs.meta.volumes import Volume
from cachefs.meta.workers import KnownWorker
from cachefs.model import NO_INO, BlockId, ContentKey, Entry, Ino


class MetaStore:
    """Made by `open_meta_store`."""

    def __init__(self, database: Database) -> None:
        self._reader = database.reader
        self._writer = database.writer
        self._in_batch = False
        self.namespace_id = database.namespace_id

    # ---- look-ups --------------------------------------------------------------------------------------------------

    def get(self, ino: Ino) -> Inode | None:
        """Any inode ever given out, live or superseded."""
        return inodes.get(self._reader, ino)

    def child(self, parent: Ino, name: str) -> Inode | None:
        """What a name points at now, as far as is known."""
        return inodes.child(self._reader, parent, name)

    def children(self, parent: Ino, after: Ino = NO_INO, limit: int = 1000) -> list[Entry]:
        """The next entries after inode `after`, by inode number: the order in which they were first found.

        What is found later always comes later, so a reader can follow a listing while it runs.
        """
        return inodes.children(self._reader, parent, after, limit)

    def child_inodes(self, parent: Ino, after: Ino, limit: int) -> list[Inode]:
        """As `children`, with all that is known of them."""
        return inodes.child_inodes(self._reader, parent, after, limit)

    def path_below_mount(self, inode: Inode) -> str:
        """The path of an inode's object from the root of its under-store, without leading slash."""
        return inodes.path_below_mount(self._reader, inode)

    def path(self, inode: Inode) -> str:
        """The path of an inode in the namespace, "/" for the root."""
        return inodes.path(self._reader, inode)

    def fact(self, name: str) -> str | None:
        row = self._reader.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        return str(row[0]) if row else None

    def numbers_given(self) -> int:
        """How many inode numbers were ever given out."""
        return inodes.last_number(self._reader, "ino")

    def holders(self, block: BlockId) -> list[str]:
        return replicas.holders(self._reader, block)

    def pins(self) -> dict[str, int]:
        """Path -> Unix time in nanoseconds at which it was pinned."""
        return pins.all_pins(self._reader)

    def quotas(self) -> list[Quota]:
        """By path."""
        return quotas.all_quotas(self._reader)

    def volume(self, volume_id: str) -> Volume | None:
        return volumes.get(self._reader, volume_id)

    def volumes(self, after: str, limit: int) -> list[Volume]:
        """The next ones by id."""
        return volumes.after(self._reader, after, limit)

    def volumes_at(self, path: str) -> list[Volume]:
        """All whose path is this one."""
        return volumes.at(self._reader, path)

    def volume_below(self, path: str) -> Volume | None:
        """One whose path is below this one, which is not the root."""
        return volumes.below(self._reader, path)

    def count_volumes(self) -> int:
        return volumes.count(self._reader)

    def contents(self, directory: Ino, after: Ino, limit: int, *, with_cached: bool) -> list[Content]:
        """As `children`, what is of interest for pinning."""
        return pins.contents(self._reader, directory, after, limit, with_cached=with_cached)

    def cached_blocks(self, key: ContentKey) -> int:
        """Blocks of a content that some worker said it holds."""
        return replicas.cached_blocks(self._reader, key)

    # ---- scans, to be called as writes are -------------------------------------------------------------------------

    def replica_totals(self) -> dict[str, tuple[int, int]]:
        """Per worker: (blocks, bytes)."""
        return replicas.totals(self._writer)

    def counts(self, mount_id: int) -> tuple[int, int]:
        """(directories, files) known below a mount."""
        return inodes.counts(self._writer, mount_id)

    # ---- writes ----------------------------------------------------------------------------------------------------

    @contextmanager
    def batch(self) -> Iterator[None]:
        """All writes inside are one transaction: none is done if an error leaves the block."""
        with self._transaction():
            self._in_batch = True
            try:
                yield
            finally:
                self._in_batch = False

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        if self._in_batch:
            yield self._writer
            return
        self._writer.execute("BEGIN IMMEDIATE")
        try:
            yield self._writer
            self._writer.execute("COMMIT")
        except BaseException:
            # On a full disk SQLite may have done so by itself, or have left it open though it was to be committed.
            if self._writer.in_transaction:
                self._writer.execute("ROLLBACK")
            raise

    def set_fact(self, name: str, value: str) -> None:
        """Record something about this namespace for good."""
        with self._transaction() as db:
            db.execute("INSERT INTO facts VALUES (?, ?)", (name, value))

    def prove_writable(self) -> None:
        """Write something of no use, to see that it can be done."""
        now = str(time.time_ns())
        with self._transaction() as db:
            if not db.execute("UPDATE facts SET value = ? WHERE name = 'written_ns'", (now,)).rowcount:
                db.execute("INSERT INTO facts VALUES ('written_ns', ?)", (now,))

    def attach(self, told: Iterable[tuple[str, str]]) -> list[Mount]:
        """Make the (path, origin) pairs that the master was told at its start the mounts of this namespace, with those
        that were added by hand; returns them all, those told first, in that order.

        One that is there with the same origin keeps its inodes; one with another origin is attached afresh, also in the
        place of one that was added by hand. One that was removed by hand stays away for as long as it is told. Those
        that are neither told nor added are detached: their names are gone, and nothing else is touched. Raises
        ConfigError.
        """
        wanted = [(normalise_mount_path(path), origin) for path, origin in told]
        check_mounts([path for path, _ in wanted])
        with self._transaction() as db:
            return mounts.attach_all(db, wanted, time.time_ns())

    def add_mount(self, path: str, origin: str, url: str, options: dict[str, str]) -> Mount:
        """Attach one more, by hand, at a normalised path that the caller has checked. It is there again after a
        restart; so its options are kept, credentials included, in a file that only its owner can read.
        """
        with self._transaction() as db:
            return mounts.add(db, path, origin, url, options, time.time_ns())

    def remove_mount(self, mount_id: int) -> None:
        """Detach one by hand: it stays away, also if the master is told of it at its next start."""
        with self._transaction() as db:
            mounts.remove(db, mount_id)

    def newest_mount(self) -> int:
        """The largest number that a mount ever had; 0 before the first."""
        return inodes.last_number(self._reader, "mount")

    def added_mounts(self) -> list[Added]:
        """Those that were added by hand."""
        return mounts.added(self._reader)

    def removed_mounts(self) -> set[tuple[str, str]]:
        """(path, origin) of those removed by hand that the master may still be told of."""
        return mounts.removed(self._reader)

    def is_attached(self, path: str, origin: str) -> bool:
        """Whether this under-store is mounted at this path already. Raises ConfigError for what is no path."""
        row = (normalise_mount_path(path), origin)
        return self._reader.execute("SELECT 1 FROM mounts WHERE path = ? AND origin = ?", row).fetchone() is not None

    def add_pins(self, paths: Iterable[str]) -> None:
        """Paths that are not pinned yet."""
        with self._transaction() as db:
            pins.add(db, paths, time.time_ns())

    def remove_pins(self, paths: Iterable[str]) -> None:
        with self._transaction() as db:
            pins.remove(db, paths)

    def set_quota(self, path: str, limit_bytes: int) -> Quota:
        """A new one, or another limit for one that is there: it keeps its number and time."""
        with self._transaction() as db:
            return quotas.put(db, path, limit_bytes, time.time_ns())

    def remove_quota(self, path: str) -> None:
        with self._transaction() as db:
            quotas.remove(db, path)

    def put_volume(self, volume: Volume) -> None:
        """A new one, or the same in other words. With its options, credentials included, as `add_mount`."""
        with self._transaction() as db:
            volumes.put(db, volume)

    def remove_volume(self, volume_id: str) -> None:
        """The record alone. One that is not there is no error."""
        with self._transaction() as db:
            volumes.remove(db, volume_id)

    def begin_listing(self) -> int:
        """A number that marks what one listing sees; larger than all before."""
        with self._transaction() as db:
            listing = inodes.last_number(db, "listing") + 1
            inodes.take_numbers(db, "listing", listing)
            return listing

    def add_listed(self, parent: Inode, origin: str, found: Sequence[Found], listing: int) -> Merged:
        """Write a chunk of a listing."""
        with self._transaction() as db:
            return inodes.merge(db, parent, origin, found, listing, time.time_ns())

    def drop_unseen(
        self, parent: Ino, listing: int, after: Ino = NO_INO, limit: int = 1000
    ) -> tuple[Ino | None, list[str]]:
        """Once all was added that a listing found: what it did not see is gone, of the next `limit` names after inode
        `after`. Returns where to go on, None at the end, and the names that are gone.

        In portions, since others wait for each transaction, and the write-ahead log holds all of it. What a listing
        that is interrupted here has dropped is gone all the same; the rest is found by the next one.
        """
        with self._transaction() as db:
            return inodes.drop_unseen(db, parent, listing, after, limit)

    def end_listing(self, directory: Ino, started_ns: int) -> None:
        """The listing that began at this Unix time is complete: the directory is as old as that."""
        with self._transaction() as db:
            inodes.end_listing(db, directory, started_ns)

    def put_child(self, parent: Inode, origin: str, found: Found) -> Merged:
        """Write one name that the under-store was asked about."""
        with self._transaction() as db:
            # A listing that runs now may have passed this name before it appeared: it must not take it for gone.
            listing = inodes.last_number(db, "listing")
            return inodes.merge(db, parent, origin, [found], listing, time.time_ns(), shadow=False)

    def remove_child(self, parent: Ino, name: str) -> None:
        """The under-store was asked and does not have this name."""
        with self._transaction() as db:
            inodes.remove_child(db, parent, name)

    # ---- workers and what they hold --------------------------------------------------------------------------------

    def register_worker(self, name: str, address: str, labels: dict[str, str], capacity_bytes: int) -> KnownWorker:
        """A worker begins, perhaps not for the first time: with an epoch larger than all before, in its old state."""
        with self._transaction() as db:
            return workers.register(db, name, address, labels, capacity_bytes)

    def set_worker_state(self, name: str, state: str) -> None:
        with self._transaction() as db:
            workers.set_state(db, name, state)

    def forget_worker(self, name: str) -> None:
        """With all that it was said to hold."""
        with self._transaction() as db:
            replicas.remove_worker(db, name)
            workers.forget(db, name)

    def workers(self) -> list[KnownWorker]:
        """All that ever registered."""
        return workers.all_workers(self._reader)

    def report(
        self,
        worker: str,
        epoch: int,
        added: Iterable[tuple[BlockId, int]],
        removed: Iterable[BlockId],
        alive: Collection[str],
    ) -> list[Standing]:
        """What a worker got and lost. Returns whose blocks are shared with others now, or are not any more, as far as
        that has changed; of workers in `alive` only.
        """
        with self._transaction() as db:
            return replicas.remove(db, worker, removed, alive) + replicas.add(db, worker, epoch, added, alive)

    def end_full_report(self, worker: str, epoch: int, alive: Collection[str]) -> list[Standing]:
        """What was not reported in this epoch is gone. Returns how all of its blocks stand, and others that were
        shared with it.
        """
        with self._transaction() as db:
            return replicas.sweep(db, worker, epoch, alive) + replicas.standings(db, worker, alive)

    def standings(self, worker: str, alive: Collection[str]) -> list[Standing]:
        """As `replicas.standings`; a scan, to be called as writes are."""
        return replicas.standings(self._writer, worker, alive)

    def grant_drops(
        self, worker: str, blocks: Iterable[BlockId], alive: Collection[str]
    ) -> tuple[list[BlockId], list[Standing]]:
        """As `replicas.grant_drops`."""
        with self._transaction() as db:
            return replicas.grant_drops(db, worker, blocks, alive)

    def blocks_of(self, worker: str, after: BlockId | None, limit: int) -> list[tuple[BlockId, int]]:
        """The next blocks of a worker, with their lengths in bytes."""
        return replicas.blocks_of(self._reader, worker, after, limit)

    # ---- jobs ------------------------------------------------------------------------------------------------------

    def jobs(self) -> list[StoredJob]:
        """The oldest first."""
        return jobs.all_jobs(self._reader)

    def add_job(self, spec: str, state: str) -> StoredJob:
        with self._transaction() as db:
            return jobs.add(db, spec, state, time.time_ns())

    def save_job(self, job: StoredJob) -> None:
        """How it stands now."""
        with self._transaction() as db:
            jobs.save(db, job)

    def forget_ended_jobs(self, kept: int) -> None:
        """But for the last so many."""
        with self._transaction() as db:
            jobs.forget_ended(db, kept)


@contextmanager
def open_meta_store(data_dir: str) -> Iterator[MetaStore]:
    """Raises as `database.open_database`."""
    with open_database(data_dir) as database:
        yield MetaStore(database)
