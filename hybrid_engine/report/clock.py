"""Where the time of a stage goes: exclusive seconds and tokens of every phase."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Visit:
    """A phase that is running."""

    name: str
    began: float
    tokens: int = 0


class PhaseClock:
    """Phases may nest; the seconds of an inner one are not the outer one's, so that all of them add
    up to the whole.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._stack: list[Visit] = []
        self._since = now()
        self.began = self._since
        self.seconds: dict[str, float] = defaultdict(float)  # of the whole stage
        self._recent_seconds: dict[str, float] = defaultdict(float)  # since the last take()
        self._recent_tokens: dict[str, int] = defaultdict(int)

    @contextmanager
    def phase(self, name: str) -> Iterator[Visit]:
        self._charge()
        self._stack.append(Visit(name, self._since))
        try:
            yield self._stack[-1]
        finally:
            self._charge()
            self._stack.pop()

    @property
    def current(self) -> Visit | None:
        return self._stack[-1] if self._stack else None

    def count(self, tokens: int) -> None:
        """`tokens` handled so far in this visit of the current phase."""
        if self._stack:
            visit = self._stack[-1]
            self._recent_tokens[visit.name] += tokens - visit.tokens
            visit.tokens = tokens

    def rate(self) -> float:
        """Tokens a second in this visit of the current phase; 0 when there are none."""
        visit = self.current
        elapsed = self._now() - visit.began if visit else 0.0
        return visit.tokens / elapsed if visit and elapsed > 0 else 0.0

    def elapsed(self) -> float:
        return self._now() - self.began

    def take(self) -> dict[str, float]:
        """Seconds, and tokens a second where counted, of each phase since the last call.

        Keys: ``seconds_<phase>`` and ``tokens_per_second_<phase>``.
        """
        self._charge()
        taken: dict[str, float] = {
            f"seconds_{name}": seconds for name, seconds in self._recent_seconds.items()
        }
        for name, tokens in self._recent_tokens.items():
            if tokens and self._recent_seconds[name] > 0:
                taken[f"tokens_per_second_{name}"] = tokens / self._recent_seconds[name]
        self._recent_seconds.clear()
        self._recent_tokens.clear()
        return taken

    def _charge(self) -> None:
        now = self._now()
        if self._stack:
            self.seconds[self._stack[-1].name] += now - self._since
            self._recent_seconds[self._stack[-1].name] += now - self._since
        self._since = now
