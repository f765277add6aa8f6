"""The data loader loses nothing and invents nothing, and the accelerator accounts for all time."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.training import formats
from bench.training.accelerators import TABLES
from bench.training.loader import REPOSITORY, Batch, Loader, LoadingFailed, OwnLoader, loader_for
from bench.training.plan import (
    Job,
    Kind,
    Layout,
    files_of_worker,
    first_samples,
    missing_or_twice,
    permutation,
    shards_of_worker,
    shuffled,
)
from bench.training.steps import Accelerator

DELIVERED = 600
KINDS: tuple[Kind, ...] = ("files", "tar", "tfrecord")


def contents() -> list[bytes]:
    return [random.Random(number).randbytes(100 + 37 * number) for number in range(23)]


def make_job(directory: Path, kind: Kind, *, workers: int = 3, batch: int = 4) -> Job:
    """Of 23 samples: as files, or in 5 shards."""
    samples = contents()
    step = 1 if kind == "files" else 5
    parts = [samples[start : start + step] for start in range(0, len(samples), step)]
    paths = [f"{kind}-{number}" for number in range(len(parts))]
    for path, part in zip(paths, parts, strict=True):
        packed = {
            "files": lambda part: part[0],
            "tar": lambda part: formats.write_tar((str(number), each) for number, each in enumerate(part)),
            "tfrecord": formats.write_tfrecord,
        }[kind](part)
        (directory / path).write_bytes(packed)
    layout = Layout(kind=kind, paths=paths, sizes=[[len(each) for each in part] for part in parts])
    return Job(
        layout=layout,
        root=str(directory),
        seed=7,
        batch=batch,
        workers=workers,
        prefetch=2,
        delivered=DELIVERED,
        buffer=6,
    )


def orders(loader: Loader, epochs: int) -> list[list[list[int]]]:
    return [[batch.ids for batch in loader.epoch(number)] for number in range(1, epochs + 1)]


def flat(batches: list[list[int]]) -> list[int]:
    return [each for batch in batches for each in batch]


@given(st.integers(0, 200), st.integers(1, 9), st.integers(1, 12), st.integers(0, 3), st.integers(1, 5))
def test_workers_share_an_epoch_of_files(samples: int, workers: int, batch: int, seed: int, epoch: int) -> None:
    layout = Layout(kind="files", paths=[""] * samples, sizes=[[1]] * samples)
    job = Job(layout=layout, root="", seed=seed, batch=batch, workers=workers, prefetch=1, delivered=1)
    parts = [list(files_of_worker(job, epoch, worker)) for worker in range(workers)]
    assert missing_or_twice([each for part in parts for each in part], samples) == ""
    in_turn = [part[start : start + batch] for start in range(0, samples + batch, batch) for part in parts]
    assert flat(in_turn) == permutation(seed, epoch, samples)


@given(st.lists(st.integers(1, 9), max_size=20), st.integers(1, 9), st.integers(1, 30), st.integers(1, 5))
def test_workers_share_an_epoch_of_shards(shards: list[int], workers: int, buffer: int, epoch: int) -> None:
    layout = Layout(kind="tar", paths=[""] * len(shards), sizes=[[1] * count for count in shards])
    job = Job(layout=layout, root="", seed=1, batch=1, workers=workers, prefetch=1, delivered=1, buffer=buffer)
    first, ids = first_samples(layout), []
    for worker in range(workers):
        mine = shards_of_worker(job, epoch, worker)
        stream = (first[shard] + place for shard in mine for place in range(shards[shard]))
        ids += list(shuffled(stream, buffer, f"{epoch}/{worker}"))
    assert missing_or_twice(ids, sum(shards)) == ""


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    made = {(seed, epoch): tuple(permutation(seed, epoch, 50)) for seed in range(3) for epoch in range(1, 4)}
    assert len(set(made.values())) == 9 and tuple(range(50)) not in made.values()
    assert list(shuffled(range(50), 10, "a")) != list(range(50))


def test_what_is_lost_or_comes_twice_is_told() -> None:
    assert missing_or_twice([2, 0, 1], 3) == ""
    assert missing_or_twice([0, 0, 2], 3) == "of 3 samples 1 were lost and 1 came more than once"
    assert missing_or_twice([0, 1, 2, 3], 3) != ""


class FakeClock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


@given(
    st.lists(st.tuples(st.floats(0, 10), st.integers(1, 50)), min_size=1, max_size=20),
    st.floats(0.1, 1e4),
    st.floats(0, 0.01),
)
def test_an_accelerator_computes_or_stalls(batches: list[tuple[float, int]], rate: float, late: float) -> None:
    """`late`: that each sleep takes longer than it should."""
    clock = FakeClock()

    def loaded() -> Iterator[Batch]:
        for wait, count in batches:
            clock.advance(wait)
            yield Batch([0] * count, 3 * count, None)

    began = clock.now
    epoch = Accelerator(rate, clock, lambda seconds: clock.advance(seconds + late)).train(loaded())
    samples = sum(count for _, count in batches)
    assert (len(epoch.ids), epoch.steps, epoch.bytes_read) == (samples, len(batches), 3 * samples)
    assert epoch.compute_s == pytest.approx(samples / rate)
    assert epoch.seconds == pytest.approx(clock.now - began, abs=1e-6)
    waits = sum(wait for wait, _ in batches)
    assert waits - 1e-6 <= epoch.stall_s <= waits + len(batches) * (late + 1e-6) + 1e-6
    assert epoch.utilisation == pytest.approx(epoch.compute_s / (epoch.compute_s + epoch.stall_s))
    assert epoch.samples_per_s == pytest.approx(rate * epoch.utilisation)
    assert 0 < epoch.utilisation <= 1


def test_each_speed_has_its_source() -> None:
    """What was published, so that nobody changes it in passing."""
    published = {
        name: {each: round(speed.samples_per_s, 1) for each, speed in table.items()} for name, table in TABLES.items()
    }
    assert published == {
        "resnet": {"P100": 219, "V100": 367, "V100-amp": 1200, "A100": 919.5, "A100-amp": 2470, "H100": 1785.7},
        "unet3d": {"V100": 2.9, "A100": 11.0, "H100": 21.7},
        "cosmoflow": {"V100": 106.8, "A100": 181.5, "H100": 285.7},
    }
    assert all(speed.source.startswith("https://") for table in TABLES.values() for speed in table.values())


@pytest.mark.parametrize("kind", KINDS)
def test_our_loader_delivers_each_sample_once(tmp_path: Path, kind: Kind) -> None:
    samples = contents()
    job = make_job(tmp_path, kind)
    with OwnLoader(job) as loader:
        for number in (1, 2):
            ids, read = [], 0
            for batch in loader.epoch(number):
                for place, each in enumerate(batch.ids):
                    expected = samples[each][:DELIVERED]
                    assert bytes(batch.content.tolist()[place][: len(expected)]) == expected, (number, each)
                ids += batch.ids
                read += batch.bytes_read
            assert missing_or_twice(ids, len(samples)) == ""
            assert read == sum(map(len, samples))


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_is_decided_by_the_seed(tmp_path: Path, kind: Kind) -> None:
    job = make_job(tmp_path, kind)
    with OwnLoader(job) as loader, OwnLoader(job) as other:
        first, second = orders(loader, 2)
        assert orders(other, 2) == [first, second]
    assert first != second
    if kind == "files":
        assert flat(first) == permutation(7, 1, 23)


def test_an_epoch_that_was_left_does_not_disturb_the_next(tmp_path: Path) -> None:
    job = make_job(tmp_path, "tar")
    with OwnLoader(job) as loader:
        left = loader.epoch(1)
        next(left)
        left.close()
        after = [batch.ids for batch in loader.epoch(2)]
    with OwnLoader(job) as loader:
        assert orders(loader, 2)[1] == after


def test_nothing_is_read_of_synthetic_input(tmp_path: Path) -> None:
    job = make_job(tmp_path, "files")
    layout = msgspec.structs.replace(job.layout, kind="synthetic")
    with OwnLoader(msgspec.structs.replace(job, layout=layout, root="/nowhere")) as loader:
        batches = list(loader.epoch(1))
    assert flat([batch.ids for batch in batches]) == permutation(7, 1, 23)
    assert sum(batch.bytes_read for batch in batches) == 0


def test_what_cannot_be_read_is_told(tmp_path: Path) -> None:
    job = make_job(tmp_path, "files")
    (tmp_path / "files-3").write_bytes(b"short")
    with OwnLoader(job) as loader, pytest.raises(LoadingFailed, match="files-3 has 5 bytes instead of 211"):
        orders(loader, 1)
    (tmp_path / "files-3").unlink()
    with OwnLoader(job) as loader, pytest.raises(LoadingFailed, match=r"No such file or directory: .*files-3"):
        orders(loader, 1)
    job = make_job(tmp_path, "tar")
    (tmp_path / "tar-0").write_bytes((tmp_path / "tar-4").read_bytes())
    with OwnLoader(job) as loader, pytest.raises(LoadingFailed, match="tar-0"):
        orders(loader, 1)


def children() -> set[int]:
    return {int(each) for each in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()}


def test_a_worker_that_dies_is_told_and_none_is_left(tmp_path: Path) -> None:
    before = children()
    with OwnLoader(make_job(tmp_path, "files")) as loader:
        workers = children() - before
        assert len(workers) == 3
        os.kill(min(workers), signal.SIGKILL)
        with pytest.raises(LoadingFailed, match="has ended"):
            orders(loader, 2)
    assert not children() - before


def test_workers_end_with_a_killed_trainer(tmp_path: Path) -> None:
    (tmp_path / "job").write_bytes(msgspec.json.encode(make_job(tmp_path, "files")))
    script = f"""
