"""A run that hangs for good in a mount whose server does not answer, until it is interrupted. Given: a directory, and
the endpoint, key and secret of an S3 server.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench import server
from bench.harness import terminate_as_interrupt
from bench.run import Plan, run
from bench.workloads.base import Scale
from cachefs.testing.s3server import S3Server
from tests.bench.reading import Bare, Reading

if __name__ == "__main__":
    directory, *address = sys.argv[1:]

    @contextmanager
    def running_server(place: Path) -> Iterator[S3Server]:
        yield S3Server(*address, pid=0)

    server.running_server = running_server
    server.Ceiling.measure = lambda self: None
    server.Ceiling.measures = lambda self: iter(())
    terminate_as_interrupt()
    run(
        Plan(
            name="interrupted",
            workloads=[Reading(Scale.SMOKE, {"do": "bare:stop"})],
            systems={"bare": Bare("bare")},
            scale=Scale.SMOKE,
            directory=Path(directory),
            command=[],
        )
    )
