"""The documents say what is so: every promise of semantics.md, and every line on what fails, names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cachefs.cli.metrics_reference import metrics_reference
from cachefs.cli.reference import reference

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


def test_the_reference_is_that_of_the_commands() -> None:
    written = (DOCS / "reference.md").read_text()
    assert written == reference(), "run: python -m cachefs.cli.reference > docs/reference.md"


def test_the_table_of_metrics_is_that_of_their_declarations() -> None:
    written = (DOCS / "metrics.md").read_text()
    assert written == metrics_reference(), "run: python -m cachefs.cli.metrics_reference > docs/metrics.md"
