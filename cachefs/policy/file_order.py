"""Whether somebody opens the files of a directory one after the other, and how many to fetch ahead of them then."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

D = TypeVar("D", bound=Hashable)


@dataclass(frozen=True)
class FileOrderConfig:
    steps: int = 3
    """Opens in order, after a first one, before anything is fetched ahead."""
    gap: int = 4
    """The next one in order lies at most so many positions further on: some are directories, or were skipped."""
    back: int = 16
    """Opens that lie behind by no more than this are those of other processes that share the work."""
    min_files: int = 4
    max_files: int = 64
    """Fetched ahead at a time; doubled from the smaller to the larger."""
    directories: int = 16
    """Remembered for one reader."""
    history: int = 32
    """Of so many last opens at least half must have been in order: shuffled ones are in order in places, too."""


class Run:
    """Opens in order in one directory. Positions are numbers that ascend with the order; they have gaps."""

    def __init__(self, position: int) -> None:
        self.over = False
        """What was fetched ahead for it is of no use any more."""
        self.window = 0
        """Files to fetch ahead now."""
        self._reached = position
        self._requested = position
        self._trigger = position
        self._steps = 0
        self._asking = False

    @property
    def after(self) -> int:
        """The position after which to go on fetching."""
        return max(self._reached, self._requested)

    def took(self, until: int, trigger: int) -> None:
        """The files up to position `until` are being fetched; once `trigger` is reached it is time for more."""
        self._asking = False
        self._requested = max(self._requested, until)
        self._trigger = trigger


class FileOrder(Generic[D]):
    """What one reader opens. Pure: told of opens, answers when to fetch ahead; not thread-safe.

    Opens of files that are there already may never be heard of, or late: the position moves on with what is heard.
    """

    def __init__(self, config: FileOrderConfig | None = None) -> None:
        self._config = config or FileOrderConfig()
        self._runs: OrderedDict[D, Run] = OrderedDict()
        self._history: deque[bool] = deque(maxlen=self._config.history)

    def asked(self, directory: D, position: int) -> Run | None:
        """A file is opened that was not there. Returns the run whose next `window` files are to be fetched, if any are:
        `took` must be called then, or the run ended.
        """
        config, run = self._config, self._runs.get(directory)
        if run is None or run.over:
            self._begin(directory, position)
            self._history.append(False)
            return None
        if run._reached - config.back <= position <= run._reached:
            return None
        in_order = run._reached < position <= run.after + config.gap
        self._history.append(in_order)
        if not in_order:
            self._begin(directory, position)
            return None
        return self._move(directory, run, position)

    def passed(self, directory: D, position: int) -> Run | None:
        """A file that was fetched ahead was opened, as is heard now; else as `asked`."""
        run = self._runs.get(directory)
        if run is None or run.over or not run._reached < position <= run._requested:
            return None
        self._history.append(True)
        return self._move(directory, run, position)

    def _begin(self, directory: D, position: int) -> None:
        before = self._runs.pop(directory, None)
        if before is not None:
            before.over = True
        self._runs[directory] = Run(position)
        if len(self._runs) > self._config.directories:
            self._runs.popitem(last=False)[1].over = True

    def _move(self, directory: D, run: Run, position: int) -> Run | None:
        config = self._config
        self._runs.move_to_end(directory)
        run._reached = position
        run._steps += 1
        too_early = run._asking or run._steps < config.steps or position < run._trigger
        if too_early or 2 * sum(self._history) < len(self._history):
            return None
        run._asking = True
        run.window = min(config.max_files, max(config.min_files, 2 * run.window))
        return run
