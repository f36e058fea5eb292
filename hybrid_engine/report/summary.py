"""The table at the end of a run: before and after of every stage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hybrid_engine.report.text import duration, number


def print_summary(summary: Mapping[str, Mapping[str, Any]], console: Console | None = None) -> None:
    """Prints summary.json's content. ``x_before`` and ``x_after`` share a row, with ``x_se`` at their difference."""
    console = console or Console(highlight=False)
    table = Table(box=box.SIMPLE_HEAD, title="Summary", title_justify="left", pad_edge=False)
    for heading in ("step", "metric"):
        table.add_column(heading)
    for heading in ("before", "after", "change"):
        table.add_column(heading, justify="right")
    for stage, values in summary.items():
        for index, row in enumerate(rows(values)):
            table.add_row(*map(Text, (stage if index == 0 else "", *row)), end_section=index == len(values) - 1)
    console.print(table)


def rows(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """(metric, before, after, change) of one stage; a metric without a 'before' fills the 'after' column alone."""
    for key, value in values.items():
        name = prefix + key
        stem = key.removesuffix("_before").removesuffix("_after").removesuffix("_se")
        if isinstance(value, Mapping):
            yield from rows(value, f"{name}.")
        elif stem != key and f"{stem}_before" in values and f"{stem}_after" in values:
            if key.endswith("_after"):
                yield (prefix + stem, *compared(values[f"{stem}_before"], value, values.get(f"{stem}_se")))
        elif key == "nonfinite":
            yield name, "", ", ".join(map(str, value)), ""
        else:
            seconds = "seconds" in name and isinstance(value, (int, float))
            yield name, "", duration(value) if seconds else number(value), ""


def compared(before: Any, after: Any, error: Any) -> tuple[str, str, str]:
    numbers = isinstance(before, (int, float)) and isinstance(after, (int, float))
    change = f"{after - before:+.4g}" if numbers else ""
    if numbers and isinstance(error, (int, float)):
        change += f" ± {error:.2g}"
    return number(before), number(after), change
