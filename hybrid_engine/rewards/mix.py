"""The reward of training: a weighted sum of rewards of any kind."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hybrid_engine.config import JudgeConfig
from hybrid_engine.errors import UserError
from hybrid_engine.rewards.http_reward import HTTPReward
from hybrid_engine.rewards.model_reward import ModelReward
from hybrid_engine.rewards.python_reward import PythonReward
from hybrid_engine.rewards.sample import Reward, Sample, checked_scores

MODEL = "model"


@dataclass(frozen=True)
class RewardScores:
    """``total``: one number a sample.

    ``parts``: what each reward said, unweighted; None where it does not apply.
    """

    total: list[float]
    parts: dict[str, list[float | None]]


class RewardMix:
    """``sum_i weight_i * reward_i``.

    A reward that does not apply to a sample takes no part in its sum.
    """

    def __init__(self, rewards: list[tuple[str, float, Reward | None]]) -> None:
        """``rewards``: (name, weight, reward); None stands for step 2's model, whose scores the
        caller computes.
        """
        self._rewards = rewards

    @property
    def needs_model(self) -> bool:
        return any(reward is None for _, _, reward in self._rewards)

    def __call__(
        self, samples: Sequence[Sample], model_scores: Sequence[float] | None = None
    ) -> RewardScores:
        """Score a batch. ``model_scores``: step 2's model, needed when ``needs_model``.

        Raises UserError for scores that are not finite, and for a sample that no reward applies to.
        """
        if self.needs_model and model_scores is None:
            raise ValueError(
                "RewardMix: this mix contains 'model' and was called without model_scores"
            )
        if not samples:  # a rank without a share of the batch asks nobody
            return RewardScores([], {name: [] for name, _, _ in self._rewards})
        parts: dict[str, list[float | None]] = {}
        totals = [0.0] * len(samples)
        applied = [False] * len(samples)
        for name, weight, reward in self._rewards:
            scores = (
                checked_scores(model_scores, samples, MODEL) if reward is None else reward(samples)
            )
            parts[name] = scores
            for at, score in enumerate(scores):
                if score is not None:
                    totals[at] += weight * score
                    applied[at] = True
        if not all(applied):
            at = applied.index(False)
            raise UserError(
                f"no reward applies to sample {at} (prompt: {samples[at].prompt[:60]!r}): all "
                "returned None; "
                "add a reward that scores every sample"
            )
        return RewardScores(totals, parts)


def build_rewards(config: JudgeConfig, device: str = "cpu") -> RewardMix:
    """The mix that ``config.rewards`` describes.

    Raises UserError for a spec that means nothing or does not load.
    """
    rewards: list[tuple[str, float, Reward | None]] = []
    names: dict[str, int] = {}
    for entry in config.rewards:
        spec, weight = parse_weight(entry)
        reward = None if spec == MODEL else build_reward(spec, config, device)
        name = MODEL if reward is None else reward.name
        names[name] = names.get(name, 0) + 1
        rewards.append((name if names[name] == 1 else f"{name}#{names[name]}", weight, reward))
    return RewardMix(rewards)


def parse_weight(entry: str) -> tuple[str, float]:
    """``"spec*0.5"`` to ``("spec", 0.5)``; without a weight it is 1."""
    spec, star, number = entry.rpartition("*")
    if not star:
        return entry, 1.0
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not spec or not math.isfinite(weight):
        raise UserError(
            f"judge.rewards: {entry!r} has no number after '*'; write SPEC*WEIGHT, such as "
            "model*0.5"
        )
    return spec, weight


def build_reward(spec: str, config: JudgeConfig, device: str) -> Reward:
    if spec.startswith(("http://", "https://")):
        return HTTPReward(spec, config.http_timeout, config.http_retries)
    file, _, function = spec.rpartition(":")
    if file.endswith(".py") and function:
        return PythonReward(spec)
    if spec.endswith(".py"):
        raise UserError(f"judge.rewards: {spec!r} names no function; write FILE.py:FUNCTION")
    directory = Path(spec).expanduser()
    if directory.is_dir():
        return ModelReward(directory, device)
    raise UserError(
        f"judge.rewards: {spec!r} is neither 'model', a directory, FILE.py:FUNCTION nor "
        "http://HOST/PATH; "
        "check the spelling"
    )
