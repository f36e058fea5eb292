"""One PPO update: several passes of clipped gradient steps over a scored rollout (Schulman et al.,
2017).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hybrid_engine.config import PPOConfig
from hybrid_engine.data import SFTExample
from hybrid_engine.distributed.collectives import all_gather_json, all_reduce_max, all_reduce_sums
from hybrid_engine.engine.passes import Pass, passes, span_passes
from hybrid_engine.models import Trunk
from hybrid_engine.rl.experience import Experience
from hybrid_engine.rl.largest import largest
from hybrid_engine.rl.losses import entropy_loss, policy_loss, ptx_loss, value_loss
from hybrid_engine.rl.metrics import Averages, add_policy_stats, add_value_stats
from hybrid_engine.rl.padding import spread
from hybrid_engine.stages.cast import Cast


class Updater:
    """Steps actor and critic over experience.

    Every loss is a sum over tokens divided by the minibatch's token count over all ranks, so
    gradients depend neither on how a minibatch is cut into passes nor on the number of ranks.
    """

    def __init__(
        self,
        cast: Cast,
        config: PPOConfig,
        demonstrations: Callable[[int], list[SFTExample]] | None = None,
    ) -> None:
        """`demonstrations` gives the PPO-ptx rows of this rank for a step of the policy's
        optimizer, by its number.
        """
        self.cast = cast
        self.config = config
        self.demonstrations = demonstrations

    def __call__(
        self,
        experience: Experience,
        seed: int,
        places: Sequence[int],
        total: int,
        train_policy: bool = True,
        critic_pass: Tensor | None = None,
    ) -> dict[str, float]:
        """Runs the epochs over a rollout; returns the metrics of all of them.

        `critic_pass` is the critic's forward of the first step, if scoring has kept it.
        `places` and `total` as in :meth:`Experience.minibatches`. `first_log_ratio` is the largest
        |log ratio| over the first minibatch, before any step: zero when generation and training
        agree on every token's probability.
        """
        averages = Averages()
        steps: dict[str, float] = {"epochs": 0}
        for epoch in range(self.config.epochs):
            divergence = Averages()
            count = min(self.config.minibatches, total)  # the last rollout may be a short one
            parts = experience.minibatches(count, hash_seed(seed, epoch), places, total)
            for index, minibatch in enumerate(parts):
                known = critic_pass if epoch == index == 0 else None
                drift = self._minibatch(minibatch, train_policy, averages, divergence, known)
                if train_policy and epoch == index == 0:
                    steps["first_log_ratio"] = all_reduce_max(drift)
                steps |= self._step(train_policy)
            steps["epochs"] += 1
            kl = divergence.result(all_gather_json).get("approx_kl", 0.0)
            if 0 < self.config.target_kl < kl:
                break
        return {**averages.result(all_gather_json), **steps}

    def _minibatch(
        self,
        minibatch: Experience,
        train_policy: bool,
        averages: Averages,
        divergence: Averages,
        critic_pass: Tensor | None,
    ) -> float:
        tokens = max(all_reduce_sums({"tokens": minibatch.num_tokens})["tokens"], 1.0)
        drifts: list[float] = []
        for part in passes(
            minibatch.sequences, minibatch.prompt_lengths, self.config.max_tokens_per_pass
        ):
            rows = minibatch.select(part.samples)
            trunk = self._trunk(part, rows)
            if self.cast.critic is not None:  # first: it may hold a graph already
                self._critic_pass(part, rows, trunk, tokens, averages, critic_pass)
            if train_policy:
                drifts.append(self._policy_pass(part, rows, trunk, tokens, averages, divergence))
        if train_policy and self.demonstrations is not None:
            self._demonstration_passes(self.demonstrations(self.cast.policy.steps), averages)
        return largest(drifts, default=0.0)

    def _policy_pass(
        self,
        part: Pass,
        rows: Experience,
        trunk: Trunk | None,
        tokens: float,
        averages: Averages,
        divergence: Averages,
    ) -> float:
        """Accumulates the policy's gradient; returns the largest |log ratio|."""
        temperature = self.config.generation.temperature
        scores = self.cast.policy(
            part.batch, part.rows, part.targets, temperature, trunk, rows.flat_thresholds
        )
        mask, width = rows.mask, rows.old_logprobs.shape[1]
        logprobs = spread(scores.logprobs, rows.lengths, width)
        loss, stats = policy_loss(logprobs, rows.old_logprobs, rows.advantages, mask, self.config)
        bonus, entropy = entropy_loss(
            spread(scores.entropies, rows.lengths, width), mask, self.config.entropy_coef
        )
        self.cast.policy.backward(loss + bonus, tokens)
        for sink in (averages, divergence):
            add_policy_stats(sink, stats)
        averages.add("policy_loss", loss.detach(), rows.num_tokens)
        averages.add("entropy", entropy, rows.num_tokens)
        drift = (logprobs.detach() - rows.old_logprobs).abs()
        return float(drift.max()) if drift.numel() else 0.0

    def _critic_pass(
        self,
        part: Pass,
        rows: Experience,
        trunk: Trunk | None,
        tokens: float,
        averages: Averages,
        values: Tensor | None,
    ) -> None:
        """Accumulates the critic's gradient; `values` are its forward, if that has been made."""
        assert self.cast.critic is not None
        assert rows.values is not None
        assert rows.returns is not None
        if values is None:
            values = self.cast.critic(part.batch, part.rows, trunk).float()
        padded = spread(values, rows.lengths, rows.values.shape[1])
        loss, stats = value_loss(padded, rows.values, rows.returns, rows.mask, self.config)
        self.cast.critic.backward(loss, tokens)
        add_value_stats(averages, stats)
        averages.add("value_loss", loss.detach(), rows.num_tokens)

    def _demonstration_passes(self, examples: Sequence[SFTExample], averages: Averages) -> None:
        """PPO-ptx: a language-modelling loss on demonstrations keeps what RL would forget."""
        sequences, spans = [e.tokens for e in examples], [e.spans for e in examples]
        local = sum(e.num_targets for e in examples)
        targets = max(all_reduce_sums({"targets": local})["targets"], 1.0)
        for part in span_passes(sequences, spans, self.config.max_tokens_per_pass):
            logprobs = self.cast.policy(part.batch, part.rows, part.targets).logprobs
            self.cast.policy.backward(ptx_loss(logprobs, self.config.ptx_coef), targets)
            averages.add("ptx_loss", -logprobs.detach().sum(), len(part.targets))

    def _step(self, train_policy: bool) -> dict[str, float]:
        done: dict[str, float] = {}
        if train_policy:
            done |= {"actor_lr": self.cast.policy.lr, "actor_grad_norm": self.cast.policy.step()}
        if self.cast.critic is not None:
            done |= {"critic_lr": self.cast.critic.lr, "critic_grad_norm": self.cast.critic.step()}
        return done

    def _trunk(self, part: Pass, rows: Experience) -> Trunk | None:
        if rows.trunks is None:
            return None
        if not part.samples:
            return self.cast.trunk(part.batch)
        hidden = part.batch.at_rows(torch.cat(rows.trunks))
        return Trunk(hidden, self.cast.shared_blocks)


def hash_seed(*parts: int) -> int:
    """A seed from several numbers; equal on all ranks and in a resumed run."""
    mixed = 0
    for part in parts:
        mixed = (mixed * 0x9E3779B97F4A7C15 + part + 1) % 2**63
    return mixed
