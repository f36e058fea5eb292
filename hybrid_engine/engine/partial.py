"""What is left of a rollout that Ctrl-C or a callback's exception ended."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hybrid_engine.engine.rollout import TOKEN_COLUMNS, Rollout

_ATTRIBUTE = "partial_rollout"


@dataclass(frozen=True)
class PartialRollout:
    """The samples that were finished in time.

    Attributes:
        samples: their places in the whole rollout, ascending.
        rollout: those samples alone, each with its own prompt (so ``n`` is 1).
    """

    samples: list[int]
    rollout: Rollout


def partial_rollout(error: BaseException) -> PartialRollout | None:
    """What `HybridEngine.generate` had finished when ``error`` ended it; None if it had not begun.

    For example::

        try:
            rollout = engine.generate(prompts, params)
        except KeyboardInterrupt as error:
            partial = partial_rollout(error)
    """
    return getattr(error, _ATTRIBUTE, None)


def keep_finished(error: BaseException, prompts: list[list[int]], n: int) -> None:
    """Turns the columns that a generator left in ``error.partial`` into a `PartialRollout`."""
    columns: Mapping[str, Any] | None = getattr(error, "partial", None)
    if columns is None:
        return
    reasons = columns["finish_reasons"]
    samples = [i for i, reason in enumerate(reasons) if reason in ("stop", "length")]
    names = (*TOKEN_COLUMNS, "finish_reasons")
    finished: dict[str, Any] = {name: [columns[name][i] for i in samples] for name in names}
    finished |= {"prompts": [prompts[i // n] for i in samples], "counters": columns["counters"]}
    setattr(error, _ATTRIBUTE, PartialRollout(samples, Rollout(**finished)))
