"""Numbers and foreign text made fit for a terminal and for JSON."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping
from typing import Any

SPARKS = "▁▂▃▄▅▆▇█"


def printable(text: str) -> str:
    """`text` with control characters escaped (models may write them, terminals would obey them);
    newline and tab stay.
    """
    return "".join(
        _escape(char) if unicodedata.category(char) in ("Cc", "Cs") else char for char in text
    )


def _escape(char: str) -> str:
    return char if char in "\n\t" else char.encode("unicode_escape").decode()


def one_line(text: str) -> str:
    return " ".join(printable(text).split())


def to_plain(value: Any) -> Any:
    """Tensors and arrays as Python numbers or lists; tuples as lists; anything else as it is."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    return value


def finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON-safe `values`: NaN and infinities become None and their keys are listed under
    "nonfinite".

    JSON has no NaN; writing one anyway would break every strict reader of the file.
    """
    lost: list[str] = []
    cleaned = {key: _finite(to_plain(value), key, lost) for key, value in values.items()}
    return {**cleaned, "nonfinite": lost} if lost else cleaned


def _finite(value: Any, path: str, lost: list[str]) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        lost.append(path)
        return None
    if isinstance(value, dict):
        return {key: _finite(item, f"{path}.{key}", lost) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item, f"{path}[{index}]", lost) for index, item in enumerate(value)]
    return value


def number(value: Any) -> str:
    """A value in at most nine characters: 0.12345 -> '0.1235', -0.00012345 -> '-1.23e-04'."""
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return one_line(str(value))
    if isinstance(value, int) or not math.isfinite(value) or 1000 <= abs(value) < 1e7:
        return f"{value:.0f}"
    return f"{value:.2e}" if 0 < abs(value) < 1e-3 or abs(value) >= 1e7 else f"{value:.4g}"


def duration(seconds: float | None) -> str:
    """Seconds as 0:07, 12:05 or 3:04:05; '-' when unknown."""
    if seconds is None:
        return "-"
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def sparkline(values: list[float]) -> str:
    """The course of `values` in one character each, scaled between their extremes."""
    known = [value for value in values if isinstance(value, (int, float)) and math.isfinite(value)]
    if len(known) < 2:
        return ""
    low, high = min(known), max(known)
    scale = (len(SPARKS) - 1) / (high - low) if high > low else 0.0
    return "".join(SPARKS[round((value - low) * scale)] for value in known)
