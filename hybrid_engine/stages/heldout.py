"""What RL did to held-out prompts: the same prompts and random streams before and after, compared
in pairs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from hybrid_engine.config import RunConfig
from hybrid_engine.data import PromptExample
from hybrid_engine.distributed.collectives import all_gather_json
from hybrid_engine.engine.passes import passes
from hybrid_engine.engine.sampling import SamplingParams
from hybrid_engine.models import CausalLM
from hybrid_engine.rewards import RewardMix
from hybrid_engine.stages.cast import Cast
from hybrid_engine.stages.loop import local_share
from hybrid_engine.stages.scoring import samples_of, score_with_models

# Keeps evaluation's random streams apart from those of training.
EVALUATION_STREAM = 1 << 62

Judge = Callable[[list[str]], list[float]]


@dataclass(frozen=True)
class Heldout:
    """One number a held-out prompt, in the order of the prompts; an empty list where nobody asked.

    Attributes:
        answers: the sampled continuations.
        reward: the weighted reward, unshaped.
        kl: log-ratio of policy to reference summed over the answer, in nats.
        tokens: answer length.
        finished: 1 where the answer ended by itself.
        judge: the unseen judge's score of prompt and answer.
        surprise: negative log-likelihood of the answer under the original model, summed, in nats.
    """

    answers: list[str]
    reward: list[float]
    kl: list[float]
    tokens: list[float]
    finished: list[float]
    judge: list[float]
    surprise: list[float]

    @property
    def surprise_per_token(self) -> float:
        return sum(self.surprise) / max(sum(self.tokens), 1)

    def means(self) -> dict[str, float]:
        """What the table shows of one evaluation."""
        values = {
            "reward": mean(self.reward),
            "kl": mean(self.kl),
            "answer_length": mean(self.tokens),
            "eos_rate": mean(self.finished),
        }
        if self.judge:
            values["judge"] = mean(self.judge)
        if self.surprise:
            values["nll_original"] = self.surprise_per_token
        return values


def measure(
    cast: Cast,
    prompts: Sequence[PromptExample],
    mix: RewardMix,
    judge: Judge | None,
    config: RunConfig,
) -> Heldout:
    """Samples one answer to each prompt and scores it in every way that training may have changed
    it.
    """
    share = local_share(range(len(prompts)))
    mine = [prompts[i] for i in share]
    generation = config.rlhf.generation
    params = SamplingParams(
        max_new_tokens=generation.max_new_tokens,
        temperature=generation.temperature,
        top_k=generation.top_k,
        top_p=generation.top_p,
        seed=config.seed,
        stop_token_ids=generation.stop_token_ids,
    )
    rollout = cast.actor.generate(
        [p.tokens for p in mine], params, [EVALUATION_STREAM + i for i in share]
    )
    models = score_with_models(cast, rollout, config.rlhf)
    samples = samples_of(rollout, mine, cast)
    local = Heldout(
        answers=[sample.answer for sample in samples],
        reward=mix(samples, models.rewards).total,
        kl=((rollout.padded_logprobs() - models.ref_logprobs) * rollout.mask()).sum(1).tolist(),
        tokens=[float(len(tokens)) for tokens in rollout.tokens],
        finished=[float(sample.finished) for sample in samples],
        judge=judge([sample.prompt + sample.answer for sample in samples]) if judge else [],
        surprise=surprise(cast, cast.original, rollout.sequences, rollout.prompt_lengths, config),
    )
    return gather(local, share)


@torch.no_grad()
def surprise(
    cast: Cast,
    original: CausalLM | None,
    sequences: Sequence[list[int]],
    prompt_lengths: Sequence[int],
    config: RunConfig,
) -> list[float]:
    """Negative log-likelihood of each answer under the original model; empty without one."""
    if original is None:
        return []
    sums: list[float] = []
    with cast.awake(original):
        for part in passes(sequences, prompt_lengths, config.rlhf.max_tokens_per_pass):
            logprobs = original(
                part.batch, part.rows, part.targets, 1.0, cast.trunk(part.batch)
            ).logprobs
            sizes = [len(sequences[i]) - prompt_lengths[i] for i in part.samples]
            sums.extend(-float(answer.double().sum()) for answer in logprobs.split(sizes))
    return sums


def gather(local: Heldout, share: Sequence[int]) -> Heldout:
    """Every rank's part, put back into the order of the prompts."""
    parts = all_gather_json([list(share), *(getattr(local, f.name) for f in fields(Heldout))])
    places = [i for part in parts for i in part[0]]
    columns = []
    for column in range(1, len(fields(Heldout)) + 1):
        values = [value for part in parts for value in part[column]]
        columns.append([values[at] for at in sorted(range(len(values)), key=places.__getitem__)])
    return Heldout(*columns)


def compare(before: Heldout, after: Heldout) -> dict[str, float]:
    """Before and after of each measure; `_se` is the standard error of the mean paired
    difference.
    """
    summary: dict[str, float] = {}
    for name in ("reward", "judge"):
        old, new = getattr(before, name), getattr(after, name)
        if old or name == "reward":
            differences = [b - a for a, b in zip(old, new, strict=True)]
            summary |= {
                f"{name}_before": mean(old),
                f"{name}_after": mean(new),
                f"{name}_se": standard_error(differences),
            }
    if before.surprise:
        summary |= {
            "nll_original_before": before.surprise_per_token,
            "nll_original_after": after.surprise_per_token,
        }
    for name, key in (("tokens", "answer_length"), ("finished", "eos_rate")):
        summary |= {
            f"{key}_before": mean(getattr(before, name)),
            f"{key}_after": mean(getattr(after, name)),
        }
    return summary | {
        "kl": mean(after.kl),
        "kl_se": standard_error(after.kl),
        "heldout_prompts": len(after.reward),
    }


def write_samples(
    path: Path, prompts: Sequence[PromptExample], before: Heldout, after: Heldout
) -> None:
    """One JSON object a held-out prompt: both answers and both rewards."""
    with path.open("w", encoding="utf-8") as file:
        for i, prompt in enumerate(prompts):
            row = {
                "prompt": prompt.text,
                "before": {"answer": before.answers[i], "reward": before.reward[i]},
                "after": {"answer": after.answers[i], "reward": after.reward[i]},
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def mean(values: Sequence[float]) -> float:
    """nan for no values."""
    return sum(values) / len(values) if values else math.nan


def standard_error(values: Sequence[float]) -> float:
    """Of the mean; zero for fewer than two values."""
    if len(values) < 2:
        return 0.0
    centre = mean(values)
    return math.sqrt(sum((v - centre) ** 2 for v in values) / (len(values) - 1) / len(values))
