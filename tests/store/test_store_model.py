"""A store of two tiers against a dict: all that may happen to it, in any order, with damage, crashes and reboots.

Whatever can be read is the block's content, unless the model itself wrote into that very file, and nobody has verified
it since. The ledger agrees with the disk, and nothing goes that nobody took.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from cachefs.model import BlockCorruptError, BlockId, BlockMissingError, CapacityError
from cachefs.policy import Promote
from cachefs.store import Partial, PinnedKeys, SealedReader, TierConfig, open_store, page_checksum
from cachefs.store import sums as sums_module
from cachefs.store.space import allocated_bytes, estimate
from cachefs.testing.blocks import CLUSTER, GEOMETRY, PAGE, block, content, pages

LENGTHS = [0, 1, PAGE, PAGE + 1, 2 * PAGE, 3 * PAGE + 100, *[4 * PAGE, 5 * PAGE - 1, 5 * PAGE] * 3]
"""Of block n. A quarter of the upper tier at most, as others are admitted only below; together more than both hold."""
CONTENTS = [content(number, length) for number, length in enumerate(LENGTHS)]
EVERY = range(len(LENGTHS))
CAPACITIES = (24 * PAGE, 29 * PAGE)
NUMBERS = st.sampled_from(range(len(LENGTHS)))
LARGE = st.sampled_from(range(5, len(LENGTHS)))
MODES = st.sampled_from([Promote.ALWAYS, Promote.ALWAYS, Promote.IF_SPACE, Promote.NEVER])
SHARES = st.sets(st.integers(0, 4), min_size=1, max_size=3)
"""Pages of a block."""
WAYS = ["flip", "flip", "truncate", "longer", "foreign", "replace", "delete"]
SEEDS = st.integers(0, 1 << 16)
"""Of choices that Hypothesis makes too much alike."""
SUMS = [
    sums_module.encode(
        sums_module.encode_header(block(number), LENGTHS[number], PAGE),
        [page_checksum(page) for page in pages(CONTENTS[number])],
    )
    for number in EVERY
]
FAN = "00"
"""All blocks are in here."""

Inode = tuple[int, int]
Home = tuple[int, int]
"""(tier, block)"""


def number_of(which: BlockId) -> int:
    return int.from_bytes(which.key, "big")


def inode_of(path: Path) -> Inode | None:
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    return stat.st_dev, stat.st_ino


def inode_behind(fd: int) -> Inode:
    stat = os.fstat(fd)
    return stat.st_dev, stat.st_ino


class StoreModel(RuleBasedStateMachine):
    directory: Path
    """Of all examples: a tier has 768 directories."""

    def __init__(self) -> None:
        super().__init__()
        self.configs = [
            TierConfig("ssd", str(self.directory / f"tier{number}"), capacity)
            for number, capacity in enumerate(CAPACITIES)
        ]
        for path in self.directory.glob(f"tier*/*/{FAN}/*"):
            path.unlink()
        for path in self.directory.glob("tier*/tier.json"):
            path.unlink()
        self.sealed: dict[int, set[int]] = {number: set() for number in EVERY}
        """The tiers that have each block sealed, as of the last step."""
        self.gone: list[BlockId] = []
        """What on_evicted was called for since."""
        self.ledger: dict[Home, int] = {}
        """What sealed and suspect blocks took when they became that."""
        self.retired: set[Home] = set()
        self.keys = PinnedKeys()
        self.pins: set[int] = set()
        """Blocks that are never evicted."""
        self.spoilt: set[Inode] = set()
        """Data that the model wrote into, and that nobody has verified since."""
        self.open: dict[int, list[Partial]] = {}
        self.dormant: dict[int, int] = {}
        """Partials that nobody has open, and what they take."""
        self.written: dict[int, set[int]] = {}
        """The pages of partials, open or dormant."""
        self.unsure: set[int] = set()
        """Blocks with a partial of which a file was damaged."""
        self.kept: list[tuple[int, int]] = []
        """Descriptors that mounts have, with the block each one was opened for."""
        self.start()

    def start(self) -> None:
        self.age = 0
        """Steps since."""
        self.stack = ExitStack()
        self.store = self.stack.enter_context(open_store(self.configs, GEOMETRY, CLUSTER, self.keys))
        self.reader = SealedReader(self.store.paths)
        self.store.on_evicted = self.gone.append
        self.retired.clear()
        self.ledger.clear()
        self.dormant.clear()
        self.learn(EVERY, told=False)
        for tier, opened in enumerate(self.store.tiers):
            for number in EVERY:
                if opened.holds(block(number)):
                    self.dormant[number] = self.path(tier, "partial", number).stat().st_blocks * 512
        # What is there is counted by other rules than what is promised: it may be a page more.
        self.excess = [max(0, tier.status().used_bytes - tier.status().capacity_bytes) for tier in self.store.tiers]

    def teardown(self) -> None:
        for fd, _ in self.kept:
            os.close(fd)
        for partials in self.open.values():
            for partial in partials:
                self.store.close(partial)
        self.stack.close()

    # ---- looking at the disk ---------------------------------------------------------------------------------------

    def path(self, tier: int, directory: str, number: int, suffix: str = "") -> Path:
        return Path(self.configs[tier].path, directory, FAN, block(number).filename + suffix)

    def has_files(self, tier: int, directory: str, number: int) -> bool:
        return all(self.path(tier, directory, number, suffix).exists() for suffix in ("", ".sums"))

    def is_good(self, tier: int, directory: str, number: int) -> bool:
        """Whether both files are what they should be: of a sealed or suspect block."""
        if not self.has_files(tier, directory, number):
            return False
        data, checksums = (self.path(tier, directory, number, suffix).read_bytes() for suffix in ("", ".sums"))
        return (data, checksums) == (CONTENTS[number], SUMS[number])

    def sealed_now(self, number: int) -> set[int]:
        return {index for index, tier in enumerate(self.store.tiers) if tier.is_sealed(block(number))}

    def suspect_now(self, number: int) -> set[int]:
        return {index for index, tier in enumerate(self.store.tiers) if tier.is_suspect(block(number))}

    def home(self, number: int) -> int | None:
        """Of its partial."""
        return next((index for index, tier in enumerate(self.store.tiers) if tier.holds(block(number))), None)

    def home_of(self, partial: Partial) -> int:
        path = os.readlink(f"/proc/self/fd/{partial.read_fd}")
        return next(tier for tier, config in enumerate(self.configs) if path.startswith(config.path + "/"))

    def being_read(self, number: int) -> bool:
        """Every copy of it: one that is not may go."""
        read = {inode_behind(fd) for fd, _ in self.kept}
        return all(inode_of(self.path(tier, "sealed", number)) in read for tier in self.sealed[number])

    # ---- what a step may change ------------------------------------------------------------------------------------

    def learn(self, may_change: Iterable[int] = (), *, told: bool = True) -> None:
        """Nothing but these blocks became sealed, moved or went, and `on_evicted` told of what went."""
        may = set(may_change)
        went = []
        for number, before in self.sealed.items():
            now = self.sealed_now(number)
            if before and not now:
                went.append(block(number))
            assert now == before or number in may, f"block {number} was in {before} and is in {now}"
            self.sealed[number] = now
            for tier in (0, 1):
                if tier in now or tier in self.suspect_now(number):
                    if (tier, number) not in self.ledger:
                        data = self.path(tier, "sealed" if tier in now else "suspect", number).stat()
                        self.ledger[tier, number] = allocated_bytes(data) + estimate(0, 1)
                else:
                    self.ledger.pop((tier, number), None)
                    self.retired.discard((tier, number))
        if told:
            assert sorted(self.gone) == sorted(went), "on_evicted is called for each block that went, once"
        self.gone.clear()

    def evictable(self, mode: Promote) -> list[int]:
        """What may go when room is made in that mode."""
        return [
            number
            for number, tiers in self.sealed.items()
            if tiers
            and number not in self.pins
            and not self.being_read(number)
            and (mode is Promote.ALWAYS or any((tier, number) in self.retired for tier in tiers))
        ]

    def forget_evicted_partials(self) -> None:
        for number in list(self.dormant):
            if self.home(number) is None:
                self.forget_partial(number)

    def forget_partial(self, number: int) -> None:
        self.dormant.pop(number, None)
        self.written.pop(number, None)
        self.unsure.discard(number)

    # ---- filling ---------------------------------------------------------------------------------------------------

    @rule(number=NUMBERS, mode=MODES)
    def open_partial(self, number: int, mode: Promote) -> None:
        """Who fills a block that is being filled shares it."""
        if self.suspect_now(number):
            self.restore(number)
        evictable = self.evictable(mode)
        before = self.home(number)
        try:
            partial = self.store.open_partial(block(number), LENGTHS[number], mode)
        except CapacityError:
            assert not self.sealed[number] and number not in self.open
            assert self.home(number) == before or number in self.unsure, "it can be resumed later"
            if mode is Promote.ALWAYS:
                suspects = any(self.suspect_now(number) for number in EVERY)
                assert self.open or self.kept or suspects or self.pins, "there was room to be made"
            self.forget_evicted_partials()
            self.learn(evictable)
            return
        if self.sealed[number]:
            assert partial is None
            self.learn()
            return
        assert partial is not None
        assert mode is not Promote.NEVER or before is not None
        if before is not None and number not in self.open and self.home_of(partial) != before:
            # No room to go on where it is, so it was begun anew elsewhere; the model knows one partial of a block only.
            fresh = self.store.tiers[self.home_of(partial)]
            self.store.give_up(partial)
            self.store.close(partial)
            assert not fresh.holds(block(number))
            self.forget_evicted_partials()
            self.learn(evictable)
            return
        self.open.setdefault(number, []).append(partial)
        assert all(other is partial for other in self.open[number])
        self.dormant.pop(number, None)
        found = {page for page in range(partial.page_count) if partial.recall(page)}
        expected = self.written.get(number, set()) if self.home(number) == before else set()
        if number in self.unsure:
            assert found <= expected, "no damage makes a page of a hole"
        else:
            assert found == expected, "what was written is still there, and nothing else"
        self.written[number] = found
        self.forget_evicted_partials()
        self.learn(evictable)

    def draw_open(self, data: st.DataObject) -> tuple[int, Partial]:
        number = data.draw(st.sampled_from(sorted(self.open)))
        return number, self.open[number][0]

    @rule(number=LARGE, mode=MODES, share=SHARES, close=st.booleans())
    def begin(self, number: int, mode: Promote, share: set[int], close: bool) -> None:
        """Open it and write some of it; let go of, it is what the next one resumes."""
        if len(self.open) > 2 and number not in self.open:
            self.fill(min(self.open))
        self.open_partial(number, mode)
        if number in self.open:
            self.write_pages(number, share)
            if close:
                self.close_one(number)
            self.learn()

    @rule(numbers=st.lists(LARGE, min_size=1, max_size=3, unique=True), share=SHARES)
    def begin_and_leave(self, numbers: list[int], share: set[int]) -> None:
        for number in numbers:
            self.begin(number, Promote.ALWAYS, share, True)

    @precondition(lambda self: self.dormant)
    @rule(data=st.data(), mode=MODES, share=SHARES, close=st.booleans())
    def resume(self, data: st.DataObject, mode: Promote, share: set[int], close: bool) -> None:
        number = data.draw(st.sampled_from(sorted(self.dormant)))
        self.begin(number, mode, share, close)

    @precondition(lambda self: self.open)
    @rule(data=st.data(), share=SHARES)
    def write(self, data: st.DataObject, share: set[int]) -> None:
        self.write_pages(data.draw(st.sampled_from(sorted(self.open))), share)
        self.learn()

    def write_pages(self, number: int, share: Iterable[int]) -> bool:
        """False when the disk failed, as its files are not there any more."""
        partial = self.open[number][0]
        for page in share:
            if page >= partial.page_count:
                continue
            data = pages(CONTENTS[number])[page]
            checksum = page_checksum(data)
            for wrong in (data[:-1] + bytes([data[-1] ^ 1]), data):
                with pytest.raises(BlockCorruptError):
                    partial.write_page(page, wrong, checksum if wrong != data else checksum ^ 1)
            try:
                fresh = partial.write_page(page, data, checksum)
            except OSError:
                assert number in self.unsure
                return False
            assert fresh == (page not in self.written[number])
            self.written[number].add(page)
            assert not partial.write_page(page, data, checksum)
        if inode_behind(partial.read_fd) not in self.spoilt:
            for page in self.written[number]:
                offset, span = partial.page_span(page)
                assert os.pread(partial.read_fd, span, offset) == CONTENTS[number][offset : offset + span]
        return True

    @precondition(lambda self: self.open)
    @rule(data=st.data(), hold=st.booleans())
    def seal(self, data: st.DataObject, hold: bool) -> None:
        """Write the rest and seal; a mount may go on with the descriptor it got for the partial."""
        number, partial = self.draw_open(data)
        if hold:
            fd = os.dup(partial.read_fd)
            self.fill(number)
            if partial.sealed:
                self.kept.append((fd, number))
            else:
                os.close(fd)
        else:
            self.fill(number)

    def fill(self, number: int) -> None:
        partial = self.open[number][0]
        tier = self.home(number)
        assert tier is not None
        if not partial.complete:
            with pytest.raises(BlockCorruptError, match="not complete"):
                self.store.seal(partial)
            assert self.home(number) is not None
        filled = self.write_pages(number, range(partial.page_count))
        path = self.path(tier, "partial", number)
        good = path.exists() and inode_of(path) == inode_behind(partial.read_fd)
        good = good and path.read_bytes() == CONTENTS[number]
        try:
            if not filled:
                raise FileNotFoundError
            self.store.seal(partial)
        except BlockCorruptError:
            assert not good, "there was nothing wrong with it"
            if partial.dropped:
                assert not self.has_files(tier, "partial", number)
            else:
                damaged = set(partial.missing())
                assert damaged, "either pages are to be fetched again, or the file is gone"
                self.written[number] -= damaged
        except OSError:
            assert number in self.unsure, "its checksums are gone"
        else:
            assert good, "what is damaged is never sealed"
            self.spoilt.discard(inode_behind(partial.read_fd))
        while number in self.open:
            self.close_one(number)
        self.learn([number] if partial.sealed else [])
        assert partial.sealed == (self.sealed[number] == {tier})

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        """One of those who opened it is done."""
        self.close_one(data.draw(st.sampled_from(sorted(self.open))))
        self.learn()

    def close_one(self, number: int) -> None:
        partial = self.open[number].pop()
        self.store.close(partial)
        if self.open[number]:
            return
        del self.open[number]
        resumable = partial.page_count > 1 and bool(self.written[number])
        if partial.sealed or partial.dropped or not resumable:
            if number not in self.unsure:
                assert partial.sealed or self.home(number) is None
            if self.home(number) is None:
                self.forget_partial(number)
                return
        assert self.home(number) is not None
        missing = partial.page_count - len(self.written[number])
        held = max(0, LENGTHS[number] - missing * PAGE)
        self.dormant[number] = held + sums_module.file_size(partial.page_count)

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        number, partial = self.draw_open(data)
        self.store.give_up(partial)
        assert self.home(number) is None
        if not partial.complete:
            page = next(partial.missing())
            with pytest.raises(BlockMissingError):
                whole = pages(CONTENTS[number])[page]
                partial.write_page(page, whole, page_checksum(whole))
        while number in self.open:
            self.close_one(number)
        self.learn()

    @precondition(lambda self: len(self.open) < 3)
    @rule(number=NUMBERS, mode=MODES)
    def put(self, number: int, mode: Promote) -> None:
        """All of it at once: what makes the tiers fill up."""
        if number not in self.open:
            self.open_partial(number, mode)
        if number in self.open:
            self.fill(number)

    @rule(first=LARGE, count=st.integers(1, 9), mode=MODES)
    def put_many(self, first: int, count: int, mode: Promote) -> None:
        """As a job that reads one file after the other."""
        large = range(5, len(LENGTHS))
        for at in range(count):
            self.put(large[(first + at) % len(large)], mode)

    @rule(first=LARGE)
    def put_all(self, first: int) -> None:
        self.put_many(first, 9, Promote.ALWAYS)

    # ---- reading ---------------------------------------------------------------------------------------------------

    @precondition(lambda self: any(self.sealed.values()))
    @rule(data=st.data())
    def hold(self, data: st.DataObject) -> None:
        """A mount opens it, and keeps reading whatever becomes of the name."""
        number = self.draw_sealed(data)
        if len(self.kept) > 2:
            os.close(self.kept.pop(0)[0])
        fd = self.reader.open(block(number), LENGTHS[number])
        if fd is not None:
            self.kept.append((fd, number))

    def draw_sealed(self, data: st.DataObject) -> int:
        return data.draw(st.sampled_from([number for number in EVERY if self.sealed[number]]))

    @precondition(lambda self: any(partials[0].complete for partials in self.open.values()))
    @rule(data=st.data())
    def hold_partial(self, data: st.DataObject) -> None:
        """What the worker passes to a mount, once every page is there."""
        number, partial = self.draw_open(data)
        if partial.complete:
            self.kept.append((os.dup(partial.read_fd), number))

    @precondition(lambda self: self.kept)
    @rule(data=st.data())
    def let_go(self, data: st.DataObject) -> None:
        fd, _ = self.kept.pop(data.draw(st.integers(0, len(self.kept) - 1)))
        os.close(fd)

    @rule(number=NUMBERS, retire=st.booleans())
    def visited(self, number: int, retire: bool) -> None:
        self.store.visited(block(number))
        if retire:
            self.store.retire(block(number))
            self.retired |= {(tier, number) for tier in self.sealed[number]}
        assert self.store.sync_sealed() == []
        self.learn()

    # ---- going and moving ------------------------------------------------------------------------------------------

    @precondition(lambda self: any(self.sealed.values()))
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        number = self.draw_sealed(data)
        before = self.sealed[number]
        self.store.drop(block(number))
        self.has_gone(number, before)
        self.learn([number])

    def has_gone(self, number: int, before: Iterable[int]) -> None:
        assert not self.store.is_sealed(block(number))
        for tier in before:
            for suffix in ("", ".sums"):
                assert not self.path(tier, "sealed", number, suffix).exists()

    @precondition(lambda self: any(self.sealed.values()))
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        """Somebody asks for it to go: it does, unless it is being read, or pinned."""
        number = self.draw_sealed(data)
        before, may_go = self.sealed[number], number in self.evictable(Promote.ALWAYS)
        if self.store.evict(block(number)):
            assert may_go
        else:
            assert self.sealed_now(number) == before
        self.learn([number] if may_go else [])

    @rule(numbers=st.sets(LARGE, max_size=6))
    def pin(self, numbers: set[int]) -> None:
        """Others than before are pinned, as the master tells it."""
        self.keys.begin()
        for number in numbers:
            self.keys.collect(block(number).key)
        self.keys.finish(self.keys.ordered())
        self.store.apply_pins()
        self.pins = set(numbers)
        self.learn()

    @rule(number=NUMBERS)
    def pin_one_more(self, number: int) -> None:
        self.store.pin([block(number)])
        self.pins.add(number)
        self.learn()

    @rule(mode=MODES)
    def move_down(self, mode: Promote) -> None:
        upper = {number: self.is_good(0, "sealed", number) for number in EVERY if 0 in self.sealed[number]}
        movable = {number for number in upper if number not in self.pins and not self.being_read(number)}
        evictable = set(self.evictable(mode))
        moved = self.store.move_down(mode)
        left = {number for number in upper if 0 not in self.sealed_now(number)}
        assert moved == len(left) and left <= movable
        for number in left:
            tiers = self.sealed_now(number)
            if not tiers:
                assert not upper[number] or number in evictable, "it was healthy"
            elif self.path(0, "sealed", number).exists() is False:
                self.has_gone_from(0, number)
            if 1 in tiers and 1 not in self.sealed[number]:
                assert self.is_good(1, "sealed", number), "what is damaged does not arrive"
        # A copy that was given up since a page was damaged has pages that are right, and is resumed.
        for number in EVERY:
            if self.home(number) == 1 and number not in self.open and number not in self.dormant:
                assert not upper[number]
                known = self.dormant_bytes(1)
                self.written[number] = self.pages_on_disk(1, number)
                self.dormant[number] = self.store.tiers[1].status().used_bytes - known
        self.forget_evicted_partials()
        self.learn(left | evictable)

    def has_gone_from(self, tier: int, number: int) -> None:
        assert not self.path(tier, "sealed", number, ".sums").exists()

    def pages_on_disk(self, tier: int, number: int) -> set[int]:
        known = sums_module.decode(self.path(tier, "partial", number, ".sums").read_bytes(), block(number))
        return {page for page, checksum in enumerate(known.checksums) if checksum is not None}

    # ---- looking for damage ----------------------------------------------------------------------------------------

    @precondition(lambda self: self.store.suspects())
    @rule(data=st.data())
    def look_at_suspect(self, data: st.DataObject) -> None:
        self.restore(data.draw(st.sampled_from(sorted(map(number_of, self.store.suspects())))))

    def restore(self, number: int) -> None:
        """What the worker does before it uses a block of an earlier boot."""
        good = {tier for tier in self.suspect_now(number) if self.is_good(tier, "suspect", number)}
        before = self.sealed[number]
        assert self.store.restore(block(number)) == bool(good | before)
        assert not self.suspect_now(number) and self.sealed_now(number) == good | before
        for tier in good:
            inode = inode_of(self.path(tier, "sealed", number))
            assert inode is not None
            self.spoilt.discard(inode)
        self.learn([number])

    def scrub(self, number: int) -> None:
        """Look at a block, and drop it if it is damaged; as `cachefs verify --repair` for all."""
        before = self.sealed[number]
        good = all(self.is_good(tier, "sealed", number) for tier in before)
        assert self.store.check(block(number)) is good
        self.learn()
        if good:
            for tier in before:
                self.spoilt -= {inode_of(self.path(tier, "sealed", number)) or (0, 0)}
        else:
            self.store.drop(block(number))
            self.has_gone(number, before)
            self.learn([number])

    @rule(data=st.data())
    def scrub_some(self, data: st.DataObject) -> None:
        for number in sorted(data.draw(st.sets(NUMBERS, max_size=4))):
            self.scrub(number)

    @rule()
    def repair(self) -> None:
        """`cachefs verify --repair`: after it, all that is sealed is right."""
        for which in self.store.suspects():
            self.restore(number_of(which))
        assert self.store.suspects() == []
        for which, _ in self.store.blocks():
            self.scrub(number_of(which))
        for number, tiers in self.sealed.items():
            assert all(self.is_good(tier, "sealed", number) for tier in tiers)

    # ---- damage ----------------------------------------------------------------------------------------------------

    @precondition(lambda self: any(self.sealed.values()))
    @rule(seed=SEEDS)
    def damage_sealed(self, seed: int) -> None:
        self.damage(seed, "sealed")

    @precondition(lambda self: self.open or self.dormant)
    @rule(data=st.data(), seed=SEEDS, fill=st.booleans())
    def damage_partial(self, data: st.DataObject, seed: int, fill: bool) -> None:
        """When it is sealed, that is noticed."""
        if fill and self.open:
            number, _ = self.draw_open(data)
            self.damage(seed, "partial", number)
            self.fill(number)
        else:
            self.damage(seed, "partial")

    @precondition(lambda self: any(self.sealed.values()) and self.age > 8)
    @rule(seeds=st.lists(SEEDS, max_size=3), crash=st.booleans())
    def lose_power(self, seeds: list[int], crash: bool) -> None:
        """A reboot, with what it does to files; some before the worker starts, some after."""
        for seed in seeds[:1]:
            self.damage(seed, "sealed")
        self.restart(crash, True)
        for seed in seeds[1:]:
            self.damage(seed, "suspect")

    def damage(self, seed: int, directory: str, only: int | None = None) -> None:
        choose = Random(seed)
        places = [
            (tier, number, suffix)
            for tier in (0, 1)
            for number in EVERY
            for suffix in ("", ".sums")
            if only in (None, number) and self.path(tier, directory, number, suffix).exists()
        ]
        if not places:
            return
        tier, number, suffix = choose.choice(places)
        how = choose.choice(WAYS)
        path = self.path(tier, directory, number, suffix)
        size = path.stat().st_size
        at = choose.randrange(max(1, size))
        others = bytes((at * 89 + 1) % 256 for at in range(size))
        self.spoil(path)
        if how == "flip":
            flipped = bytearray(path.read_bytes())
            if flipped:
                flipped[at] ^= 0x55
                with path.open("r+b") as file:
                    file.write(flipped)
        elif how == "truncate":
            os.truncate(path, at)
        elif how == "longer":
            with path.open("ab") as file:
                file.write(b"more")
        elif how == "foreign":
            with path.open("r+b") as file:
                file.write(others)
        else:
            path.unlink()
            if how == "replace":
                path.write_bytes(others)
                self.spoil(path)
        if directory == "partial":
            self.unsure.add(number)

    def spoil(self, path: Path) -> None:
        inode = inode_of(path)
        assert inode is not None
        self.spoilt.add(inode)

    # ---- ending and starting ---------------------------------------------------------------------------------------

    @precondition(lambda self: self.age > 5)
    @rule(crash=st.booleans())
    def restart_soon(self, crash: bool) -> None:
        self.restart(crash, False)

    @precondition(lambda self: any(tiers == {0} for tiers in self.sealed.values()) and self.age > 5)
    @rule(data=st.data(), reboot=st.booleans())
    def die_while_moving(self, data: st.DataObject, reboot: bool) -> None:
        """Between the copy and the eviction."""
        number = data.draw(st.sampled_from([number for number in EVERY if self.sealed[number] == {0}]))
        with suppress(BlockCorruptError, BlockMissingError, CapacityError):
            self.store.tiers[0].copy_to(block(number), self.store.tiers[1], evict=False)
        if number not in self.written and self.home(number) == 1:
            # Given up half way: a page of it is damaged.
            self.written[number] = self.pages_on_disk(1, number)
        self.restart(True, reboot)

    def restart(self, crash: bool, reboot: bool) -> None:
        sealed = {home for home in self.homes() if self.has_files(home[0], "sealed", home[1])}
        suspect = {home for home in self.homes() if self.has_files(home[0], "suspect", home[1])}
        if crash:
            self.die()
        self.stack.close()
        for number in list(self.open):
            self.open.pop(number)
            resumable = len(pages(CONTENTS[number])) > 1 and bool(self.written[number])
            if not resumable:
                self.forget_partial(number)
        if reboot:
            for number in list(self.written):
                self.forget_partial(number)
            for config in self.configs:
                path = Path(config.path, "tier.json")
                path.write_text(path.read_text().replace('"boot_id": "', '"boot_id": "another '))
        partial = {number for number in self.written if any(self.has_files(t, "partial", number) for t in (0, 1))}
        self.start()
        for number in list(self.written):
            if number not in self.dormant:
                assert number not in partial, "the pages it had are lost"
                self.forget_partial(number)
        found = {home for home in self.homes() if home[0] in self.sealed[home[1]]}
        suspects = {home for home in self.homes() if home[0] in self.suspect_now(home[1])}
        if reboot:
            assert not found and suspects >= sealed | suspect, "what was there is looked at"
            assert not self.dormant
        else:
            # One copy is enough.
            assert found == {(tier, number) for tier, number in sealed if not (tier and (0, number) in sealed)}
            assert suspects == suspect
        self.no_strangers()

    @staticmethod
    def homes() -> list[Home]:
        return [(tier, number) for tier in (0, 1) for number in EVERY]

    def die(self) -> None:
        """As when the worker is killed: nothing is tidied up, and its locks are gone."""
        ours = {
            str(Path(config.path, name)) for config in self.configs for name in (".", "sealed", "partial", "suspect")
        }
        elsewhere = os.open(self.directory / "elsewhere", os.O_RDONLY | os.O_DIRECTORY)
        for fd in map(int, os.listdir("/proc/self/fd")):
            try:
                target = os.readlink(f"/proc/self/fd/{fd}")
            except OSError:
                continue
            if target in ours:
                # What the store does from now on, it does to nothing.
                os.dup2(elsewhere, fd, inheritable=False)
        os.close(elsewhere)

    def no_strangers(self) -> None:
        for tier, config in enumerate(self.configs):
            assert sorted(os.listdir(config.path)) == ["partial", "sealed", "staging", "suspect", "tier.json"]
            assert os.listdir(Path(config.path, "staging")) == []
            for directory, numbers in (
                ("sealed", [number for number in EVERY if tier in self.sealed[number]]),
                ("suspect", [number for number in EVERY if tier in self.suspect_now(number)]),
                ("partial", [number for number in self.dormant if self.home(number) == tier]),
            ):
                names = [block(number).filename + suffix for number in numbers for suffix in ("", ".sums")]
                assert sorted(each.name for each in Path(config.path, directory).glob(f"{FAN}/*")) == sorted(names)

    # ---- at any time -----------------------------------------------------------------------------------------------

    @invariant()
    def what_is_read_is_right(self) -> None:
        for number in EVERY:
            fd = self.reader.open(block(number), LENGTHS[number])
            if fd is None:
                assert not any(self.is_good(tier, "sealed", number) for tier in self.sealed[number])
                continue
            try:
                assert self.sealed[number], "what the store does not know is not read"
                assert os.fstat(fd).st_size == LENGTHS[number]
                self.reads_right(fd, number)
            finally:
                os.close(fd)

    @invariant()
    def kept_descriptors_read_on(self) -> None:
        for fd, number in self.kept:
            self.reads_right(fd, number)

    def reads_right(self, fd: int, number: int) -> None:
        if inode_behind(fd) not in self.spoilt:
            assert os.pread(fd, LENGTHS[number] + 1, 0) == CONTENTS[number]

    @invariant()
    def the_ledger_is_right(self) -> None:
        self.age += 1
        for tier, opened in enumerate(self.store.tiers):
            status = opened.status()
            reserved = [self.promised(number) for number in self.open if self.home(number) == tier]
            assert status.reserved_bytes == sum(reserved)
            assert status.used_bytes == self.dormant_bytes(tier)
            assert status.used_bytes + status.reserved_bytes <= status.capacity_bytes + self.excess[tier]
            pinned = (self.ledger[tier, number] for number in self.pins if tier in self.sealed[number])
            assert status.pinned_bytes == sum(pinned)
            assert status.sealed == sum(tier in tiers for tiers in self.sealed.values())
            assert status.partials == sum(self.home(number) == tier for number in (*self.open, *self.dormant))

    @staticmethod
    def promised(number: int) -> int:
        return estimate(LENGTHS[number], len(pages(CONTENTS[number])))

    def dormant_bytes(self, tier: int) -> int:
        """What is used, as far as the model knows."""
        finished = sum(size for (home, _), size in self.ledger.items() if home == tier)
        return finished + sum(size for number, size in self.dormant.items() if self.home(number) == tier)


@pytest.mark.expect_warnings("damage is told")
def test_a_store_against_a_model() -> None:
    # In memory where there is such a directory: what counts is who does what to which file.
    places: Sequence[str | None] = [place for place in ("/dev/shm",) if os.access(place, os.W_OK)] or [None]
    StoreModel.directory = Path(tempfile.mkdtemp(prefix="cachefs-model-", dir=places[0]))
    (StoreModel.directory / "elsewhere").mkdir()
    try:
        run_state_machine_as_test(
            StoreModel,
            settings=settings(
                max_examples=60,
                stateful_step_count=50,
                deadline=None,
                suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
            ),
        )
    finally:
        shutil.rmtree(StoreModel.directory)
