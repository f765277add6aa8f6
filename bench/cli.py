"""The command line of the benchmarks."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import click
import msgspec
from rich.console import Console
from rich.table import Table

from bench import space
from bench.compare import command as compare
from bench.harness import terminate_as_interrupt
from bench.report.command import report
from bench.results import Results, save
from bench.run import Plan
from bench.run import run as run_plan
from bench.systems.base import Missing
from bench.systems.registry import SYSTEMS
from bench.training.accelerators import TABLES
from bench.workloads.base import Alone, Scale, Workload
from bench.workloads.registry import workloads as known_workloads
from cachefs.model import CachefsError

RESULTS = Path(__file__).parent / "results"
INTERRUPTED = 130
T = TypeVar("T")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Measure cachefs beside local files and other file systems: the same server, data, and medium of caches."""


main.add_command(report, "report")
main.add_command(compare, "compare")


@main.command("list")
def list_() -> None:
    """Show which workloads, systems and accelerators there are."""
    console = _console()
    table = Table("workload", "what", "options", title="workloads", title_justify="left")
    for name, kind in known_workloads().items():
        options = "\n".join(f"{option}: {about}" for option, about in kind.options.items())
        table.add_row(name, kind.what, options)
    console.print(table)
    table = Table("system", "version, or how to install", title="systems", title_justify="left")
    for name, made in SYSTEMS.items():
        try:
            table.add_row(name, made().check())
        except Missing as error:
            table.add_row(name, f"missing: {error}")
    console.print(table)
    table = Table("accelerator", "model", "samples/s", "source", title="accelerators", title_justify="left")
    for model, speeds in TABLES.items():
        for name, speed in speeds.items():
            table.add_row(name, model, f"{speed.samples_per_s:,.3g}", speed.source)
    console.print(table)


@main.command()
@click.argument("names", metavar="[WORKLOAD]...", nargs=-1)
@click.option("--systems", metavar="NAME,...", default="", help="Which to compare. Default: all that `list` shows.")
@click.option(
    "--scale",
    type=click.Choice([each.value for each in Scale]),
    default=Scale.STANDARD.value,
    show_default=True,
    help="smoke: seconds, for tests; full: the whole matrix.",
)
@click.option("--rounds", type=click.IntRange(1, 100), default=None, help="Default: as each workload wants.")
@click.option(
    "--minutes",
    type=click.FloatRange(0),
    default=None,
    help="Leave out further rounds of what would end later. The first rounds are measured in any case.",
)
@click.option(
    "--dir",
    "directory",
    type=click.Path(exists=True, file_okay=False, writable=True, path_type=Path),
    default=None,
    help="Where data and caches are while it runs. Default: the directory for temporary files.",
)
@click.option("--name", default=None, help="Results go to bench/results/NAME.json. Default: the scale.")
@click.option(
    "--option",
    "options",
    metavar="WORKLOAD.NAME=VALUE",
    multiple=True,
    help="Of one workload; `list` shows which there are. Repeatable.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the results, too.")
