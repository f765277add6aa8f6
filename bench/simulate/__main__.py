"""Tables of what the policies do: `python -m bench.simulate --help`. The package says what is assumed."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

from rich.console import Console
from rich.table import Table

from bench.simulate import exact, large
from bench.simulate.workload import POLICIES, Scenario, Shares

EXACT_READS = 1_000_000
"""With more reads an epoch than that `--engine auto` simulates in arrays, if it can."""
IDLE_AFTER = (0.05, 0.25, 0.5, 1.0, 2.0, math.inf)

Row = dict[str, object]


def compare(scenarios: list[Scenario], engine: str) -> list[Row]:
    """By as many processes as there are processors."""
    with ProcessPoolExecutor(os.cpu_count()) as processes:
        results = {
            (scenario.fraction, policy): processes.submit(engine_of(engine, scenario), scenario, policy)
            for scenario in scenarios
            for policy in POLICIES
        }
        return [
            {"caches": f"{fraction:g}", "policy": policy, "epochs": result.result()}
            for (fraction, policy), result in results.items()
        ]


def engine_of(engine: str, scenario: Scenario) -> Callable[[Scenario, str], list[Shares]]:
    reads = scenario.blocks * (scenario.reader_count if scenario.reads == "all" else 1)
    in_arrays = engine == "large" or (engine == "auto" and reads > EXACT_READS and scenario.reads == "shard")
    return large.simulate if in_arrays else exact.simulate


def replace_job(scenarios: list[Scenario]) -> list[Row]:
    """A job over one data set, then one over another of the same size, as `last-copy` does it."""
    rows: list[Row] = []
    for scenario in scenarios:
        data_sets = [0] * scenario.epochs + [1] * scenario.epochs
        for in_groups, idle_after in itertools.product((False, True), IDLE_AFTER):
            shares = exact.simulate(
                scenario, "last-copy", idle_after=idle_after, in_groups=in_groups, data_sets=data_sets
            )
            rows.append(
                {
                    "caches": f"{scenario.fraction:g}",
                    "idle": f"{'groups' if in_groups else 'blocks'}, {idle_after:g} epochs",
                    "epochs": shares,
                }
            )
    return rows


def print_table(title: str, rows: list[Row]) -> None:
    table = Table(title=f"{title}\nlocal / peer / under-store, shares of the bytes of each epoch")
    named = [name for name in rows[0] if name != "epochs"]
    for name in named:
        table.add_column(name)
    columns: list[list[Shares]] = [row["epochs"] for row in rows]  # type: ignore[misc]
    for number in range(len(columns[0])):
        table.add_column(f"epoch {number + 1}", justify="right")
    for row, epochs in zip(rows, columns, strict=True):
        cells = (" / ".join(f"{share:.2f}" for share in shares) for shares in epochs)
        table.add_row(*(str(row[name]) for name in named), *cells)
    Console(width=None if sys.stdout.isatty() else 40 + 21 * len(columns[0])).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.simulate", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workers", type=int, default=8, help="default 8")
    parser.add_argument("--blocks", type=int, default=10_000, help="default 10000")
    parser.add_argument(
        "--fraction", type=float, action="append", help="all caches together / the data; repeatable (0.25, 0.5, 1, 1.5)"
    )
    parser.add_argument("--epochs", type=int, default=4, help="default 4")
    parser.add_argument("--seed", type=int, default=1, help="default 1")
    parser.add_argument("--readers", type=int, help="so many of the workers read (default all)")
    parser.add_argument("--reads", choices=["shard", "all"], default="shard", help="share an epoch, or read everything")
    parser.add_argument("--engine", choices=["auto", "exact", "large"], default="auto")
    parser.add_argument("--second-job", action="store_true", help="another data set replaces the first; exact only")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    try:
        scenarios = [
            Scenario(
                arguments.workers,
                arguments.blocks,
                fraction,
                epochs=arguments.epochs,
                seed=arguments.seed,
                readers=arguments.readers,
                reads=arguments.reads,
            )
            for fraction in arguments.fraction or (0.25, 0.5, 1.0, 1.5)
        ]
        rows = replace_job(scenarios) if arguments.second_job else compare(scenarios, arguments.engine)
    except ValueError as error:
        parser.error(str(error))
    if arguments.json:
        print(json.dumps({"arguments": vars(arguments), "rows": rows}))
        return
    first = scenarios[0]
    readers = "" if first.readers is None else f", {first.readers} of them read"
    print_table(f"{first.workers} workers{readers}, {first.blocks:,} blocks", rows)


if __name__ == "__main__":
    main()
