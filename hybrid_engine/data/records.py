"""What a row is, where it came from, and how it is refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Origin:
    """Place of a row: a line of a text file, or a row of a table (both counted from 1)."""

    file: str
    line: int
    is_table: bool = False

    def __str__(self) -> str:
        return f"{self.file}, row {self.line}" if self.is_table else f"{self.file}:{self.line}"


STEPS = ("sft", "reward", "rlhf")


@dataclass(frozen=True)
class Kind:
    """A row's form: the columns it needs, those it may have, and the steps it can serve."""

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    steps: tuple[str, ...] = STEPS

    @property
    def labelled(self) -> bool:
        return "label" in self.required


@dataclass(frozen=True)
class Record:
    """One validated row. ``fields`` uses our column names; columns outside its kind ride along."""

    fields: dict[str, Any]
    origin: Origin
    kind: Kind


class BadRow(Exception):
    """A row that cannot be used: the reason and the remedy; the caller adds the place."""
