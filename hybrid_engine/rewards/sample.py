"""What a reward judges, and the check of what it answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from hybrid_engine.errors import UserError

EXCERPT = 60  # characters of a prompt shown in an error


@dataclass(frozen=True)
class Sample:
    """One prompt and one answer.

    ``finished`` is false when the answer was cut at the token limit; ``extra`` holds the data row's
    other columns.
    """

    prompt: str
    answer: str
    prompt_tokens: list[int]
    answer_tokens: list[int]
    finished: bool
    extra: dict[str, Any] = field(default_factory=dict)


class Reward(Protocol):
    """Scores a batch; None where it does not apply to a sample."""

    name: str

    def __call__(self, samples: Sequence[Sample]) -> list[float | None]: ...


def checked_scores(scores: Any, samples: Sequence[Sample], source: str) -> list[float | None]:
    """The scores as finite floats or None, one a sample.

    Raises UserError naming ``source``, the sample and its prompt.
    """
    if hasattr(scores, "tolist"):  # an array or tensor
        scores = scores.tolist()
    if not isinstance(scores, list | tuple):
        raise UserError(
            f"reward {source} returned {type(scores).__name__}; return a list of numbers, one a "
            "sample"
        )
    if len(scores) != len(samples):
        raise UserError(
            f"reward {source} returned {len(scores)} scores for {len(samples)} samples; return "
            "one each"
        )
    return [
        checked_score(score, index, samples[index], source) for index, score in enumerate(scores)
    ]


def checked_score(score: Any, index: int, sample: Sample, source: str) -> float | None:
    if score is None:
        return None
    if hasattr(score, "item"):  # a numpy or torch scalar
        score = score.item()
    problem = ""
    if not isinstance(score, int | float):
        problem = f"a {type(score).__name__} ({score!r:.40})"
    elif not math.isfinite(score):
        problem = str(score)
    if problem:
        prompt = " ".join(sample.prompt.split())
        excerpt = prompt if len(prompt) <= EXCERPT else prompt[: EXCERPT - 3] + "..."
        raise UserError(
            f"reward {source} returned {problem} for sample {index} (prompt: {excerpt!r}); "
            "return a finite number, or None where it does not apply"
        )
    return float(score)
