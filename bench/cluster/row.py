"""One promise, and what became of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Row:
    what: str
    required: float
    measured: float
    at_most: bool = True
    note: str = ""

    @property
    def reached(self) -> bool:
        return self.measured <= self.required if self.at_most else self.measured >= self.required

    @property
    def must(self) -> str:
        return f"{'<=' if self.at_most else '>='} {self.required:,.10g}"
