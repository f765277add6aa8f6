"""PyTorch's DataLoader over the same samples in the same order."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, get_worker_info

from bench.training.loader import Batch, Loader, LoadingFailed
from bench.training.plan import Job, permutation
from bench.training.processes import die_with_parent
from bench.training.samples import Samples

NOTHING = -1
"""Number of a sample that is not read."""
Item = tuple[int, int, torch.Tensor]
"""Number of the sample, bytes that were read, what the trainer gets."""


class _Base:
    def __init__(self, job: Job) -> None:
        self.job = job
        self._samples: Samples | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_samples": None}

    @property
    def samples(self) -> Samples:
        """Of this process."""
        if self._samples is None:
            self._samples = Samples(self.job)
        return self._samples

    def item(self, number: int, content: memoryview, read: int) -> Item:
        tensor = torch.zeros(self.job.delivered, dtype=torch.uint8)
        if read:
            writable = bytearray(content) if content.readonly else content
            tensor[: len(content)] = torch.frombuffer(writable, dtype=torch.uint8)
        return number, read, tensor


class Files(_Base, Dataset[Item]):
    def __len__(self) -> int:
        return self.job.layout.samples

    def __getitem__(self, number: int) -> Item:
        if number == NOTHING:
            return self.item(NOTHING, memoryview(b""), 0)
        return self.item(number, *self.samples.read(number))


class Shards(_Base, IterableDataset[Item]):
    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self._epoch = 0

    def __iter__(self) -> Iterator[Item]:
        """Each worker has a copy of this, which counts epochs by itself."""
        info = get_worker_info()
        assert info is not None
        epoch, self._epoch = self._epoch, self._epoch + 1
        if epoch == 0:
            yield self.item(NOTHING, memoryview(b""), 0)
            return
        for each in self.samples.of_worker(epoch, info.id):
            yield self.item(*each)


class Shuffled(Sampler[list[int]]):
    """The batches of the epoch that is set. Of epoch 0: a batch of nothing for each worker."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.epoch = 0

    def __iter__(self) -> Iterator[list[int]]:
        if self.epoch == 0:
            return iter([[NOTHING]] * self.job.workers)
        order = permutation(self.job.seed, self.epoch, self.job.layout.samples)
        return (order[start : start + self.job.batch] for start in range(0, len(order), self.job.batch))


class InWorker:
    """What a worker does first."""

    def __init__(self) -> None:
        self.parent = os.getpid()

    def __call__(self, worker: int) -> None:
        die_with_parent(self.parent)
        torch.set_num_threads(1)


class TorchLoader(Loader):
    """Epochs have to be asked for in their order, from 1, since workers count them for themselves."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self._sampler = Shuffled(job) if job.layout.kind in ("files", "synthetic") else None
        self._loader: DataLoader[Item] | None = None
        self._epochs = -1

    def __enter__(self) -> TorchLoader:
        common: dict[str, Any] = {
            "num_workers": self.job.workers,
            "prefetch_factor": self.job.prefetch,
            "persistent_workers": True,
            "multiprocessing_context": "spawn",
            "worker_init_fn": InWorker(),
        }
        if self._sampler is not None:
            self._loader = DataLoader(Files(self.job), batch_sampler=self._sampler, **common)
        else:
            self._loader = DataLoader(Shards(self.job), batch_size=self.job.batch, **common)
        # An epoch of nothing starts the workers: that they import torch is no part of reading.
        for _ in self.batches(0):
            pass
        return self

    def batches(self, number: int) -> Generator[tuple[torch.Tensor, torch.Tensor, torch.Tensor], None, None]:
        """As `epoch`, with the data: numbers, bytes read, samples x delivered bytes."""
        assert self._loader is not None
        self._epochs += 1
        if number != self._epochs:
            raise ValueError(f"epoch {number} was asked for after epoch {self._epochs - 1}")
        if self._sampler is not None:
            self._sampler.epoch = number
        try:
            yield from self._loader
        except (OSError, ValueError, RuntimeError) as error:
            raise LoadingFailed(str(error)) from error

    def epoch(self, number: int) -> Iterator[Batch]:
        for ids, read, content in self.batches(number):
            yield Batch(ids.tolist(), int(read.sum()), content)

    def __exit__(self, *_: object) -> None:
        loader, self._loader = self._loader, None
        iterator = getattr(loader, "_iterator", None)
        if iterator is not None:
            iterator._shutdown_workers()
