"""What workers are to do: a bounded queue for each, emptied by the stream that it holds open."""

from __future__ import annotations

import itertools
import logging
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence

import trio

from cachefs.model import NO_INO, BlockId, Ino, MiB
from cachefs.wire.control import TASKS_AT_ONCE, BlockTask, TaskKind, TaskOutcome, Tasks
from cachefs.wire.messages import PromoteMode

logger = logging.getLogger(__name__)

MOST_WAITING = 256
"""Tasks in the queue of one worker; whoever has more waits."""
MOST_BYTES = 1024 * MiB
"""That a worker copies at once; a larger block is copied alone."""


class _Given:
    def __init__(self, task: BlockTask) -> None:
        self.task = task
        self.stream: object = None
        """The one that it was sent by; None: not yet."""
        self.ended = trio.Event()
        self.outcome: TaskOutcome | None = None


class _Queue:
    def __init__(self) -> None:
        self.waiting: deque[_Given] = deque()
        self.sent: dict[int, _Given] = {}
        self.changed = trio.Event()

    def tell(self) -> None:
        self.changed.set()
        self.changed = trio.Event()

    def take(self, stream: object) -> list[BlockTask]:
        """What the worker may be given now."""
        taken = []
        under_way = sum(each.task.length for each in self.sent.values() if each.task.kind != "drop")
        while self.waiting and len(self.sent) < TASKS_AT_ONCE:
            task = self.waiting[0].task
            copied = task.length if task.kind != "drop" else 0
            if copied and under_way and under_way + copied > MOST_BYTES:
                break
            under_way += copied
            given = self.waiting.popleft()
            given.stream = stream
            self.sent[task.task_id] = given
            taken.append(task)
        return taken


class TaskQueues:
    """Called from one trio thread."""

    def __init__(self, is_alive: Callable[[str], bool]) -> None:
        self._is_alive = is_alive
        self._queues: dict[str, _Queue] = {}
        self._ids = itertools.count(1)

    def __len__(self) -> int:
        """Tasks that are not finished."""
        return sum(len(queue.waiting) + len(queue.sent) for queue in self._queues.values())

    async def run(
        self,
        worker: str,
        kind: TaskKind,
        block: BlockId,
        length: int,
        ino: Ino = NO_INO,
        promote: PromoteMode = "always",
        holders: Sequence[str] = (),
    ) -> TaskOutcome | None:
        """Have a worker do it; None when it is dead. Cancelled, what was sent already may still be done."""
        queue = self._queues.setdefault(worker, _Queue())
        while self._is_alive(worker) and len(queue.waiting) >= MOST_WAITING:
            await queue.changed.wait()
        if not self._is_alive(worker):
            return None
        task = BlockTask(next(self._ids), kind, block.key, block.block_index, length, ino, promote, list(holders))
        given = _Given(task)
        queue.waiting.append(given)
        queue.tell()
        try:
            await given.ended.wait()
        finally:
            if given.stream is None and given in queue.waiting:
                queue.waiting.remove(given)
        return given.outcome

    async def watch(self, worker: str) -> AsyncGenerator[Tasks, None]:
        """Those of a worker as they come up, for its connection."""
        queue, stream = self._queues.setdefault(worker, _Queue()), object()
        try:
            while True:
                tasks = queue.take(stream)
                if tasks:
                    queue.tell()
                    yield Tasks(tasks)
                else:
                    await queue.changed.wait()
        finally:
            # To be given again to its next connection, unless it turns out to be dead.
            left = [each for each in queue.sent.values() if each.stream is stream]
            for each in reversed(left):
                del queue.sent[each.task.task_id]
                each.stream = None
                queue.waiting.appendleft(each)
            queue.tell()

    def ended(self, worker: str, outcomes: Iterable[TaskOutcome]) -> None:
        """A worker tells; of what it was to do no longer, that is passed over."""
        queue = self._queues.setdefault(worker, _Queue())
        for outcome in outcomes:
            given = queue.sent.pop(outcome.task_id, None)
            if given is not None:
                given.outcome = outcome
                given.ended.set()
        queue.tell()

    def lost(self, worker: str) -> None:
        """It is dead: whoever gave it something to do hears that nothing came of it."""
        queue = self._queues.get(worker)
        if queue is None:
            return
        gone = [*queue.waiting, *queue.sent.values()]
        if gone:
            logger.info("tasks of a worker that is away name=%s tasks=%d", worker, len(gone))
        queue.waiting.clear()
        queue.sent.clear()
        for given in gone:
            given.ended.set()
        queue.tell()
