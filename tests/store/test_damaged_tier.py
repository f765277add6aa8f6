"""Files of a tier that are damaged, foreign, or no files at all: what can be used is used, and the rest harms nobody.

Nothing wrong is read, nothing waits for ever, and what cannot be understood is an error that names it.
"""

from __future__ import annotations

import codecs
import os
import shutil
import signal
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from cachefs.model import BlockCorruptError, BlockMissingError, CapacityError, TierError
from cachefs.policy import Promote
from cachefs.store import Store, TierConfig, open_store, page_checksum
from cachefs.testing.blocks import CLUSTER, GEOMETRY, PAGE, block, content, pages, read, seal, some

LENGTH = 4 * PAGE + 100
WAITED_S = 120
HEALTHY = (1, 2)
"""Blocks beside the damaged one, which is 0."""

Damage = Callable[[Path, Path], None]
"""What becomes of a file; the other one is its counterpart of a healthy block."""


def gone(path: Path, other: Path) -> None:
    path.unlink()


def emptied(path: Path, other: Path) -> None:
    path.write_bytes(b"")


def cut_off(path: Path, other: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def longer(path: Path, other: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def a_byte_flipped(path: Path, other: Path) -> None:
    with path.open("r+b") as file:
        file.seek(path.stat().st_size - 3)
        (last,) = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([last ^ 1]))


def garbage(path: Path, other: Path) -> None:
    path.write_bytes(bytes(number * 37 % 256 for number in range(path.stat().st_size)))


def foreign(path: Path, other: Path) -> None:
    path.write_bytes(other.read_bytes())


def replaced(path: Path, other: Path) -> None:
    data = other.read_bytes()
    path.unlink()
    path.write_bytes(data)


def a_symlink(path: Path, other: Path) -> None:
    path.unlink()
    path.symlink_to(other)


def a_fifo(path: Path, other: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def an_empty_directory(path: Path, other: Path) -> None:
    path.unlink()
    path.mkdir()


def a_full_directory(path: Path, other: Path) -> None:
    an_empty_directory(path, other)
    (path / "precious").write_bytes(b"somebody's")


DAMAGES = [
    *(gone, emptied, cut_off, longer, a_byte_flipped, garbage, foreign, replaced),
    *(a_symlink, a_fifo, an_empty_directory, a_full_directory),
]
damages = pytest.mark.parametrize("damage", DAMAGES)
which_file = pytest.mark.parametrize("suffix", ["", ".sums"], ids=["data", "sums"])


@pytest.fixture(autouse=True)
def nothing_waits_for_ever() -> Iterator[None]:
    def too_long(number: int, frame: object) -> None:
        raise TimeoutError("it waits for ever")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(WAITED_S)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def two_tiers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Made once: a tier has 768 directories."""
    directory = tmp_path_factory.mktemp("tiers")
    return directory / "tier", directory / "lower"


@pytest.fixture
def config(two_tiers: tuple[Path, Path]) -> TierConfig:
    """An empty tier."""
    for tier in two_tiers:
        for path in (*tier.glob("tier.json*"), *tier.glob("*/00/*")):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
    return TierConfig("ssd", str(two_tiers[0]), 64 * PAGE)


@pytest.fixture
def lower(two_tiers: tuple[Path, Path]) -> TierConfig:
    return TierConfig("ssd", str(two_tiers[1]), 64 * PAGE)


@contextmanager
def opened(config: TierConfig) -> Iterator[Store]:
    with open_store([config], GEOMETRY, CLUSTER) as store:
        yield store


def file_of(config: TierConfig, kind: str, number: int, suffix: str) -> Path:
    name = block(number).filename
    return Path(config.path, kind, name[:2], name + suffix)


def served(store: Store, number: int) -> bytes | None:
    """What a mount gets, and the worker does when that fails."""
    which = block(number)
    if store.is_suspect(which):
        store.restore(which)
    if not store.is_sealed(which):
        return None
    found = read(store.paths, which, LENGTH)
    if found is None:
        store.drop(which)
    return found


def is_right(store: Store, number: int, data: bytes | None) -> None:
    """It can be read, dropped if it is damaged, and made again."""
    assert served(store, number) in (data, None)
    if not store.is_sealed(block(number)):
        seal(store, block(number), content(number, LENGTH))
    assert served(store, number) == content(number, LENGTH)


def make(config: TierConfig) -> None:
    with opened(config) as store:
        for number in (0, *HEALTHY):
            seal(store, block(number), content(number, LENGTH))


def another_boot(config: TierConfig) -> None:
    path = Path(config.path, "tier.json")
    path.write_text(path.read_text().replace('"boot_id": "', '"boot_id": "another '))


def check_after(config: TierConfig, path: Path, damage: Damage, seen: bytes | None) -> None:
    """Open the tier: all is well with what is healthy, and with the damaged block after it was looked at."""
    if damage is a_full_directory:
        with pytest.raises(TierError, match=path.name), opened(config):
            pass
        assert (path / "precious").exists()
        (path / "precious").unlink()
    with opened(config) as store:
        for number in HEALTHY:
            assert served(store, number) == content(number, LENGTH)
        assert served(store, 0) in (content(0, LENGTH), None, seen)
        if store.is_sealed(block(0)) and not store.check(block(0)):
            store.drop(block(0))
        is_right(store, 0, content(0, LENGTH))
        for number in HEALTHY:
            assert store.check(block(number)) and served(store, number) == content(number, LENGTH)


@damages
@which_file
def test_a_sealed_block_found_at_the_start(config: TierConfig, suffix: str, damage: Damage) -> None:
    make(config)
    path = file_of(config, "sealed", 0, suffix)
    damage(path, file_of(config, "sealed", 1, suffix))
    # Within one boot what is sealed is believed until it is looked at.
    same_length = not suffix and path.is_file() and path.stat().st_size == LENGTH
    check_after(config, path, damage, path.read_bytes() if same_length and not path.is_symlink() else None)


@pytest.mark.expect_warnings("what was damaged is told")
@damages
@which_file
def test_a_block_of_an_earlier_boot(config: TierConfig, suffix: str, damage: Damage) -> None:
    make(config)
    path = file_of(config, "sealed", 0, suffix)
    damage(path, file_of(config, "sealed", 1, suffix))
    another_boot(config)
    if damage is a_full_directory:
        with pytest.raises(TierError, match=path.name), opened(config):
            pass
        path = file_of(config, "suspect", 0, suffix)
    check_after(config, path, damage, None)


@damages
@which_file
def test_a_sealed_block_while_it_is_in_use(config: TierConfig, suffix: str, damage: Damage) -> None:
    make(config)
    with opened(config) as store:
        path = file_of(config, "sealed", 0, suffix)
        damage(path, file_of(config, "sealed", 1, suffix))
        if damage is a_full_directory:
            (path / "precious").unlink()
        assert not store.check(block(0))
        store.drop(block(0))
        assert served(store, 0) is None
        for number in HEALTHY:
            assert served(store, number) == content(number, LENGTH)
        if not path.is_dir():
            is_right(store, 0, None)


@damages
@which_file
def test_a_partial_found_at_the_start(config: TierConfig, suffix: str, damage: Damage) -> None:
    data = pages(content(0, LENGTH))
    with opened(config) as store:
        for number in (0, 1):
            partial = some(store.open_partial(block(number), LENGTH))
            for index in (1, 4):
                page = pages(content(number, LENGTH))[index]
                partial.write_page(index, page, page_checksum(page))
            store.close(partial)
        seal(store, block(2), content(2, LENGTH))
    path = file_of(config, "partial", 0, suffix)
    damage(path, file_of(config, "partial", 1, suffix))
    if damage is a_full_directory:
        with pytest.raises(TierError, match=path.name), opened(config):
            pass
        (path / "precious").unlink()
    with opened(config) as store:
        for _ in range(2):
            partial = some(store.open_partial(block(0), LENGTH))
            for index, page in enumerate(data):
                if not partial.recall(index):
                    partial.write_page(index, page, page_checksum(page))
            try:
                store.seal(partial)
                break
            except BlockCorruptError:
                # What was read back is not what was written: begun anew.
                continue
            finally:
                store.close(partial)
        assert served(store, 0) == content(0, LENGTH) and store.check(block(0))
        assert served(store, 2) == content(2, LENGTH)
        partial = some(store.open_partial(block(1), LENGTH))
        assert partial.recall(1) and partial.recall(4) and partial.present() == [(1, 2), (4, 5)]
        store.close(partial)


@pytest.mark.parametrize("kind", ["sealed", "partial", "suspect"])
def test_what_is_not_ours_is_removed_if_that_loses_nothing(config: TierConfig, kind: str) -> None:
    make(config)
    fan = Path(config.path, kind, "00")
    fan.mkdir(parents=True, exist_ok=True)  # there are those that something went to, of whatever test
    long = "0" * 255
    (fan / "notes.txt").write_bytes(b"x")
    (fan / long).write_bytes(b"x")
    (Path(os.fsdecode(bytes(fan) + b"/\xff\xfe"))).write_bytes(b"x")
    (fan / "link").symlink_to("/etc/passwd")
    os.mkfifo(fan / "fifo")
    (fan / "directory").mkdir()
    with opened(config) as store:
        for number in (0, *HEALTHY):
            assert served(store, number) == content(number, LENGTH)
    assert len(list(fan.iterdir())) == (6 if kind == "sealed" else 0)
    assert Path("/etc/passwd").exists()


def test_a_directory_with_something_in_it_is_left_and_told(config: TierConfig) -> None:
    make(config)
    directory = Path(config.path, "sealed", "00", "photos")
    directory.mkdir(parents=True)
    (directory / "precious").write_bytes(b"somebody's")
    with pytest.raises(TierError, match="sealed/00/photos"), opened(config):
        pass
    assert (directory / "precious").exists()


def open_it(config: TierConfig) -> None:
    with opened(config):
        pass


def contents_of(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:20]),
        lambda path: path.write_bytes(b"\x00\xff" * 50),
        lambda path: path.write_text("[]"),
        lambda path: path.write_text('{"format": "1", "cluster_id": 5, "boot_id": null}'),
        lambda path: path.write_text('{"format": 99, "cluster_id": "test", "boot_id": "x"}'),
        lambda path: path.write_text('{"format": 99, "elsewhere": []}'),
        lambda path: path.write_text('{"format": 1, "cluster_id": "another", "boot_id": "x"}'),
        lambda path: path.write_bytes(b'{"format": 1, "cluster_id": "\xff\xfe", "boot_id": "x"}'),
        lambda path: path.write_text('{"format": 1, "cluster_id": "test", "boot_id": "x", "more": ' + "[" * 50_000),
        lambda path: a_symlink(path, Path("/etc/hostname")),
        lambda path: a_fifo(path, path),
        lambda path: an_empty_directory(path, path),
    ],
    ids=[
        *("empty", "cut off", "garbage", "list", "types", "newer", "quite another", "foreign", "not utf-8", "too deep"),
        *("symlink", "fifo", "directory"),
    ],
)
def test_a_tier_file_that_is_none(config: TierConfig, spoil: Callable[[Path], None]) -> None:
    make(config)
    path = Path(config.path, "tier.json")
    spoil(path)
    before = sorted(Path(config.path).rglob("*"))
    with pytest.raises(TierError, match="belongs to cluster" if b"another" in contents_of(path) else str(path)):
        open_it(config)
    assert read([config.path], block(1), LENGTH) is None, "nobody vouches for it"
    assert sorted(Path(config.path).rglob("*")) == before, "nothing was touched"
    if path.is_dir():
        path.rmdir()
    else:
        path.unlink()
    # As its message says: without it, all is verified again.
    with opened(config) as store:
        for number in (0, *HEALTHY):
            assert store.is_suspect(block(number)) and served(store, number) == content(number, LENGTH)


def test_a_newer_format_is_not_called_damaged(config: TierConfig) -> None:
    """To remove the file would be the wrong advice: going back to the newer version keeps everything."""
    make(config)
    Path(config.path, "tier.json").write_text('{"format": 2, "owner": {"cluster": "test"}}')
    with pytest.raises(TierError, match="has format 2; this version reads format 1"), opened(config):
        pass


def test_what_an_unfinished_start_left_in_the_way_of_the_tier_file(config: TierConfig) -> None:
    make(config)
    path = Path(config.path, "tier.json.new")
    for stranger in (emptied, a_byte_flipped, a_symlink, a_fifo, an_empty_directory):
        path.write_bytes(b"half of it")
        stranger(path, Path("/etc/hostname"))
        another_boot(config)
        with opened(config) as store:
            assert served(store, 1) == content(1, LENGTH)
        assert not path.exists() and Path("/etc/hostname").is_file()
    path.mkdir()
    (path / "precious").write_bytes(b"somebody's")
    another_boot(config)
    with pytest.raises(TierError, match=r"tier\.json\.new"), opened(config):
        pass
    assert (path / "precious").exists()


@pytest.mark.parametrize("name", ["sealed", "partial", "suspect", "staging", "sealed/00", "partial/7f", "suspect/ff"])
@pytest.mark.parametrize("stranger", ["file", "symlink", "fifo"])
def test_a_directory_of_ours_that_is_none_is_named(
    config: TierConfig, name: str, stranger: str, tmp_path: Path
) -> None:
    make(config)
    path = Path(config.path, name)
    path.mkdir(parents=True, exist_ok=True)
    path.rename(tmp_path / "aside")
    if stranger == "file":
        path.write_bytes(b"x")
    elif stranger == "symlink":
        path.symlink_to(tmp_path / "aside")
    else:
        os.mkfifo(path)
    with pytest.raises(TierError, match=str(path)), opened(config):
        pass
    assert os.path.lexists(path)
    path.unlink()
    (tmp_path / "aside").rename(path)
    with opened(config) as store:
        for number in (0, *HEALTHY):
            assert served(store, number) == content(number, LENGTH)


NOBODY = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="becoming somebody else needs root")


def as_nobody(work: Callable[[], None]) -> None:
    """In another process: root may read everything."""
    codecs.lookup("ascii")  # imported when it is first needed, from where nobody else may read
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0


@pytest.fixture
def config_of_nobody() -> Iterator[TierConfig]:
    directory = tempfile.mkdtemp()
    os.chmod(directory, 0o777)
    yield TierConfig("ssd", os.path.join(directory, "tier"), 64 * PAGE)
    shutil.rmtree(directory)


@needs_root
@pytest.mark.parametrize("name", ["tier.json", "sealed", "partial/00", "sealed/80"])
def test_what_may_not_be_read_is_named(config_of_nobody: TierConfig, name: str) -> None:
    config = config_of_nobody

    def work() -> None:
        make(config)
        path = Path(config.path, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.mkdir()
        mode = path.stat().st_mode
        path.chmod(0)
        with pytest.raises(TierError, match=str(path)), opened(config):
            pass
        path.chmod(mode)
        with opened(config) as store:
            for number in (0, *HEALTHY):
                assert served(store, number) == content(number, LENGTH)

    as_nobody(work)


@needs_root
@which_file
@pytest.mark.parametrize("running", [True, False], ids=["in use", "at the start"])
def test_a_block_that_may_not_be_read_is_damaged(config_of_nobody: TierConfig, suffix: str, running: bool) -> None:
    config = config_of_nobody

    def work() -> None:
        make(config)
        path = file_of(config, "sealed", 0, suffix)
        if not running:
            path.chmod(0)
        with opened(config) as store:
            path.chmod(0)
            assert not store.check(block(0))
            assert served(store, 0) in (None, content(0, LENGTH))
            store.drop(block(0))
            is_right(store, 0, None)
            for number in HEALTHY:
                assert served(store, number) == content(number, LENGTH)

    as_nobody(work)


def test_checksums_of_any_length_cost_what_they_should(config: TierConfig) -> None:
    """A sparse file of a terabyte would take all memory if it was read."""
    make(config)
    with opened(config) as store:
        os.truncate(file_of(config, "sealed", 0, ".sums"), 1 << 40)
        assert not store.check(block(0))
        store.drop(block(0))
        is_right(store, 0, None)


# ---- making room ---------------------------------------------------------------------------------------------------


@damages
@which_file
def test_evicting_what_is_damaged(config: TierConfig, suffix: str, damage: Damage) -> None:
    make(config)
    with opened(config) as store:
        path = file_of(config, "sealed", 0, suffix)
        damage(path, file_of(config, "sealed", 1, suffix))
        if damage is a_full_directory:
            (path / "precious").unlink()
        # All the room there is: everything has to go.
        partials = [some(store.open_partial(block(number), 15 * PAGE)) for number in range(10, 14)]
        assert store.blocks() == [] and store.tiers[0].status().used_bytes == 0
        for partial in partials:
            store.close(partial)
        assert not os.path.lexists(path)
        is_right(store, 0, None)


@pytest.mark.expect_warnings("what is damaged is told")
@damages
@which_file
def test_moving_down_what_is_damaged(config: TierConfig, lower: TierConfig, suffix: str, damage: Damage) -> None:
    """It does not arrive below, and the disk below is not blamed for it."""
    upper = TierConfig("ssd", config.path, 19 * PAGE)
    make(upper)
    with open_store([upper, lower], GEOMETRY, CLUSTER) as store:
        path = file_of(upper, "sealed", 0, suffix)
        damage(path, file_of(upper, "sealed", 1, suffix))
        assert store.move_down(Promote.IF_SPACE) > 0
        assert store.admits(LENGTH, Promote.IF_SPACE), "both tiers are in use"
        if damage is longer and not suffix:
            # Every page of it is right, and only those are copied.
            assert served(store, 0) == content(0, LENGTH)
            return
        assert not store.tiers[1].is_sealed(block(0))
        for number in HEALTHY:
            assert served(store, number) == content(number, LENGTH)
        for which, _ in store.blocks():
            if not store.check(which):
                store.drop(which)
        assert served(store, 0) is None
        for number in HEALTHY:
            assert served(store, number) == content(number, LENGTH)


@pytest.mark.expect_warnings("a directory that stays is told")
def test_a_full_directory_in_the_place_of_a_block_in_use_stays(config: TierConfig) -> None:
    """It is neither removed nor the end of the worker: what goes in there fails, the rest is as ever."""
    make(config)
    with opened(config) as store:
        path = file_of(config, "sealed", 0, "")
        a_full_directory(path, path)
        assert not store.check(block(0)) and served(store, 0) is None
        assert not store.is_sealed(block(0))
        with pytest.raises(OSError):
            seal(store, block(0), content(0, LENGTH))
        for number in HEALTHY:
            assert served(store, number) == content(number, LENGTH)
        is_right(store, 3, None)
    assert (path / "precious").exists()


@which_file
@damages
def test_a_partial_whose_files_were_replaced_is_never_sealed_wrong(
    config: TierConfig, suffix: str, damage: Damage
) -> None:
    """What was verified is what gets the name."""
    make(config)
    with opened(config) as store:
        data = content(7, LENGTH)
        partial = some(store.open_partial(block(7), LENGTH))
        for index, page in enumerate(pages(data)):
            partial.write_page(index, page, page_checksum(page))
        path = file_of(config, "partial", 7, suffix)
        damage(path, file_of(config, "sealed", 1, suffix))
        if damage is a_full_directory:
            (path / "precious").unlink()
        with suppress(BlockCorruptError, CapacityError, OSError):
            store.seal(partial)
        store.close(partial)
        assert served(store, 7) in (data, None)
        if store.is_sealed(block(7)) and not store.check(block(7)):
            store.drop(block(7))
        is_right(store, 7, data)


def test_what_goes_before_it_is_moved_is_missing_and_not_damaged(config: TierConfig, lower: TierConfig) -> None:
    make(config)
    with open_store([config, lower], GEOMETRY, CLUSTER) as store:
        store.drop(block(0))
        with pytest.raises(BlockMissingError):
            store.tiers[0].copy_to(block(0), store.tiers[1], evict=False)
