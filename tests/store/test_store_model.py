"""A store of two tiers against a dict: filling, evicting, moving, restarts, crashes, reboots, damage and its repair.

Block number n has content(n, LENGTHS[n]).
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Collection
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cachefs.model import BlockCorruptError, BlockId, CapacityError
from cachefs.policy import Promote
from cachefs.store import Partial, SealedReader, Store, TierConfig, open_store, page_checksum
from cachefs.store.space import estimate
from cachefs.testing.blocks import CLUSTER, GEOMETRY, PAGE, block, content, pages

LENGTHS = [0, 1, PAGE, 2 * PAGE + 100, 4 * PAGE, 5 * PAGE - 1, 3 * PAGE, 6 * PAGE]
ALL = range(len(LENGTHS))
NUMBERS = st.integers(0, len(LENGTHS) - 1)
MODES = st.sampled_from([Promote.ALWAYS, Promote.ALWAYS, Promote.IF_SPACE])
CAPACITY = 24 * PAGE
_MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
"""It makes hundreds of directories for each example."""


class StoreModel(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(dir=_MEMORY))
        self.configs = [TierConfig("ssd", str(self.directory / name), CAPACITY) for name in ("fast", "large")]
        self.stack = ExitStack()
        self.known: set[int] = set()
        """Blocks that were sealed and that nobody was told have gone."""
        self.spoiled: set[int] = set()
        """Those of them whose bytes or checksums were damaged."""
        self.partials: dict[int, Partial] = {}
        self.spoiled_partials: set[int] = set()
        self.held: dict[int, int] = {}
        self.open()

    def open(self) -> None:
        self.store: Store = self.stack.enter_context(open_store(self.configs, GEOMETRY, CLUSTER))
        self.store.on_evicted = self.on_evicted

    def on_evicted(self, which: BlockId) -> None:
        number = int.from_bytes(which.key, "big")
        assert number in self.known, "told once"
        self.forget(number)

    def forget(self, number: int) -> None:
        self.known.discard(number)
        self.spoiled.discard(number)
        # A descriptor of spoiled bytes stays one; others read on.

    def teardown(self) -> None:
        for fd in self.held.values():
            os.close(fd)
        self.stack.close()
        shutil.rmtree(self.directory)

    def files(self, kind: str, number: int, suffix: str = "") -> list[Path]:
        name = block(number).filename
        found = [Path(config.path, kind, name[:2], name + suffix) for config in self.configs]
        return [path for path in found if path.exists()]

    def all_files(self) -> list[Path]:
        kinds = ("sealed", "suspect", "partial")
        return [path for config in self.configs for kind in kinds for path in Path(config.path, kind, "00").iterdir()]

    def pick(self, choice: int, among: Collection[int]) -> int:
        """One of these, if there is any: what has an effect is more interesting than what has none."""
        return sorted(among)[choice % len(among)] if among else choice

    # ---- filling ---------------------------------------------------------------------------------------------------

    @rule(number=NUMBERS, mode=MODES, share=st.sets(st.integers(0, 6)))
    def fill(self, number: int, mode: Promote, share: set[int]) -> None:
        """Some pages; the partial stays open. As the worker does, a block of an earlier boot is looked at first."""
        self.restore(number)
        partial = self.partials.get(number)
        data = content(number, LENGTHS[number])
        if partial is None:
            try:
                partial = self.store.open_partial(block(number), len(data), mode)
            except CapacityError:
                return
            if partial is None:
                assert number in self.known
                return
            self.partials[number] = partial
        for index, page in enumerate(pages(data)):
            if index in share and not partial.has(index):
                partial.write_page(index, page, page_checksum(page))
        if number not in self.spoiled_partials:
            for index, page in enumerate(pages(data)):
                if partial.has(index):
                    start, length = partial.page_span(index)
                    assert os.pread(partial.read_fd, length, start) == page

    @rule(number=NUMBERS, mode=MODES)
    def seal(self, number: int, mode: Promote) -> None:
        self.fill(number, mode, set(range(7)))
        partial = self.partials.pop(number, None)
        if partial is None:
            return
        try:
            self.store.seal(partial)
            assert number not in self.spoiled_partials or LENGTHS[number] == 0
            self.known.add(number)
        except BlockCorruptError:
            assert number in self.spoiled_partials
        finally:
            self.spoiled_partials.discard(number)
            self.store.close(partial)

    @rule(first=NUMBERS, mode=MODES)
    def seal_several(self, first: int, mode: Promote) -> None:
        for number in ALL[first:]:
            self.seal(number, mode)

    @precondition(lambda self: self.partials)
    @rule(choice=NUMBERS, for_good=st.booleans())
    def stop_filling(self, choice: int, for_good: bool) -> None:
        number = self.pick(choice, self.partials)
        partial = self.partials.pop(number)
        if for_good:
            self.store.give_up(partial)
            self.spoiled_partials.discard(number)
            assert not self.files("partial", number)
        self.store.close(partial)

    # ---- using -----------------------------------------------------------------------------------------------------

    @rule(choice=NUMBERS)
    def hold(self, choice: int) -> None:
        number = self.pick(choice, self.known)
        fd = SealedReader(self.store.paths).open(block(number), LENGTHS[number])
        if fd is None:
            return
        if number in self.spoiled:
            os.close(fd)
            return
        if number in self.held:
            os.close(self.held.pop(number))
        self.held[number] = fd

    @precondition(lambda self: self.held)
    @rule(choice=NUMBERS)
    def let_go(self, choice: int) -> None:
        os.close(self.held.pop(self.pick(choice, self.held)))

    @rule(number=NUMBERS, retire=st.booleans())
    def visit(self, number: int, retire: bool) -> None:
        (self.store.retire if retire else self.store.visited)(block(number))

    @rule(choice=NUMBERS)
    def drop(self, choice: int) -> None:
        number = self.pick(choice, self.known)
        self.store.drop(block(number))
        assert not self.store.is_sealed(block(number)) and not self.files("sealed", number)

    @rule(mode=MODES)
    def move_down(self, mode: Promote) -> None:
        before, spoiled = set(self.known), set(self.spoiled)
        self.store.move_down(mode)
        if mode is Promote.IF_SPACE:
            # A damaged block is dropped instead of moved.
            assert before - self.known <= spoiled

    @rule()
    def sync(self) -> None:
        assert self.store.sync_sealed() == []

    # ---- bad days --------------------------------------------------------------------------------------------------

    @rule(crash=st.booleans(), reboot=st.booleans())
    def restart(self, crash: bool, reboot: bool) -> None:
        if crash:
            # The files as they are this moment are what a successor finds.
            found = {path: path.read_bytes() for path in self.all_files()}
        for partial in self.partials.values():
            self.store.close(partial)
        self.partials.clear()
        self.store.on_evicted = lambda which: None
        self.stack.close()
        if crash:
            for fd in self.held.values():
                os.close(fd)
            self.held.clear()
            for path in self.all_files():
                path.unlink()
            for path, data in found.items():
                path.write_bytes(data)
        if reboot:
            self.spoiled_partials.clear()
            for config in self.configs:
                path = Path(config.path, "tier.json")
                path.write_text(json.dumps({**json.loads(path.read_text()), "boot_id": "an earlier one"}))
        self.open()
        for number in ALL:
            assert reboot is False or not self.store.is_sealed(block(number))
            if number in self.known:
                assert self.store.is_sealed(block(number)) or self.store.is_suspect(block(number))
            if not self.files("partial", number):
                self.spoiled_partials.discard(number)

    @precondition(lambda self: self.store.suspects())
    @rule(choice=NUMBERS)
    def restore_one(self, choice: int) -> None:
        self.restore(self.pick(choice, [int.from_bytes(each.key, "big") for each in self.store.suspects()]))

    def restore(self, number: int) -> None:
        if not self.store.is_suspect(block(number)):
            return
        good = self.store.restore(block(number))
        assert good == (number not in self.spoiled)
        if not good:
            self.forget(number)

    @precondition(lambda self: self.known - self.spoiled - self.held.keys())
    @rule(choice=NUMBERS, at=st.integers(0, 7 * PAGE), sums=st.booleans())
    def damage(self, choice: int, at: int, sums: bool) -> None:
        """A byte of a sealed or suspect block becomes another one."""
        number = self.pick(choice, self.known - self.spoiled - self.held.keys())
        for kind in ("sealed", "suspect"):
            for path in self.files(kind, number, ".sums" if sums else ""):
                size = path.stat().st_size
                if size:
                    _flip(path, at % size)
                    self.spoiled.add(number)

    @precondition(lambda self: self.partials.keys() - self.spoiled_partials)
    @rule(choice=NUMBERS, at=st.integers(0, 7 * PAGE), then_seal=st.booleans())
    def damage_partial(self, choice: int, at: int, then_seal: bool) -> None:
        """A byte of a page that is present, in a partial that is filled at the moment."""
        number = self.pick(choice, self.partials.keys() - self.spoiled_partials)
        partial = self.partials[number]
        for start, end in partial.present():
            offset, length = partial.page_span(start)
            for path in self.files("partial", number):
                _flip(path, offset + at % length)
                self.spoiled_partials.add(number)
            assert end > start
            break
        if then_seal:
            self.seal(number, Promote.ALWAYS)

    @rule()
    def verify_and_repair(self) -> None:
        for which, _ in self.store.blocks():
            number = int.from_bytes(which.key, "big")
            good = self.store.check(which)
            assert good == (number not in self.spoiled)
            if not good:
                self.store.drop(which)

    # ---- what always holds -----------------------------------------------------------------------------------------

    @invariant()
    def what_is_read_is_right(self) -> None:
        reader = SealedReader(self.store.paths)
        for number in ALL:
            fd = reader.open(block(number), LENGTHS[number])
            try:
                assert (fd is not None) == self.store.is_sealed(block(number))
                if fd is not None:
                    assert number in self.known
                    if number not in self.spoiled:
                        assert os.pread(fd, LENGTHS[number] + 1, 0) == content(number, LENGTHS[number])
            finally:
                if fd is not None:
                    os.close(fd)

    @invariant()
    def nothing_goes_untold(self) -> None:
        for number in self.known:
            assert self.store.is_sealed(block(number)) or self.store.is_suspect(block(number))

    @invariant()
    def held_descriptors_read_on(self) -> None:
        for number, fd in self.held.items():
            assert os.pread(fd, LENGTHS[number] + 1, 0) == content(number, LENGTHS[number])

    @invariant()
    def the_ledger_is_right(self) -> None:
        for tier, config in zip(self.store.tiers, self.configs, strict=True):
            status = tier.status()
            assert status.used_bytes >= 0 and status.reserved_bytes >= 0
            assert status.used_bytes + status.reserved_bytes <= status.capacity_bytes
            files = [path for kind in ("sealed", "suspect", "partial") for path in Path(config.path, kind).glob("00/*")]
            held = {path.name.removesuffix(".sums") for path in files}
            assert len(held) == status.sealed + status.suspect + status.partials
            filling = {block(number).filename: partial for number, partial in self.partials.items()}
            here = [partial for name, partial in filling.items() if name in held]
            assert status.reserved_bytes == sum(estimate(each.length, each.page_count) for each in here)
            at_rest = [path.stat().st_size for path in files if path.name.removesuffix(".sums") not in filling]
            assert status.used_bytes <= sum(-(-size // PAGE) * PAGE for size in at_rest)

    @invariant()
    def a_block_is_in_one_place(self) -> None:
        for number in ALL:
            assert len(self.files("sealed", number)) + len(self.files("suspect", number)) <= 1


def _flip(path: Path, at: int) -> None:
    with path.open("r+b", buffering=0) as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 0x55]))


TestStoreModel = pytest.mark.expect_warnings("damage is told")(StoreModel.TestCase)
TestStoreModel.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
