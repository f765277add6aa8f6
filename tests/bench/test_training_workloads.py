"""Training workloads in their smallest scale, on local files and on a mount: they tell all, and it is consistent."""

from __future__ import annotations

import importlib.util
import io
import os
from pathlib import Path

import pytest

from bench.data import write_native
from bench.results import Figure, Gap
from bench.systems.base import Source
from bench.systems.registry import SYSTEMS
from bench.training import formats
from bench.workloads.base import Scale
from bench.workloads.cosmoflow import Cosmoflow
from bench.workloads.resnet import Resnet
from bench.workloads.training import Training
from bench.workloads.unet3d import Unet3d
from cachefs.fuse import probe
from cachefs.testing.fixtures import Bucket
from tests.bench.measured import Measured

WORKLOADS: list[type[Training]] = [Resnet, Unet3d, Cosmoflow]
OWN = {"loader": "own"}


@pytest.fixture(autouse=True)
def no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Local files are settled when all is on disk, and other tests write much."""
    monkeypatch.setattr(os, "sync", lambda: None)


def make_source(workload: Training, native: Path, bucket: Bucket, *, objects: bool = False) -> Source:
    """Natively; and as objects, if it says so."""
    files = workload.data().files
    write_native(native, files, 1, workload.content)
    if objects:
        bucket.put({path: (native / path).read_bytes() for path in files})
    server = bucket.server
    return Source(
        endpoint=server.endpoint,
        key=server.key,
        secret=server.secret,
        bucket=bucket.name,
        prefix=bucket.prefix.rstrip("/"),
        native=native,
        size_bytes=workload.data().size_bytes,
        files=len(files),
        traffic_url=server.metrics_url,
    )


def measured(workload: Training, system: str, source: Source, place: Path) -> Measured:
    place.mkdir()
    with SYSTEMS[system]().mounted(source, place, workload.cache_bytes()) as mounted:
        told = list(workload.measure(mounted, 0))
    return Measured(
        [each for each in told if isinstance(each, Figure)], [each for each in told if isinstance(each, Gap)]
    )


def assert_complete(workload: Training, found: Measured) -> None:
    """Each epoch of each format and one of synthetic input, in all metrics, which fit each other."""
    assert found.gaps == []
    kinds = [*workload.kinds, "synthetic"]
    epochs = {(kind, number) for kind in workload.kinds for number in range(1, workload.epochs + 1)} | {
        ("synthetic", 1)
    }
    metrics = {f"{workload.unit}_per_s", "utilisation", "stall_s", "under_store_bytes", "read_bytes"}
    rate, samples = workload.samples_per_s, sum(1 for _ in workload.sizes)
    by_epoch: dict[tuple[str, int], dict[str, float]] = {}
    for each in found.figures:
        assert each.labels["format"] in kinds and each.labels["accelerator"] == workload.chosen_accelerator
        by_epoch.setdefault((each.labels["format"], int(each.labels["epoch"])), {})[each.metric] = each.value
    assert set(by_epoch) == epochs and len({each.case for each in found.figures}) == len(epochs)
    for (kind, number), values in by_epoch.items():
        assert set(values) == metrics and min(values.values()) >= 0, (kind, number)
        assert 0 < values["utilisation"] <= 1
        assert values[f"{workload.unit}_per_s"] == pytest.approx(rate * values["utilisation"])
        assert values["stall_s"] == pytest.approx(samples / values[f"{workload.unit}_per_s"] - samples / rate)
        assert values["read_bytes"] == (0 if kind == "synthetic" else sum(workload.sizes))


@pytest.mark.parametrize("kind", WORKLOADS, ids=lambda kind: kind.name)
def test_every_epoch_on_local_files_is_told(kind: type[Training], s3_bucket: Bucket, tmp_path: Path) -> None:
    workload = kind(Scale.SMOKE, OWN)
    source = make_source(workload, tmp_path / "native", s3_bucket)
    found = measured(workload, "native", source, tmp_path / "place")
    assert_complete(workload, found)
    assert set(found.of("under_store_bytes").values()) == {0.0}


@pytest.mark.skipif(not probe().can_mount, reason="nothing can be mounted here")
def test_every_epoch_on_a_mount_is_told(s3_bucket: Bucket, tmp_path: Path) -> None:
    """What the under-store sends: each byte once, in the cold epoch."""
    workload = Resnet(Scale.SMOKE, {"format": "tar", **OWN})
    source = make_source(workload, tmp_path / "native", s3_bucket, objects=True)
    found = measured(workload, "cachefs", source, tmp_path / "place")
    assert_complete(workload, found)
    total = workload.data().size_bytes
    assert [(each.labels["state"], each.value) for each in found.figures if each.metric == "under_store_bytes"] == [
        ("cold", total),
        ("warm", 0),
        ("nothing is read", 0),
    ]


def test_what_cannot_be_read_ends_the_measurement_and_is_told(s3_bucket: Bucket, tmp_path: Path) -> None:
    workload = Unet3d(Scale.SMOKE, OWN)
    source = make_source(workload, tmp_path / "native", s3_bucket)
    path = workload.layout("files").paths[2]
    os.truncate(tmp_path / "native" / path, 1000)
    found = measured(workload, "native", source, tmp_path / "place")
    assert [(each.kind, each.case) for each in found.gaps] == [("failed", "")]
    assert f"{path} has 1000 bytes instead of" in found.gaps[0].why
    assert {each.labels["format"] for each in found.figures} <= {"synthetic"}


@pytest.mark.parametrize("kind", WORKLOADS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("scale", list(Scale), ids=str)
def test_samples_have_the_size_that_is_said(kind: type[Training], scale: Scale) -> None:
    workload = kind(scale)
    mean = sum(workload.sizes) / len(workload.sizes)
    assert mean == pytest.approx(workload.mean_bytes / workload.cut, rel=1e-3)
    assert (workload.cut != 1) == ("of their size" in workload.case("files", 1, "cold"))
    # What is asked for in bytes each second does not depend on what is cut.
    speed = workload.speeds[workload.chosen_accelerator].samples_per_s
    assert mean * workload.samples_per_s == pytest.approx(workload.mean_bytes * speed, rel=1e-3)
    assert workload.data().files == kind(scale).data().files


@pytest.mark.parametrize("packed", ["tar", "tfrecord"])
def test_shards_hold_all_samples(packed: str) -> None:
    workload = Resnet(Scale.SMOKE, {"format": packed})
    read = formats.read_tar if packed == "tar" else formats.read_tfrecord
    sizes: list[int] = []
    for path, size in workload.data().files.items():
        content = workload.content(path, size)
        assert content is not None and len(content) == size
        assert sizes or content == workload.content(path, size)
        sizes += [len(each) for each in read(io.BytesIO(content))]
    assert sizes == workload.sizes


def test_samples_that_are_decoded_are_images(s3_bucket: Bucket, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    workload = Resnet(Scale.SMOKE, {"decode": "yes", "format": "files", "batch": "20", "epochs": "1", **OWN})
    path, size = next(iter(workload.data().files.items()))
    content = workload.content(path, size)
    assert content is not None and len(content) == size and content == workload.content(path, size)
    with image.open(io.BytesIO(content)) as picture:
        assert picture.format == "JPEG"
        assert len(picture.convert("RGB").tobytes()) == 3 * picture.width * picture.height
    source = make_source(workload, tmp_path / "native", s3_bucket)
    found = measured(workload, "native", source, tmp_path / "place")
    assert_complete(workload, found)
    assert all("JPEGs are decoded" in each.case for each in found.figures)


@pytest.mark.skipif(importlib.util.find_spec("torch") is not None, reason="torch is installed, and would train")
def test_training_for_real_says_how_to_install_torch(s3_bucket: Bucket, tmp_path: Path) -> None:
    workload = Resnet(Scale.SMOKE, {"real": "yes"})
    source = make_source(workload, tmp_path / "native", s3_bucket)
    (gap,) = measured(workload, "native", source, tmp_path / "place").gaps
    assert gap.kind == "missing" and "pip install torch" in gap.why


@pytest.mark.skipif(importlib.util.find_spec("torch") is not None, reason="torch is installed, and would train")
def test_training_for_real_reads_local_files_as_cold_as_the_mount(
    s3_bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workload = Resnet(Scale.SMOKE, {"real": "yes"})
    source = make_source(workload, tmp_path / "native", s3_bucket)
    forgotten: list[Path] = []
    monkeypatch.setattr("bench.workloads.resnet.forget_pages", forgotten.append)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    (gap,) = measured(workload, "native", source, tmp_path / "place").gaps
    assert "No module named 'torch'" in gap.why
    assert forgotten == [source.native]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accelerator": "K80"}, "resnet.accelerator=K80: accepted are P100, V100, V100-amp, A100, A100-amp, H100"),
        ({"format": "zip"}, "resnet.format=zip: not a format; accepted are files, tar, tfrecord"),
        ({"format": "files+zip"}, "resnet.format=files+zip: not a format"),
        ({"workers": "0"}, "resnet.workers=0: accepted are numbers from 1 to 256"),
        ({"batch": "many"}, "resnet.batch=many: accepted are numbers"),
        ({"decode": "maybe"}, "resnet.decode=maybe: accepted are no, yes"),
        ({"colour": "red"}, "resnet.colour: no such option; there are accelerator, format"),
    ],
    ids=lambda each: "-".join(each) if isinstance(each, dict) else "",
)
def test_bad_options_are_refused(options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError) as error:
        Resnet(Scale.SMOKE, options)
    assert message in str(error.value)