@click.option("--dry-run", is_flag=True, help="Only show what would be done, and the room it needs.")
def run(
    names: tuple[str, ...],
    systems: str,
    scale: str,
    rounds: int | None,
    minutes: float | None,
    directory: Path | None,
    name: str | None,
    options: tuple[str, ...],
    as_json: bool,
    dry_run: bool,
) -> None:
    """Measure workloads, all of them by default."""
    chosen_systems = _chosen("system", [each for each in systems.split(",") if each], SYSTEMS)
    kinds = _chosen("workload", names, known_workloads())
    given = _options(options, kinds)
    name = name or scale
    if Path(name).name != name or name.startswith("."):
        raise click.UsageError(f"--name {name!r}: a file name without a directory is wanted")
    made: list[Workload | Alone] = []
    for each, kind in kinds.items():
        try:
            made.append(kind(Scale(scale), given[each]))
        except ValueError as error:
            raise click.UsageError(f"workload {each}: {error}") from None
    began = time.monotonic()

    def say(line: str) -> None:
        click.echo(f"[{time.monotonic() - began:6.1f} s] {line}", err=True)

    plan = Plan(
        name=name,
        workloads=made,
        systems={each: system() for each, system in chosen_systems.items()},
        scale=Scale(scale),
        directory=directory or Path(tempfile.gettempdir()),
        command=["python", "-m", "bench", *sys.argv[1:]],
        rounds=rounds,
        minutes=minutes,
        say=say,
    )
    if dry_run:
        _show_plan(plan)
        return
    path = RESULTS / f"{name}.json"
    _check_writable(path)
    terminate_as_interrupt()
    try:
        results = run_plan(plan)
    except KeyboardInterrupt:
        say("interrupted: everything is unmounted and removed")
        sys.exit(INTERRUPTED)
    except (space.TooLittle, CachefsError) as error:
        raise click.ClickException(str(error)) from None
    save(results, path)
    say(_summary(results))
    click.echo(_shown(path), err=as_json)
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(results), indent=1))


def _chosen(what: str, names: Iterable[str], known: Mapping[str, T]) -> dict[str, T]:
    """Those named, in that order; all where none is."""
    names = list(dict.fromkeys(names)) or list(known)
    for name in names:
        if name not in known:
            raise click.UsageError(f"there is no {what} {name!r}; there are {', '.join(known)}")
    return {name: known[name] for name in names}


def _check_writable(path: Path) -> None:
    """Before the work is done that it is wanted for."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise click.ClickException(f"{path.parent} cannot be made: {error.strerror}") from None
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise click.ClickException(f"{path} cannot be written; --name chooses another file in {path.parent}")


def _options(given: Sequence[str], kinds: Mapping[str, type[Workload] | type[Alone]]) -> dict[str, dict[str, str]]:
    """Workload -> its options."""
    found: dict[str, dict[str, str]] = {name: {} for name in kinds}
    for each in given:
        address, equals, value = each.partition("=")
        workload, dot, option = address.partition(".")
        if not equals or not dot:
            raise click.UsageError(f"--option {each!r}: WORKLOAD.NAME=VALUE is wanted")
        if workload not in kinds:
            raise click.UsageError(f"--option {each!r}: no workload {workload!r} is run; there are {', '.join(kinds)}")
        known = kinds[workload].options
        if option not in known:
            there = f"there are {', '.join(known)}" if known else "it has none"
            raise click.UsageError(f"--option {each!r}: workload {workload} has no option {option!r}; {there}")
        found[workload][option] = value
    return found


def _show_plan(plan: Plan) -> None:
    console = _console()
    table = Table("workload", "systems", "rounds", "data", "what")
    for each in plan.workloads:
        if isinstance(each, Alone):
            table.add_row(each.name, "", "", space.human(each.needs_bytes()), each.what)
            continue
        size = space.human(each.data().size_bytes)
        table.add_row(each.name, ", ".join(plan.systems), str(plan.rounds or each.rounds()), size, each.what)
    console.print(table)
    order = [each for each, _ in plan.turns()]
    wanted = space.needs(order, list(plan.systems)).disk
    room = space.free(plan.directory)
    console.print(f"{space.human(wanted)} of {space.human(room)} free in {plan.directory}", soft_wrap=True)
    try:
        space.check(plan.directory, plan.scale, order, list(plan.systems))
    except space.TooLittle as error:
        raise click.ClickException(str(error)) from None


def _summary(results: Results) -> str:
    missed = [f"{gap.workload} {gap.system} {gap.kind}".strip() for gap in results.gaps if gap.kind != "missing"]
    return f"{len(results.measures)} measures in {results.seconds:.0f} s" + (
        f"; not measured: {', '.join(dict.fromkeys(missed))}" if missed else ""
    )


def _shown(path: Path) -> str:
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 140)
