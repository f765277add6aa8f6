"""Trains a real ResNet-50 for some steps, on each of several inputs. Needs torch; takes its GPU where there is one.

A process of its own: takes a job as JSON on standard input, prints a line of JSON for each input.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Iterator

import msgspec

from bench.training.plan import Job
from bench.training.processes import die_with_parent
from bench.training.samples import SIDE

CLASSES = 1000
WARM_UP = 1
"""Steps that are not counted: memory is found, kernels are chosen."""


class Input(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    job: Job


class RealJob(msgspec.Struct, frozen=True, kw_only=True):
    inputs: list[Input]
    steps: int
    side: int
    """Images are scaled to this many pixels a side."""
    parent: int


class Trained(msgspec.Struct, frozen=True, kw_only=True):
    """What came of an input; times are of the counted steps."""

    name: str
    device: str
    torch: str
    steps: int
    images: int
    compute_s: float
    stall_s: float
    """Waiting for the loader."""
    first_loss: float
    last_loss: float


def main() -> None:
    given = msgspec.json.decode(sys.stdin.buffer.read(), type=RealJob)
    die_with_parent(given.parent)
    for each in train(given):
        sys.stdout.buffer.write(msgspec.json.encode(each) + b"\n")
        sys.stdout.buffer.flush()


def train(given: RealJob) -> Iterator[Trained]:
    """Yields what came of each input, in turn; one model learns from all."""
    import torch

    from bench.training.resnet50 import resnet50
    from bench.training.torch_loader import TorchLoader

    torch.manual_seed(1)
    # One processor is for the loader and the file system: threads that wait for each other at each layer are slow where
    # one of them has to wait for a processor.
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) - 1))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    named = torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, threads: {torch.get_num_threads()}"
    model = resnet50(CLASSES).to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)
    entropy = torch.nn.CrossEntropyLoss()

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    def step(ids: torch.Tensor, content: torch.Tensor) -> float:
        images = content.to(device).view(-1, SIDE, SIDE, 3).permute(0, 3, 1, 2).float().div_(255)
        if given.side != SIDE:
            images = torch.nn.functional.interpolate(images, size=given.side)
        with torch.autocast(device.type, enabled=device.type == "cuda"):
            loss = entropy(model(images), (ids % CLASSES).to(device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    for each in given.inputs:
        losses: list[float] = []
        images, compute, stall = 0, 0.0, 0.0
        with TorchLoader(each.job) as loader:
            epoch = 1
            batches = loader.batches(epoch)
            for number in range(WARM_UP + given.steps):
                began = time.perf_counter()
                batch = next(batches, None)
                if batch is None:
                    epoch += 1
                    batches = loader.batches(epoch)
                    batch = next(batches)
                ids, _, content = batch
                arrived = time.perf_counter()
                loss = step(ids, content)
                wait()
                done = time.perf_counter()
                if not math.isfinite(loss):
                    raise SystemExit(f"step {number} on {each.name}: the loss is {loss}")
                if number >= WARM_UP:
                    losses.append(loss)
                    images += len(ids)
                    stall += arrived - began
                    compute += done - arrived
            batches.close()
        yield Trained(
            name=each.name,
            device=named,
            torch=str(torch.__version__),
            steps=given.steps,
            images=images,
            compute_s=compute,
            stall_s=stall,
            first_loss=losses[0],
            last_loss=losses[-1],
        )


if __name__ == "__main__":
    main()
