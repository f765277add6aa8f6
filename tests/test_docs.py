"""The documents say what is so: every promise of semantics.md, and every line on what fails, names tests that exist."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from cachefs_csi.metrics_reference import metrics_reference as csi_metrics_reference

from cachefs.cli.main import main
from cachefs.cli.metrics_reference import metrics_reference
from cachefs.cli.reference import reference
from cachefs.model import CachefsError

TESTS = Path(__file__).parent
DOCS = TESTS.parent / "docs"
SEMANTICS = DOCS / "semantics.md"


def failures() -> str:
    """The part of operations.md with what fails."""
    return (DOCS / "operations.md").read_text().partition("## What fails, ")[2].partition("\n## ")[0]


def on_kubernetes() -> str:
    """The part of kubernetes.md with what is tested."""
    return (DOCS / "kubernetes.md").read_text().partition("## What is tested")[2].partition("\n## ")[0]


HEADS = ("|---", "| promise |", "| what fails |", "| csi-sanity |", "| what else |")


def test_every_promise_names_its_test() -> None:
    lines = [*SEMANTICS.read_text().splitlines(), *failures().splitlines(), *on_kubernetes().splitlines()]
    assert len(failures().splitlines()) > 25 and len(on_kubernetes().splitlines()) > 20
    for line in lines:
        if not line.startswith("|") or line.startswith(HEADS):
            continue
        _, named = line.strip("| ").rsplit(" | ", 1)
        names = re.findall(r"`([^`]+)`", named)
        assert names, f"no test is named: {line}"
        place = ""
        for name in names:
            path, *parts = name.split("::")
            place = path or place
            where = TESTS / place
            if where.is_dir():
                assert any(where.glob("test_*.py")), name
                continue
            assert where.is_file(), f"{name}: {line}"
            text = where.read_text()
            for part in parts:
                assert re.search(rf"^\s*(async def|def|class) {part}\b", text, re.MULTILINE), f"{name}: {line}"


def anchors(document: Path) -> set[str]:
    titles = re.findall(r"^##+ (.+)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", ["operations.md", "kubernetes.md"])
def test_links_lead_somewhere(name: str) -> None:
    for path, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", (DOCS / name).read_text()):
        document = DOCS / path if path else DOCS / name
        assert document.exists(), path
        assert not anchor or anchor in anchors(document), f"{path}#{anchor}"


WRITTEN = {path.name: path.read_text() for path in (TESTS.parent / "README.md", *sorted(DOCS.glob("*.md")))}
PLACES = {"$(hostname)": "node7", "DIR": "/dir"}
"""What stands for something else in commands that are to be typed."""


def shown_commands() -> Iterator[tuple[str, str, bool]]:
    """(document, command, whether it is one to be typed as it is) of all of ours; but for the generated reference."""
    for name, text in WRITTEN.items():
        if name == "reference.md":
            continue
        for kind, block in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            for line in re.sub(r"\\\n", " ", block).splitlines() if not kind else []:
                for part in re.split(r";|&&", line):
                    if part.strip().startswith("cachefs "):
                        yield name, part.strip(), "..." not in part
        for inline in re.findall(r"`(cachefs [^`]+)`", text):
            yield name, inline, False


def command_of(words: list[str]) -> tuple[click.Command, list[str]]:
    """Raises click.UsageError for one that there is not."""
    command: click.Command = main
    rest = words
    while isinstance(command, click.Group) and rest:
        _, found, rest = command.resolve_command(click.Context(command), rest)
        assert found is not None
        command = found
    return command, rest


def test_commands_that_are_shown_are_such_as_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in [each for each in os.environ if each.startswith("CACHEFS_")]:
        monkeypatch.delenv(variable)
    count = 0
    for name, text, is_whole in shown_commands():
        for place, example in PLACES.items():
            text = re.sub(rf"(?<![\w/]){re.escape(place)}(?!\w)", example, text)
        words = shlex.split(text, comments=True)[1:]
        try:
            command, rest = command_of(words)
            if is_whole:
                command.make_context("it", list(rest))
                count += 1
                continue
        except (click.UsageError, CachefsError) as error:
            raise AssertionError(f"{name}: {text}: {error}") from error
        flags = {flag for option in command.params for flag in (*option.opts, *option.secondary_opts)}
        used = {each.strip("[]").partition("=")[0] for each in rest if each.strip("[]").startswith("-")}
        assert used - {"...", "--help"} <= flags, f"{name}: {text}: {used - flags}"
    assert count > 50


@pytest.mark.parametrize("wrong", ["cachefs lode /x", "cachefs job darin 1"])
def test_a_command_that_there_is_not_is_found(wrong: str) -> None:
    with pytest.raises(click.UsageError):
        command_of(wrong.split()[1:])


def test_the_reference_is_that_of_the_commands() -> None:
    written = (DOCS / "reference.md").read_text()
    assert written == reference(), "run: python -m cachefs.cli.reference > docs/reference.md"


def test_the_table_of_metrics_is_that_of_their_declarations() -> None:
    written = (DOCS / "metrics.md").read_text()
    both = "(python -m cachefs.cli.metrics_reference; python -m cachefs_csi.metrics_reference)"
    assert written == metrics_reference() + csi_metrics_reference(), f"run: {both} > docs/metrics.md"
