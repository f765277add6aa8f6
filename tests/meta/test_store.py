"""The namespace in SQL: what names point at after listings, single looks, crashes and changes."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from cachefs.meta import Found, Inode, MetaStore, Volume, open_meta_store
from cachefs.model import (
    NO_INO,
    ROOT_INO,
    BlockId,
    ConfigError,
    ContentKey,
    Ino,
    Kind,
    ObjectInfo,
    content_key,
)

ORIGIN = "s3://endpoint/bucket"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[MetaStore]:
    with open_meta_store(str(tmp_path)) as store:
        store.attach([("/", ORIGIN)])
        yield store


def file(name: str, tag: str = "e1", size: int = 10, mtime_ns: int = 5) -> Found:
    return Found(name, ObjectInfo(name, Kind.FILE, size, mtime_ns, tag))


def directory(name: str) -> Found:
    return Found(name, ObjectInfo(name, Kind.DIRECTORY, 0, 0, ""))


def root(store: MetaStore) -> Inode:
    inode = store.get(ROOT_INO)
    assert inode is not None
    return inode


def list_all(store: MetaStore, found: list[Found]) -> None:
    listing = store.begin_listing()
    store.add_listed(root(store), ORIGIN, found, listing)
    finish_listing(store, listing, 1)


def finish_listing(store: MetaStore, listing: int, started_ns: int) -> None:
    after: Ino | None = NO_INO
    while after is not None:
        after, _ = store.drop_unseen(ROOT_INO, listing, after, 2)
    store.end_listing(ROOT_INO, started_ns)


def names(store: MetaStore) -> dict[str, Ino]:
    return {entry.name: entry.attr.ino for entry in store.children(ROOT_INO)}


def test_listing_names_contents(store: MetaStore) -> None:
    list_all(store, [file("a"), directory("d")])
    a = store.child(ROOT_INO, "a")
    d = store.child(ROOT_INO, "d")
    assert a is not None and a.attr.key == content_key(f"{ORIGIN}/a", "e1", 10) and a.attr.mtime_ns == 5
    assert d is not None and d.attr.is_dir and d.attr.key == b""
    assert store.path_below_mount(a) == "a"


def test_same_content_keeps_its_inode_even_with_another_mtime(store: MetaStore) -> None:
    list_all(store, [file("a")])
    before = names(store)
    list_all(store, [file("a", mtime_ns=77)])
    assert names(store) == before
    a = store.get(before["a"])
    assert a is not None and a.attr.mtime_ns == 77


@pytest.mark.parametrize("changed", [file("a", tag="e2"), file("a", size=11), directory("a")])
def test_changed_content_gets_a_new_inode_and_the_old_stays_resolvable(store: MetaStore, changed: Found) -> None:
    list_all(store, [file("a")])
    old = names(store)["a"]
    list_all(store, [changed])
    new = names(store)["a"]
    assert new > old
    superseded = store.get(old)
    assert superseded is not None and not superseded.live and superseded.tag == "e1"


def test_content_without_a_tag_is_new_at_every_look_and_has_no_key(store: MetaStore) -> None:
    list_all(store, [file("a", tag="")])
    first = store.child(ROOT_INO, "a")
    list_all(store, [file("a", tag="")])
    second = store.child(ROOT_INO, "a")
    assert first is not None and second is not None
    assert first.attr.ino != second.attr.ino and second.attr.key == b""


def test_only_a_complete_listing_removes_names(store: MetaStore) -> None:
    list_all(store, [file("a"), file("b")])
    listing = store.begin_listing()
    store.add_listed(root(store), ORIGIN, [file("a")], listing)
    assert set(names(store)) == {"a", "b"}
    finish_listing(store, listing, 2)
    assert set(names(store)) == {"a"}


def test_names_that_are_gone_go_in_portions_and_what_is_found_meanwhile_stays(store: MetaStore) -> None:
    list_all(store, [file(f"{number:02}") for number in range(25)])
    listing = store.begin_listing()
    store.add_listed(root(store), ORIGIN, [file(f"{number:02}") for number in range(0, 25, 5)], listing)
    after, gone = store.drop_unseen(ROOT_INO, listing, NO_INO, 10)
    assert gone == ["01", "02", "03", "04", "06", "07", "08", "09"]
    assert set(names(store)) == {"00", "05"} | {f"{number:02}" for number in range(10, 25)}
    # Not complete yet: who asks is not told that this is all.
    assert root(store).listed_ns == 1
    store.put_child(root(store), ORIGIN, file("13"))
    while after is not None:
        after, gone = store.drop_unseen(ROOT_INO, listing, after, 10)
        assert len(gone) <= 10 and "13" not in gone
    assert set(names(store)) == {"00", "05", "10", "13", "15", "20"}


def test_a_name_that_appears_behind_a_running_listing_is_kept(store: MetaStore) -> None:
    listing = store.begin_listing()
    store.add_listed(root(store), ORIGIN, [file("b")], listing)
    store.put_child(root(store), ORIGIN, file("a"))
    finish_listing(store, listing, 1)
    assert set(names(store)) == {"a", "b"}


@pytest.mark.parametrize("order", [[file("x"), directory("x")], [directory("x"), file("x")]])
def test_a_directory_shadows_an_object_of_the_same_name(store: MetaStore, order: list[Found]) -> None:
    listing = store.begin_listing()
    for found in order:
        store.add_listed(root(store), ORIGIN, [found], listing)
    finish_listing(store, listing, 1)
    x = store.child(ROOT_INO, "x")
    assert x is not None and x.attr.is_dir


def test_a_single_look_replaces_a_directory_that_became_an_object(store: MetaStore) -> None:
    list_all(store, [directory("x")])
    (entry,) = store.put_child(root(store), ORIGIN, file("x")).entries
    assert entry.attr.kind is Kind.FILE


def test_children_are_paged_by_inode_number(store: MetaStore) -> None:
    list_all(store, [file(f"f{index}") for index in range(25)])
    seen: list[str] = []
    after = NO_INO
    while entries := store.children(ROOT_INO, after, 10):
        seen += [entry.name for entry in entries]
        after = entries[-1].attr.ino
    assert seen == [f"f{index}" for index in range(25)]


def test_everything_survives_a_restart_and_numbers_go_on(tmp_path: Path) -> None:
    with open_meta_store(str(tmp_path)) as store:
        store.attach([("/", ORIGIN)])
        list_all(store, [file("a")])
        namespace_id, before = store.namespace_id, names(store)
    with open_meta_store(str(tmp_path)) as store:
        store.attach([("/", ORIGIN)])
        assert (store.namespace_id, names(store)) == (namespace_id, before)
        assert store.put_child(root(store), ORIGIN, file("b")).entries[0].attr.ino > before["a"]


def test_a_failed_batch_leaves_nothing(store: MetaStore) -> None:
    with pytest.raises(RuntimeError), store.batch():
        store.put_child(root(store), ORIGIN, file("a"))
        raise RuntimeError
    assert names(store) == {}


def test_two_masters_cannot_share_a_data_directory(tmp_path: Path) -> None:
    with (
        open_meta_store(str(tmp_path)),
        pytest.raises(ConfigError, match="no running master"),
        open_meta_store(str(tmp_path)),
    ):
        pass


def test_mounts_below_directories(tmp_path: Path) -> None:
    with open_meta_store(str(tmp_path)) as store:
        first, second = store.attach([("/data/a", "s3://e/a"), ("/data/b/", "s3://e/b")])
        data = store.child(ROOT_INO, "data")
        assert data is not None and [e.name for e in store.children(data.attr.ino)] == ["a", "b"]
        mounted = store.get(second.root_ino)
        assert mounted is not None and store.path_below_mount(mounted) == ""
        store.put_child(mounted, second.origin, file("x"))
        # The same again keeps everything, another origin starts afresh, and what is not given any more is gone.
        assert store.attach([("/data/b", "s3://e/b")]) == [second]
        assert store.child(second.root_ino, "x") is not None
        assert [e.name for e in store.children(data.attr.ino)] == ["b"]
        (other,) = store.attach([("/data/b", "s3://e/other")])
        assert other.mount_id not in (first.mount_id, second.mount_id) and other.root_ino != second.root_ino
        assert store.counts(other.mount_id) == (1, 0)


def test_a_mount_right_below_another_hides_what_that_one_has(tmp_path: Path) -> None:
    with open_meta_store(str(tmp_path)) as store:
        store.attach([("/", ORIGIN)])
        store.put_child(root(store), ORIGIN, file("b"))
        store.attach([("/", ORIGIN), ("/b", "s3://e/b"), ("/b/c", "s3://e/c")])
        inner = store.child(ROOT_INO, "b")
        assert inner is not None and inner.attr.is_dir and store.path_below_mount(inner) == ""
        # Neither a look nor a listing of the outer one changes it, whatever they find or miss.
        merged = store.put_child(root(store), ORIGIN, file("b"))
        assert [entry.attr.ino for entry in merged.entries] == [inner.attr.ino] and not merged.moved
        store.remove_child(ROOT_INO, "b")
        list_all(store, [file("x"), directory("b")])
        list_all(store, [file("x")])
        assert names(store) == {"b": inner.attr.ino, "x": names(store)["x"]}
        assert [entry.name for entry in store.children(inner.attr.ino)] == ["c"]
        # Without the outer ones, the innermost stays where it is.
        before = store.child(inner.attr.ino, "c")
        store.attach([("/b/c", "s3://e/c")])
        assert names(store) == {"b": inner.attr.ino} and store.child(inner.attr.ino, "c") == before
        store.attach([("/", ORIGIN)])
        assert names(store) == {}


def test_what_was_added_or_removed_by_hand_is_so_after_a_restart(tmp_path: Path) -> None:
    told = [("/", ORIGIN), ("/told", "s3://e/told")]
    with open_meta_store(str(tmp_path)) as store:
        _, second = store.attach(told)
        added = store.add_mount("/added", "s3://e/added", "s3://added", {"secret": "hush"})
        store.remove_mount(second.mount_id)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}
    with open_meta_store(str(tmp_path)) as store:
        assert [mount.path for mount in store.attach(told)] == ["/", "/added"]
        assert [tuple(each) for each in store.added_mounts()] == [
            ("/added", "s3://e/added", "s3://added", {"secret": "hush"})
        ]
        assert store.child(ROOT_INO, "told") is None and store.child(ROOT_INO, "added") is not None
        assert store.removed_mounts() == {("/told", "s3://e/told")}
        # Another store at that path is meant; and so is the same one, once the master was not told of it.
        assert [mount.path for mount in store.attach([*told[:1], ("/told", "s3://e/other")])] == [
            "/",
            "/told",
            "/added",
        ]
        assert [mount.path for mount in store.attach(told)] == ["/", "/told", "/added"]
        # What the master is told counts more than what was added.
        mounts = store.attach([*told, ("/added", "s3://e/another")])
        assert mounts[2].mount_id != added.mount_id and store.added_mounts() == []
        assert [mount.path for mount in store.attach(told)] == ["/", "/told"]
        # Added again, one that was removed is there.
        store.remove_mount(store.attach(told)[1].mount_id)
        store.add_mount("/told", "s3://e/told", "s3://told", {})
        assert store.removed_mounts() == set() and [mount.path for mount in store.attach(told)] == ["/", "/told"]


def test_a_database_of_the_first_schema_is_brought_up_to_date(tmp_path: Path) -> None:
    with open_meta_store(str(tmp_path)) as store:
        (mount,) = store.attach([("/data", ORIGIN)])
    with closing(sqlite3.connect(tmp_path / "namespace.db")) as db:
        for statement in (
            "DROP TABLE pins",
            "DROP TABLE quotas",
            "DROP TABLE volumes",
            "DROP TABLE removed_mounts",
            *(f"ALTER TABLE mounts DROP COLUMN {column}" for column in ("by_hand", "url", "options")),
            "DROP TABLE workers",
            "DROP TABLE jobs",
            "DROP INDEX replicas_of_worker",
            "ALTER TABLE replicas DROP COLUMN epoch",
            "CREATE INDEX replicas_of_worker ON replicas (worker)",
            "DELETE FROM counters WHERE name IN ('epoch', 'job', 'quota')",
            "PRAGMA user_version = 1",
        ):
            db.execute(statement)
        db.commit()
    (tmp_path / "namespace.db").chmod(0o644)
    with open_meta_store(str(tmp_path)) as store:
        assert store.attach([("/data", ORIGIN)]) == [mount]
        assert store.added_mounts() == [] and store.removed_mounts() == set()
        assert store.register_worker("w", "", {}, 1).epoch == 1
        assert store.add_job("{}", "running").job_id == 1
        assert store.set_quota("/data", 5).quota_id == 1
        assert store.volumes("", 10) == [] and store.count_volumes() == 0
        assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}


VOLUME = Volume("vol-2", "two", "/a", "", {}, 10, True, {"key": "value"}, 7)


def test_a_database_without_volumes_gets_them_and_keeps_all_else(tmp_path: Path) -> None:
    with open_meta_store(str(tmp_path)) as store:
        (mount,) = store.attach([("/data", ORIGIN)])
        quota = store.set_quota("/data", 5)
    with closing(sqlite3.connect(tmp_path / "namespace.db")) as db:
        db.execute("DROP TABLE volumes")
        db.execute("PRAGMA user_version = 4")
        db.commit()
        old = db.execute("SELECT type, name FROM sqlite_master ORDER BY name").fetchall()
    with open_meta_store(str(tmp_path)) as store:
        assert store.attach([("/data", ORIGIN)]) == [mount] and store.quotas() == [quota]
        store.put_volume(VOLUME)
    with closing(sqlite3.connect(tmp_path / "namespace.db")) as db:
        now = db.execute("SELECT type, name FROM sqlite_master ORDER BY name").fetchall()
        assert [each for each in now if each not in old and "autoindex" not in each[1]] == [
            ("table", "volumes"),
            ("index", "volumes_of_path"),
        ]
    with open_meta_store(str(tmp_path)) as store:
        assert store.volume("vol-2") == VOLUME


def test_volumes_are_found_by_id_and_path_and_in_portions(store: MetaStore) -> None:
    other = replace(VOLUME, volume_id="vol-1", url="s3://b", options={"secret": "hush"}, sets_quota=False)
    third = replace(VOLUME, volume_id="vol-3", path="/b")
    for each in (VOLUME, other, third):
        store.put_volume(each)
    assert store.volumes("", 2) == [other, VOLUME] and store.volumes("vol-2", 2) == [third]
    assert store.volumes("vol-1x", 1) == [VOLUME]
    assert store.volumes_at("/a") == [other, VOLUME] and store.volume("vol-1") == other
    assert "hush" not in repr(other) and "s3://b" not in repr(other)
    changed = replace(VOLUME, quota_bytes=0, sets_quota=False)
    store.put_volume(changed)
    assert store.volume("vol-2") == changed and store.count_volumes() == 3
    store.remove_volume("vol-1")
    store.remove_volume("vol-1")
    assert store.volume("vol-1") is None and store.volumes_at("/a") == [changed]


def test_volumes_are_attached_in_a_directory_of_the_namespace_whatever_is_around(tmp_path: Path) -> None:
    told = [("/", ORIGIN)]
    with open_meta_store(str(tmp_path)) as store:
        (first,) = store.attach(told)
        store.add_mount("/volumes/vol-1", "s3://e/1", "s3://1", {})
        store.add_mount("/volumes/vol-2", "s3://e/2", "s3://2", {})
    with open_meta_store(str(tmp_path)) as store:
        mounts = store.attach(told)
        assert [each.path for each in mounts] == ["/", "/volumes/vol-1", "/volumes/vol-2"] and mounts[0] == first
        around = store.child(ROOT_INO, "volumes")
        assert around is not None and around.mount_id == 0
        # What the store at the root has of that name is hidden, and no listing takes it away.
        listing = store.begin_listing()
        store.add_listed(root(store), ORIGIN, [directory("volumes")], listing)
        store.drop_unseen(ROOT_INO, listing)
        assert store.child(ROOT_INO, "volumes") == around
        # Others come and go around them.
        assert [each.path for each in store.attach([])] == ["/volumes/vol-1", "/volumes/vol-2"]
        assert [each.path for each in store.attach([("/volumes", ORIGIN)])] == [
            "/volumes",
            "/volumes/vol-1",
            "/volumes/vol-2",
        ]
        mounts = store.attach(told)
        assert len(mounts) == 3
        around = store.child(ROOT_INO, "volumes")
        assert around is not None and around.mount_id == 0
        for each in mounts[1:]:
            store.remove_mount(each.mount_id)
        assert store.child(ROOT_INO, "volumes") is None
        with pytest.raises(ConfigError, match="right below it: /NAME"):
            store.attach([*told, ("/other/x", "s3://e/3")])


def test_quotas_keep_their_number_and_time_and_give_it_to_no_other(tmp_path: Path) -> None:
    with open_meta_store(str(tmp_path)) as store:
        first, second = store.set_quota("/b", 10), store.set_quota("/a", 20)
        assert (first.quota_id, second.quota_id) == (1, 2)
        changed = store.set_quota("/b", 30)
        assert changed == first._replace(limit_bytes=30)
        store.remove_quota("/a")
        store.remove_quota("/nowhere")
        assert store.quotas() == [changed]
    with open_meta_store(str(tmp_path)) as store:
        assert store.quotas() == [changed] and store.set_quota("/a", 20).quota_id == 3
        assert [each.path for each in store.quotas()] == ["/a", "/b"]


@pytest.mark.parametrize(
    "mounts", [[("data", "o")], [("/a/../b", "o")], [("/", "o"), ("/a/b", "p")], [("/a", "o"), ("/a/", "p")]]
)
def test_wrong_mounts_are_refused_and_change_nothing(tmp_path: Path, mounts: list[tuple[str, str]]) -> None:
    with open_meta_store(str(tmp_path)) as store:
        (mount,) = store.attach([("/keep", "k")])
        with pytest.raises(ConfigError, match="--mount"):
            store.attach(mounts)
        assert store.get(mount.root_ino) is not None


def test_jobs_are_kept_and_of_those_that_ended_the_last(store: MetaStore) -> None:
    jobs = [store.add_job(f"spec {number}", "running") for number in range(5)]
    assert store.jobs() == jobs and [job.job_id for job in jobs] == [1, 2, 3, 4, 5]
    ended = [job._replace(state="done", position="p", counts="c", failures="f", ended_ns=9) for job in jobs[:4]]
    for job in ended:
        store.save_job(job)
    store.forget_ended_jobs(2)
    assert store.jobs() == [*ended[2:], jobs[4]]
    assert store.add_job("", "running").job_id == 6


def test_replicas(store: MetaStore) -> None:
    one, two = (BlockId(ContentKey(bytes([n]) * 16), 0) for n in (1, 2))
    both = {"w1", "w2"}
    assert store.report("w1", 1, [(one, 5), (two, 6)], [], both) == []
    assert sorted(store.report("w2", 2, [(one, 5)], [], both)) == [("w1", one, True), ("w2", one, True)]
    assert store.holders(one) == ["w1", "w2"] and store.replica_totals() == {"w1": (2, 11), "w2": (1, 5)}
    store.report("w1", 1, [], [two], both)
    assert store.holders(two) == [] and store.replica_totals()["w1"] == (1, 5)
    # Whoever is granted a drop is no holder from then on: the other one has the last copy.
    assert store.grant_drops("w1", [one, two], {"w1"}) == ([], [])
    assert store.grant_drops("w1", [one, two], both) == ([one], [("w2", one, False)])
    assert store.grant_drops("w2", [one], both) == ([], []) and store.holders(one) == ["w2"]


def test_sums_of_whatever_was_reported_can_be_told(store: MetaStore) -> None:
    store.report("w", 1, [(BlockId(ContentKey(bytes([n]) * 16), 0), 2**63 - 1) for n in range(3)], [], ())
    assert store.replica_totals()["w"][0] == 3


def test_a_full_report_forgets_what_it_does_not_mention(store: MetaStore) -> None:
    one, two, three = (BlockId(ContentKey(bytes([n]) * 16), 0) for n in (1, 2, 3))
    alive = {"w1", "w2"}
    epoch = store.register_worker("w1", "h:1", {"rack": "r"}, 10).epoch
    store.report("w1", epoch, [(one, 5), (two, 6)], [], alive)
    store.report("w2", 0, [(one, 5), (two, 6), (three, 7)], [], alive)
    again = store.register_worker("w1", "h:2", {}, 10)
    assert again.epoch > epoch and [each.address for each in store.workers()] == ["h:2"]
    store.report("w1", again.epoch, [(two, 6), (three, 7)], [], ())
    stand = store.end_full_report("w1", again.epoch, alive)
    assert sorted(stand) == sorted(
        [("w2", one, False), *((name, block, True) for name in alive for block in (two, three))]
    )
    assert store.holders(one) == ["w2"]
    # One that counts no more: the other one holds all of that alone.
    assert sorted(store.standings("w1", {"w2"})) == [("w2", two, False), ("w2", three, False)]
    found = store.blocks_of("w2", None, 2)
    assert found == [(one, 5), (two, 6)] and store.blocks_of("w2", two, 2) == [(three, 7)]


def test_the_end_of_a_full_report_looks_at_an_index_alone(tmp_path: Path) -> None:
    """Of a million blocks, the rows themselves would be a million reads all over the database."""
    with open_meta_store(str(tmp_path)):
        pass
    with closing(sqlite3.connect(tmp_path / "namespace.db")) as db:
        query = "SELECT content_key, block_index FROM replicas WHERE worker = 'w' AND epoch < 2"
        plan = [row[3] for row in db.execute(f"EXPLAIN QUERY PLAN {query}")]
    assert plan == ["SEARCH replicas USING COVERING INDEX replicas_of_worker (worker=?)"]


NAMES = st.sampled_from(["a", "b", "c", "ü", "d.txt"])
TAGS = st.sampled_from(["e1", "e2"])


class NamespaceModel(RuleBasedStateMachine):
    """One directory against a dict: name -> (kind, tag), with everything an object store may do between two looks."""

    def __init__(self) -> None:
        super().__init__()
        import tempfile

        self.directory = tempfile.TemporaryDirectory()
        self.context = open_meta_store(self.directory.name)
        self.store = self.context.__enter__()
        self.store.attach([("/", ORIGIN)])
        self.bucket: dict[str, Found] = {}
        self.known: dict[str, Found] = {}
        self.meaning: dict[Ino, tuple[str, str]] = {}

    def teardown(self) -> None:
        self.context.__exit__(None, None, None)
        self.directory.cleanup()

    @rule(name=NAMES, tag=TAGS)
    def put(self, name: str, tag: str) -> None:
        self.bucket[name] = file(name, tag)

    @rule(name=NAMES)
    def make_directory(self, name: str) -> None:
        self.bucket[name] = directory(name)

    @rule(name=NAMES)
    def delete(self, name: str) -> None:
        self.bucket.pop(name, None)

    @rule(chunk=st.integers(1, 3))
    def listing(self, chunk: int) -> None:
        listing = self.store.begin_listing()
        found = list(self.bucket.values())
        for start in range(0, len(found), chunk):
            self.store.add_listed(root(self.store), ORIGIN, found[start : start + chunk], listing)
        finish_listing(self.store, listing, listing)
        self.known = dict(self.bucket)

    @rule()
    def listing_that_fails(self) -> None:
        listing = self.store.begin_listing()
        found = list(self.bucket.values())[:1]
        self.store.add_listed(root(self.store), ORIGIN, found, listing)
        self.known.update({each.name: each for each in found})

    @rule(name=NAMES)
    def look(self, name: str) -> None:
        if name in self.bucket:
            self.store.put_child(root(self.store), ORIGIN, self.bucket[name])
            self.known[name] = self.bucket[name]
        else:
            self.store.remove_child(ROOT_INO, name)
            self.known.pop(name, None)

    @rule()
    def restart(self) -> None:
        self.context.__exit__(None, None, None)
        self.context = open_meta_store(self.directory.name)
        self.store = self.context.__enter__()

    @invariant()
    def names_are_what_was_seen_last(self) -> None:
        entries = {entry.name: entry.attr for entry in self.store.children(ROOT_INO)}
        assert set(entries) == set(self.known)
        for name, found in self.known.items():
            assert entries[name].kind is found.info.kind

    @invariant()
    def a_number_never_changes_its_meaning(self) -> None:
        for entry in self.store.children(ROOT_INO):
            inode = self.store.get(entry.attr.ino)
            assert inode is not None
            meaning = (entry.name, inode.tag)
            assert self.meaning.setdefault(entry.attr.ino, meaning) == meaning


TestNamespaceModel = NamespaceModel.TestCase
TestNamespaceModel.settings = settings(
    max_examples=25, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
