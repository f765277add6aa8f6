"""Tables for people: nothing of a value is cut off, and nothing in it is taken for markup."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

_IN_A_PIPE = 1000
"""Columns: whoever searches the output is not to meet paths in two pieces."""


def table_of(columns: Iterable[str], rows: Iterable[Iterable[str | Text]], title: str | None = None) -> Table:
    """A Text is a cell with a style."""
    heading = Text(title, style="italic") if title is not None else None
    table = Table(*(Column(name, overflow="fold") for name in columns), title=heading)
    for row in rows:
        table.add_row(*(cell if isinstance(cell, Text) else Text(cell) for cell in row))
    return table


def print_tables(*tables: Table) -> None:
    console = Console(width=None if sys.stdout.isatty() else _IN_A_PIPE)
    for table in tables:
        console.print(table)
