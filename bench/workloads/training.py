"""Training jobs as MLPerf Storage makes them: a real data loader, and an accelerator that only takes its time."""

from __future__ import annotations

import os
import random
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from functools import cached_property
from typing import Any, NamedTuple

from bench import server
from bench.pagecache import CannotDrop, drop_page_cache
from bench.results import Better, Figure, Gap
from bench.systems.base import Mounted
from bench.training import formats
from bench.training.accelerators import TABLES, Speed
from bench.training.loader import LoadingFailed, loader_for, loader_name
from bench.training.plan import Job, Kind, Layout, missing_or_twice
from bench.training.processes import sleep_exactly
from bench.training.steps import Accelerator, Epoch
from bench.workloads.base import Data, Scale, Workload
from bench.workloads.settling import settle

SEED = 1
KINDS: Sequence[Kind] = ("files", "tar", "tfrecord")
INPUTS: Mapping[Kind, str] = {
    "files": "one file per sample",
    "tar": "tar shards",
    "tfrecord": "TFRecord shards",
    "synthetic": "synthetic input",
}
LARGEST = 1_000_000


class Amounts(NamedTuple):
    """What a scale makes of a workload."""

    samples: int
    batch: int
    cut: int = 1
    """Samples have one part in so many of their real size, and steps take as much less."""
    shard: int = 0
    """Samples in a shard; 0 where there are none."""
    epochs: int = 3
    workers: int = 4


