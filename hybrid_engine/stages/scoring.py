"""From a rollout to experience: reference, values, rewards, advantages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hybrid_engine.config import PPOConfig
from hybrid_engine.data import PromptExample
from hybrid_engine.distributed.collectives import all_reduce_moments
from hybrid_engine.engine.passes import passes
from hybrid_engine.engine.rollout import Rollout
from hybrid_engine.models import unpack
from hybrid_engine.rewards import RewardMix, RewardScores, Sample
from hybrid_engine.rl.advantages import gae, per_token, whiten
from hybrid_engine.rl.experience import Experience
from hybrid_engine.rl.group import ESTIMATORS
from hybrid_engine.rl.kl import FixedKL, k1, k3
from hybrid_engine.rl.moments import RunningMoments, moments_of
from hybrid_engine.rl.padding import length_mask, spread
from hybrid_engine.rl.rewards import ShapedScores, shape_scores, token_rewards
from hybrid_engine.stages.cast import Cast


@dataclass(frozen=True)
class ModelScores:
    """What the models say about B responses, T the longest. Without a critic or a reward model:
    None.

    Attributes:
        ref_logprobs: [B, T] reference log-probabilities of the response tokens.
        values: [B, T] value of the state before each response token.
        critic_pass: [sum of lengths] the same, row after row, with the graph behind them; if kept.
        rewards: [B] the reward model's score at the last token.
        trunks: hidden states of each sequence where the shared frozen blocks end.
    """

    ref_logprobs: Tensor
    values: Tensor | None
    rewards: list[float] | None
    trunks: list[Tensor] | None
    critic_pass: Tensor | None


@torch.no_grad()
def score_with_models(
    cast: Cast, rollout: Rollout, config: PPOConfig, *, for_update: bool = False
) -> ModelScores:
    """One packed forward of every model over the rollout; blocks they share run once.

    Where an update follows whose first step takes the whole rollout in one pass, the critic's
    forward is that of the step, too: same rows, same weights. Its graph is kept then.
    """
    ref: list[Tensor] = []
    values: list[Tensor] = []
    rewards: list[float] = []
    trunks: list[Tensor] = []
    parts = list(passes(rollout.sequences, rollout.prompt_lengths, config.max_tokens_per_pass))
    keeps_graph = for_update and config.minibatches == len(parts) == 1
    temperature = config.generation.temperature
    with cast.awake(cast.reference, cast.reward_model):
        for part in parts:
            trunk = cast.trunk(part.batch)
            scored = part.batch, part.rows, part.targets
            ref.append(cast.reference_scores(*scored, temperature, trunk).logprobs)
            if cast.critic is not None:
                with torch.set_grad_enabled(keeps_graph):
                    values.append(cast.critic(part.batch, part.rows, trunk).float())
            if cast.reward_model is not None:
                rewards.extend(cast.reward_model(part.batch, part.last, trunk).float().tolist())
            if trunk is not None and part.samples:
                trunks.extend(unpack(trunk.hidden, part.batch))
    width = max(map(len, rollout.tokens), default=0)

    def padded(flat: list[Tensor]) -> Tensor:
        return spread(torch.cat(flat) if flat else torch.empty(0), rollout.lengths, width)

    return ModelScores(
        padded(ref),
        padded(values) if cast.critic is not None else None,
        rewards if cast.reward_model is not None else None,
        trunks if cast.shared_blocks else None,
        values[0] if values and keeps_graph else None,
    )


def samples_of(rollout: Rollout, prompts: Sequence[PromptExample], cast: Cast) -> list[Sample]:
    """The responses as text, for rewards that read text."""
    decode = cast.tokenizer.decode
    return [
        Sample(
            prompt=prompts[i // rollout.n].text,
            answer=decode(tokens, skip_special_tokens=True),
            prompt_tokens=prompts[i // rollout.n].tokens,
            answer_tokens=tokens,
            finished=rollout.finish_reasons[i] == "stop",
            extra=prompts[i // rollout.n].extra,
        )
        for i, tokens in enumerate(rollout.tokens)
    ]


@dataclass(frozen=True)
class Scored:
    """Experience for the update, and what the report shows of it."""

    experience: Experience
    raw: RewardScores
    shaped: ShapedScores
    kl: Tensor
    """k1 of each response, summed over its tokens: [B] nats."""
    kl_k3: Tensor
    """k3 likewise: the same expectation with less variance, for the report alone."""
    critic_pass: Tensor | None
    """See :class:`ModelScores`."""


class Scorer:
    """Turns rollouts into experience, with the state that goes from one to the next."""

    def __init__(self, cast: Cast, mix: RewardMix, kl: FixedKL, config: PPOConfig) -> None:
        self.cast = cast
        self.mix = mix
        self.kl = kl
        self.config = config
        self.moments = RunningMoments()

    def __call__(self, rollout: Rollout, prompts: Sequence[PromptExample]) -> Scored:
        config, lengths = self.config, rollout.lengths
        models = score_with_models(self.cast, rollout, config, for_update=True)
        raw = self.mix(samples_of(rollout, prompts, self.cast), models.rewards)
        scores = torch.tensor(raw.total, dtype=torch.float32)
        self.moments.update(all_reduce_moments(moments_of(scores)))
        finished = torch.tensor(
            [reason == "stop" for reason in rollout.finish_reasons], dtype=torch.bool
        )
        limit = config.generation.max_new_tokens
        shaped = shape_scores(scores, finished, lengths, limit, config.shaping, self.moments)
        # Policy and reference are compared over the whole vocabulary. The reference has no kept set
        # of its own, and a policy at rest would pay for the truncation of its samples.
        logprobs = rollout.padded_logprobs()
        truncated = config.generation.truncated
        mask = length_mask(lengths, logprobs.shape[1])
        kl = k1(logprobs, models.ref_logprobs) * mask
        rewards = token_rewards(shaped.scores, kl, lengths, self.kl.coef)
        advantages, returns = self._advantages(rewards, models.values, lengths)
        if config.whiten_advantages and config.advantage in ("gae", "reinforce_baseline"):
            advantages = whiten(advantages, mask, all_reduce_moments)
        experience = Experience(
            prompts=[prompt for prompt in rollout.prompts for _ in range(rollout.n)],
            tokens=rollout.tokens,
            lengths=lengths,
            old_logprobs=rollout.padded_kept_logprobs(),
            ref_logprobs=models.ref_logprobs,
            rewards=rewards,
            advantages=advantages,
            values=models.values,
            returns=returns,
            thresholds=rollout.padded_thresholds() if truncated else None,
            trunks=models.trunks,
        )
        k3_sum = (k3(logprobs, models.ref_logprobs) * mask).sum(1)
        return Scored(experience, raw, shaped, kl.sum(1), k3_sum, models.critic_pass)

    def _advantages(
        self, rewards: Tensor, values: Tensor | None, lengths: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """GAE on token rewards; without a critic each response's total (KL penalty included)
        against its group's.
        """
        config = self.config
        if values is not None:
            return gae(rewards, values, lengths, config.gamma, config.lam)
        group = ESTIMATORS[config.advantage](rewards.sum(1), config.generation.samples_per_prompt)
        return per_token(group, lengths, rewards.shape[1]), None
