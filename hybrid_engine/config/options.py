"""How the config classes declare a setting: default, help, flag, choices, and the values it may
have.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from hybrid_engine.errors import UserError


def option(
    default: Any,
    help: str,
    flag: str | None = None,
    choices: tuple[str, ...] | None = None,
    within: str = "",
) -> Any:
    """A dataclass field with what the command line shows about it. Tuples are given as lists.

    `within` is the interval of its values (of the items, for a tuple), such as "[0, inf)".
    """
    metadata = {"help": help, "flag": flag, "choices": choices, "within": within}
    return field(default=default, metadata=metadata)


def section(cls: type) -> Any:
    """A nested group of options."""
    return field(default_factory=cls)


@dataclass(frozen=True)
class Options:
    """Base of the config classes: refuses values outside their intervals."""

    def __post_init__(self) -> None:
        for declared in dataclasses.fields(self):
            interval = declared.metadata.get("within", "")
            value = getattr(self, declared.name)
            for item in value if isinstance(value, tuple) else (value,):
                require(
                    not interval or lies_within(item, interval),
                    f"{declared.name} is {item}; give {in_words(interval)}",
                )


def require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def lies_within(value: float, interval: str) -> bool:
    """Whether a number lies in an interval such as "[0, 1)"; nan lies in none."""
    low, high = _ends(interval)
    above = value >= low if interval[0] == "[" else value > low
    below = value <= high if interval[-1] == "]" else value < high
    return above and below


def in_words(interval: str) -> str:
    """What to give instead: "0 or more", "a number above 0", "a number in [0, 1)"."""
    if not interval:
        return "another value"
    low, high = _ends(interval)
    if high < math.inf:
        return f"a number in {interval}"
    return f"{low:g} or more" if interval[0] == "[" else f"a number above {low:g}"


def _ends(interval: str) -> tuple[float, float]:
    low, high = map(float, interval[1:-1].split(","))
    return low, high
