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
    """Prints summary.json's content. ``x_before`` and ``x_after`` (or ``x``) share a row; ``x_se``
    stands at their difference.
    """
    console = console or Console(highlight=False)
    table = Table(box=box.SIMPLE_HEAD, title="Summary", title_justify="left", pad_edge=False)
    for heading in ("step", "metric"):
        table.add_column(heading)
    for heading in ("before", "after", "change"):
        table.add_column(heading, justify="right")
    for stage, values in summary.items():
        for index, row in enumerate(rows(values)):
            table.add_row(*map(Text, (stage if index == 0 else "", *row)))
        table.add_section()
    console.print(table)


def rows(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """(metric, before, after, change) of one stage; a metric without a 'before' fills the 'after'
    column alone.
    """
    for key, value in values.items():
        stem = key.removesuffix("_after")
        if isinstance(value, Mapping):
            yield from rows(value, f"{prefix}{key}.")
        elif isinstance(value, bool) or is_part_of_another(key, values):
            continue
        elif f"{stem}_before" in values:
            yield (
                prefix + stem,
                *compared(values[f"{stem}_before"], value, values.get(f"{stem}_se")),
            )
        else:
            yield prefix + key, "", single(prefix + key, value, values.get(f"{key}_se")), ""


def is_part_of_another(key: str, values: Mapping[str, Any]) -> bool:
    """Whether `key` is the 'before' or the standard error of a metric that has its own row."""
    for suffix in ("_before", "_se"):
        stem = key.removesuffix(suffix)
        if stem != key and (stem in values or f"{stem}_after" in values):
            return True
    return False


def single(name: str, value: Any, error: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if "seconds" in name and is_number(value):
        return f"{value:.1f} s" if value < 60 else duration(value)
    return number(value) + (f" ± {error:.2g}" if is_number(error) else "")


def compared(before: Any, after: Any, error: Any) -> tuple[str, str, str]:
    change = f"{after - before:+.4g}" if is_number(before) and is_number(after) else ""
    if change and is_number(error):
        change += f" ± {error:.2g}"
    return number(before), number(after), change


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float))
