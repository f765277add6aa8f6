"""`python -m bench report`."""

from __future__ import annotations

from pathlib import Path

import click
import msgspec

from bench.report import plots
from bench.report.markdown import NoPlace
from bench.report.markdown import report as write_report
from bench.report.readme import write_readme
from bench.results import Results, load

RESULTS = Path("bench/results")
DOCUMENT = Path("docs/performance.md")
_FILE = click.Path(dir_okay=False, path_type=Path)


def load_results(path: Path) -> Results:
    """For commands. Raises click.ClickException."""
    try:
        return load(path)
    except OSError as error:
        raise click.ClickException(f"{path} cannot be read: {error.strerror or error}") from None
    except (msgspec.ValidationError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise click.ClickException(f"{path} holds no results of `python -m bench run`: {error}") from None


@click.command()
@click.argument("files", metavar="[RESULT.json]...", nargs=-1, type=_FILE)
@click.option(
    "--out",
    type=_FILE,
    default=DOCUMENT,
    show_default=True,
    help="Document; plots go to the directory OUT without its suffix.",
)
@click.option("--readme", type=_FILE, default=None, help="Also put a short table between the markers of this file.")
def report(files: tuple[Path, ...], out: Path, readme: Path | None) -> None:
    """Write Markdown and plots of results; by default, of all in bench/results."""
    paths = files or tuple(sorted(RESULTS.glob("*.json")))
    if not paths:
        raise click.ClickException(f"there are no results in {RESULTS}: run `python -m bench run` first")
    results = [load_results(path) for path in paths]
    try:
        write_report(results, out)
        if readme is not None:
            write_readme(results, readme)
    except NoPlace as error:
        raise click.ClickException(str(error)) from None
    except OSError as error:
        raise click.ClickException(f"{error.filename or out} cannot be written: {error.strerror or error}") from None
    if not plots.available():
        click.echo(f"without plots, as matplotlib is not installed: {plots.INSTALL}", err=True)
    for path in (out, readme):
        if path is not None:
            click.echo(path)
