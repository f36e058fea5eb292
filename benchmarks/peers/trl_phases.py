"""Where TRL's trainers spend their time, watched from outside."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


class Stopwatch:
    """Sums the seconds spent in watched functions, and remembers what one of them returned."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.results: dict[str, Any] = {}
        self.first_calls: dict[str, float] = {}

    def reset(self) -> None:
        self.seconds.clear()
        self.results.clear()
        self.first_calls.clear()

    def watch(self, owner: Any, attribute: str) -> None:
        """Replaces `owner.attribute` by itself, watched."""
        function: Callable[..., Any] = getattr(owner, attribute)

        def watched(*arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            self.first_calls.setdefault(attribute, start)
            result = function(*arguments, **options)
            spent = time.perf_counter() - start
            self.seconds[attribute] = self.seconds.get(attribute, 0.0) + spent
            self.results[attribute] = result
            return result

        setattr(owner, attribute, watched)