class Training(Workload):
    """Epochs of shuffled samples, the first one cold; the page cache is dropped before each other one, as data sets are
    larger than memory. Then one epoch of the same loader that reads nothing.
    """

    axes = ("input", "epoch")
    unit: str
    """Of samples, in plural, for the metric's name."""
    mean_bytes: int
    """Of a sample, really."""
    delivered_bytes: int
    """What the trainer gets for each sample, really: a tensor, or all of it."""
    usual_batch: int
    """Where the source of the accelerator's speed does not tell one."""
    amounts: Mapping[Scale, Amounts]
    accelerator: str
    """That is taken unless another one is asked for."""
    accepted_formats: Sequence[Kind] = KINDS
    default_formats: Sequence[Kind] = ("files",)
    suffix = ".bin"
    """Of samples' names."""
    remarked: Sequence[str] = ()

    def __init__(self, scale: Scale, options: Mapping[str, str] | None = None) -> None:
        """Raises ValueError for an option that is not known, or has a value that is not."""
        super().__init__(scale, options)
        for name in self.chosen:
            if name not in self.options:
                raise ValueError(f"{self.name}.{name}: no such option; there are {', '.join(self.options)}")
        amounts = self.amounts[scale]
        self.speeds: Mapping[str, Speed] = TABLES[self.name]
        self.chosen_accelerator = self._one_of("accelerator", self.accelerator, self.speeds)
        self.kinds = self._kinds()
        self.workers = self._count("workers", amounts.workers, 256)
        self.batch = self._count("batch", amounts.batch)
        self.epochs = self._count("epochs", amounts.epochs)
        self.loader = self._one_of("loader", "auto", ("auto", "own", "torch"))
        self.page_cache = self._one_of("page_cache", "kept" if scale is Scale.SMOKE else "dropped", ("dropped", "kept"))
        self.cut = amounts.cut
        self.shard = amounts.shard

    @staticmethod
    def common_options(
        speeds: Mapping[str, Any], accelerator: str, formats: Sequence[str], default: str
    ) -> dict[str, str]:
        return {
            "accelerator": f"{accelerator}; one of {', '.join(speeds)}",
            "format": f"{default}; one of {', '.join(formats)}, or several with + between them",
            "workers": "processes of the data loader; a number",
            "batch": "samples in a batch; a number",
            "epochs": "the first one is cold; a number",
            "page_cache": "dropped; dropped, which needs root, or kept: between epochs",
            "loader": "auto; own, torch (PyTorch's DataLoader), or auto: torch where it is installed",
        }

    def rounds(self) -> int:
        return {Scale.SMOKE: 1, Scale.STANDARD: 1, Scale.FULL: 3}[self.scale]

    def data(self) -> Data:
        files: dict[str, int] = {}
        for kind in self.kinds:
            layout = self.layout(kind)
            files |= {
                path: sizes[0] if kind == "files" else _SHARD_SIZE[kind](sizes)
                for path, sizes in zip(layout.paths, layout.sizes, strict=True)
            }
        return Data(name=f"{self.name}-{self._data_name()}", files=files)

    def _data_name(self) -> str:
        """Other options make no other files. Buckets and volumes are named after it: letters, digits and hyphens."""
        return "-".join(self.kinds)

    def content(self, path: str, size: int) -> bytes | None:
        kind: Kind = "tar" if path.endswith(".tar") else "tfrecord" if path.endswith(".tfrecord") else "files"
        if kind == "files":
            return self.sample(path, size)
        layout = self.layout(kind)
        number = layout.paths.index(path)
        names = [f"{number:05}-{place:05}" for place in range(len(layout.sizes[number]))]
        samples = [
            self.sample(name, each) or random.Random(f"{self.name}/{name}").randbytes(each)
            for name, each in zip(names, layout.sizes[number], strict=True)
        ]
        if kind == "tar":
            return formats.write_tar(zip((f"{name}{self.suffix}" for name in names), samples, strict=True))
        return formats.write_tfrecord(samples)

    def sample(self, name: str, size: int) -> bytes | None:
        """Content of one, where random bytes would not do."""
        return None

    @abstractmethod
    def draw_size(self, random_: random.Random) -> float:
        """Bytes of a real sample, whose mean is about `mean_bytes`."""

    @cached_property
    def sizes(self) -> list[int]:
        """Of all samples; their mean is the real one, cut."""
        count, mean = self.amounts[self.scale].samples, self.mean_bytes / self.cut
        random_ = random.Random(f"{self.name}/sizes")
        drawn = [max(self.mean_bytes / 16, self.draw_size(random_)) for _ in range(count)]
        factor = mean * count / sum(drawn)
        return [round(each * factor) for each in drawn]

    def layout(self, kind: Kind) -> Layout:
        sizes = self.sizes
        if kind in ("files", "synthetic"):
            paths = [f"samples/{at // 1000:03}/{at:06}{self.suffix}" for at in range(len(sizes))]
            return Layout(kind=kind, paths=paths, sizes=[[each] for each in sizes])
        parts = [sizes[start : start + self.shard] for start in range(0, len(sizes), self.shard)]
        return Layout(
            kind=kind, paths=[f"{kind}/{at:05}-of-{len(parts):05}.{kind}" for at in range(len(parts))], sizes=parts
        )

    def job(self, kind: Kind, root: str, round_: int) -> Job:
        return Job(
            layout=self.layout(kind),
            root=root,
            seed=SEED + round_,
            batch=self.batch,
            workers=self.workers,
            prefetch=2,
            delivered=self.delivered_bytes // self.cut,
            buffer=2 * self.batch,
        )

    @property
    def real_batch(self) -> int:
        return self.speeds[self.chosen_accelerator].batch or self.usual_batch

    @property
    def samples_per_s(self) -> float:
        return self.speeds[self.chosen_accelerator].samples_per_s * self.cut

    @property
    def remarks(self) -> str:
        """What is smaller than it really is, or otherwise, in words for a case; empty if nothing."""
        words = list(self.remarked)
        if self.cut != 1:
            words.append(f"samples of 1/{self.cut} of their size")
        if self.batch != self.real_batch:
            words.append(f"batches of {self.batch} instead of {self.real_batch}")
        return "".join(f", {each}" for each in words)

    def measure(self, mounted: Mounted, round_: int) -> Iterator[Figure | Gap]:
        sleep_exactly()
        for kind in self.kinds:
            yield from self._epochs(mounted, kind, round_, self.epochs)
        yield from self._epochs(mounted, "synthetic", round_, 1)

    def _epochs(self, mounted: Mounted, kind: Kind, round_: int, epochs: int) -> Iterator[Figure | Gap]:
        job = self.job(kind, os.fspath(mounted.path), round_)
        accelerator = Accelerator(self.samples_per_s)
        number = 1
        try:
            with loader_for(job, self.loader) as loader:
                for number in range(1, epochs + 1):
                    state = self._prepare(kind, number)
                    before = server.traffic(mounted.source.traffic_url)
                    epoch = accelerator.train(loader.epoch(number))
                    wrong = missing_or_twice(epoch.ids, job.layout.samples)
                    if wrong:
                        yield self._gap(mounted, "failed", f"WRONG: {wrong}", self.case(kind, number, state))
                        return
                    if kind != "synthetic" and number == 1:
                        settle(mounted)
                    known = self._bytes_of(job) if state == "cold" and mounted.system != "native" else 0
                    sent = server.traffic(mounted.source.traffic_url, before.sent_bytes + known).since(before)
                    yield from self._figures(kind, number, state, epoch, sent.sent_bytes)
        except (LoadingFailed, ImportError, TimeoutError) as error:
            missing = isinstance(error, ImportError)
            why = f"{error}: pip install torch" if missing else f"{self._where(kind, number)}: {error}"
            yield self._gap(mounted, "missing" if missing else "failed", why)

    def _bytes_of(self, job: Job) -> int:
        files = self.data().files
        return sum(files[path] for path in job.layout.paths)

    def _prepare(self, kind: Kind, number: int) -> str:
        """Returns the state that an epoch begins in."""
        if kind == "synthetic":
            return "nothing is read"
        if number == 1:
            return "cold"
        if self.page_cache == "kept":
            return "warm"
        try:
            drop_page_cache()
        except CannotDrop:
            return "warm"
        return "cached"

    def _where(self, kind: Kind, number: int) -> str:
        return f"{self.chosen_accelerator}, {INPUTS[kind]}, epoch {number}"

    def case(self, kind: Kind, number: int, state: str) -> str:
        return f"{self._where(kind, number)} ({state}){self.remarks}"

    def _gap(self, mounted: Mounted, kind: Any, why: str, case: str = "") -> Gap:
        return Gap(workload=self.name, system=mounted.system, kind=kind, why=why, case=case)

    def _figures(self, kind: Kind, number: int, state: str, epoch: Epoch, sent: int) -> Iterator[Figure]:
        labels = {
            "input": "shards" if kind in ("tar", "tfrecord") else kind,
            "epoch": str(number),
            "state": state,
            "format": kind,
            "accelerator": self.chosen_accelerator,
            "batch": str(self.batch),
            "workers": str(self.workers),
            "loader": loader_name(self.loader),
            "scale": str(Fraction(1, self.cut)),
        }
        told: tuple[tuple[str, float, str, Better], ...] = (
            (f"{self.unit}_per_s", epoch.samples_per_s, "1/s", "more"),
            ("utilisation", epoch.utilisation, "", "more"),
            ("stall_s", epoch.stall_s, "s", "less"),
            ("under_store_bytes", float(sent), "B", "less"),
            ("read_bytes", float(epoch.bytes_read), "B", ""),
        )
        for metric, value, unit, better in told:
            yield Figure(
                case=self.case(kind, number, state), metric=metric, value=value, unit=unit, better=better, labels=labels
            )

    def _kinds(self) -> list[Kind]:
        wanted = self.chosen.get("format", "+".join(self.default_formats)).split("+")
        kinds: list[Kind] = [kind for kind in self.accepted_formats if kind in wanted]
        if not kinds or set(wanted) - set(kinds):
            accepted = f"{', '.join(self.accepted_formats)}, or several with + between them"
            raise ValueError(f"{self.name}.format={'+'.join(wanted)}: not a format; accepted are {accepted}")
        return kinds

    def _one_of(self, name: str, default: str, accepted: Sequence[str] | Mapping[str, Any]) -> str:
        value = self.chosen.get(name, default)
        if value not in accepted:
            raise ValueError(f"{self.name}.{name}={value}: accepted are {', '.join(accepted)}")
        return value

    def _count(self, name: str, default: int, largest: int = LARGEST) -> int:
        value = self.chosen.get(name, str(default))
        if not (value.isascii() and value.isdecimal() and 1 <= int(value) <= largest):
            raise ValueError(f"{self.name}.{name}={value}: accepted are numbers from 1 to {largest:,}")
        return int(value)


_SHARD_SIZE: Mapping[Kind, Callable[[list[int]], int]] = {
    "tar": formats.tar_size,
    "tfrecord": formats.tfrecord_size,
}
