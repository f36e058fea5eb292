"""The largest of several numbers, where nan must not get lost."""

from __future__ import annotations

import math
from collections.abc import Iterable


def largest(values: Iterable[float], default: float = -math.inf) -> float:
    """Their maximum, nan if one of them is nan, `default` if there are none.

    Python's max(0.0, nan) is 0.0: what it is meant to warn of would look like perfect agreement.
    """
    found = list(values)
    return math.nan if any(map(math.isnan, found)) else max(found, default=default)
