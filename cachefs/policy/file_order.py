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
    gap: int = 16
    """The next one in order lies at most so many positions further on: others are directories, were skipped, or are
    opened by others that share the work."""
    min_files: int = 4
    max_files: int = 64
    """Fetched ahead at a time; doubled from the smaller to the larger."""
    directories: int = 16
    """Remembered for one reader."""
    history: int = 32
    """Of so many last opens at least half must have been in order: shuffled ones are in order in places, too."""
    crowd: int = 12
    """So many opens in a directory that lie close together are in order as well: of several processes that share the
    work, each is ahead of others and behind some. Shuffled ones lie far apart, but in directories of few files: there
    next to nothing is left to fetch after so many."""
    spread: int = 48
    """How many positions may lie between the first and the last of a crowd, and how far one of it may jump."""


class Run:
    """Opens in order in one directory. Positions are numbers that ascend with the order; they have gaps."""

    def __init__(self, position: int, crowd: int) -> None:
        self.recent: deque[int] = deque([position], maxlen=crowd)
        """Positions of the last opens, as they came."""
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
        run.recent.append(position)
        in_order = run._reached < position <= run.after + config.gap
        self._history.append(in_order)
        if in_order or (self._is_crowd(run) and position > run._reached):
            return self._move(directory, run, position)
        if not run._reached - config.spread <= position <= run.after + config.spread:
            self._begin(directory, position)
        elif position > run._reached:
            run._reached = position
            run._steps = 0
        return None

    def _is_crowd(self, run: Run) -> bool:
        recent = run.recent
        return len(recent) == recent.maxlen and max(recent) - min(recent) <= self._config.spread

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
        self._runs[directory] = Run(position, self._config.crowd)
        if len(self._runs) > self._config.directories:
            self._runs.popitem(last=False)[1].over = True

    def _move(self, directory: D, run: Run, position: int) -> Run | None:
        config = self._config
        self._runs.move_to_end(directory)
        run._reached = position
        run._steps += 1
        if run._asking or position < run._trigger:
            return None
        is_row = run._steps >= config.steps and 2 * sum(self._history) >= len(self._history)
        if not is_row and not self._is_crowd(run):
            return None
        run._asking = True
        run.window = min(config.max_files, max(config.min_files, 2 * run.window))
        return run