import msgspec, pathlib, time
from bench.training.loader import OwnLoader
from bench.training.plan import Job
with OwnLoader(msgspec.json.decode(pathlib.Path({str(tmp_path / "job")!r}).read_bytes(), type=Job)):
    print("started", flush=True)
    time.sleep(60)
"""
    trainer = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=REPOSITORY)
    try:
        assert trainer.stdout is not None and trainer.stdout.readline() == b"started\n"
        workers = [int(each) for each in Path(f"/proc/{trainer.pid}/task/{trainer.pid}/children").read_text().split()]
        assert len(workers) == 3
    finally:
        trainer.kill()
        trainer.communicate()
    give_up = time.monotonic() + 60
    while any(is_running(each) for each in workers) and time.monotonic() < give_up:
        time.sleep(0.01)
    assert not any(is_running(each) for each in workers)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    except FileNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_pytorch_has_the_same_batches_in_the_same_order(tmp_path: Path, kind: Kind) -> None:
    pytest.importorskip("torch")
    job = make_job(tmp_path, kind, workers=2)
    with OwnLoader(job) as own, loader_for(job, "torch") as theirs:
        assert orders(own, 2) == orders(theirs, 2)
    with pytest.raises(LoadingFailed, match="instead of"), loader_for(job, "torch") as theirs:
        for each in tmp_path.iterdir():
            each.write_bytes(formats.write_tar([("short", b"")]) if kind == "tar" else formats.write_tfrecord([b""]))
        orders(theirs, 1)


@pytest.mark.slow
def test_the_real_model_is_resnet_50() -> None:
    """25,557,032 parameters, as torchvision's has."""
    torch = pytest.importorskip("torch")
    from bench.training.resnet50 import resnet50

    model = resnet50().eval()
    assert sum(each.numel() for each in model.parameters()) == 25_557_032
    with torch.no_grad():
        assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 1000)


@pytest.mark.slow
def test_real_training_learns_from_each_input(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from bench.training.real import Input, RealJob, train

    job = msgspec.structs.replace(make_job(tmp_path, "files", workers=1, batch=6), delivered=224 * 224 * 3)
    synthetic = msgspec.structs.replace(job, layout=msgspec.structs.replace(job.layout, kind="synthetic"))
    inputs = [Input(name="files", job=job), Input(name="synthetic", job=synthetic)]
    trained = list(train(RealJob(inputs=inputs, steps=4, side=64, parent=os.getppid())))
    assert [(each.name, each.steps, each.images) for each in trained] == [("files", 4, 23), ("synthetic", 4, 23)]
    assert all(each.compute_s > 0 and each.stall_s > 0 for each in trained)
