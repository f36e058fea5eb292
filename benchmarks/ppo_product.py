"""The product's side of `bench_ppo`: step 3's own stage functions on given prompts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybrid_engine.config import (
    GenerationConfig,
    JudgeConfig,
    KLConfig,
    ModelConfig,
    OptimizerConfig,
    PPOConfig,
    RewardShapingConfig,
    RunConfig,
)
from hybrid_engine.data import PromptExample
from hybrid_engine.engine.rollout import Rollout
from hybrid_engine.report import Reporter
from hybrid_engine.rewards import build_rewards
from hybrid_engine.rl.kl import make_kl_controller
from hybrid_engine.run import Run
from hybrid_engine.stages.cast import STAGE, Schedule, assemble
from hybrid_engine.stages.rlhf import iterate
from hybrid_engine.stages.rollouts import Rollouts
from hybrid_engine.stages.scoring import Scored, Scorer
from hybrid_engine.stages.update import Updater

PHASES = ("generate", "score", "train")


def optimizer(learning_rate: float) -> OptimizerConfig:
    """transformers' AdamW without clipping, schedule or decay, as the peers are configured."""
    return OptimizerConfig(
        learning_rate=learning_rate,
        schedule="constant",
        warmup_ratio=0.0,
        betas=(0.9, 0.999),
        max_grad_norm=0.0,
    )


def ppo_config(
    *, prompts: int, new_tokens: int, learning_rate: float, **settings: Any
) -> PPOConfig:
    """One epoch, one minibatch; everything that TRL's defaults say is said here too."""
    n = settings.pop("samples_per_prompt", 1)
    return PPOConfig(
        prompts_per_iteration=prompts,
        epochs=1,
        minibatches=1,
        generation=GenerationConfig(max_new_tokens=new_tokens, samples_per_prompt=n),
        shaping=RewardShapingConfig(clip=0.0),
        kl=KLConfig(coef=settings.pop("kl_coef", 0.05)),
        actor_optimizer=optimizer(learning_rate),
        critic_optimizer=optimizer(learning_rate),
        **settings,
    )


@dataclass(frozen=True)
class Iteration:
    """What one iteration made, and the seconds of its phases."""

    rollout: Rollout
    scored: Scored
    metrics: dict[str, float]
    seconds: dict[str, float]


class Product:
    """Step 3 of `train_rlhf` between its reading of data and its writing of models.

    Args:
        policy: Hugging Face directory of actor and reference.
        scorer: of reward model and critic; without one, `judge` names the reward.
        output: where the run's log and metrics go.
    """

    def __init__(
        self,
        policy: Path,
        output: Path,
        config: PPOConfig,
        *,
        scorer: Path | None = None,
        rewards: tuple[str, ...] = ("model",),
        eos_ends: bool = True,
    ) -> None:
        self.run = Run(
            RunConfig(
                output_dir=str(output),
                model=ModelConfig(actor_model=str(policy), reward_model=str(scorer or "")),
                judge=JudgeConfig(rewards=rewards),
                rlhf=config,
            ),
            output,
            Reporter(output),
        )
        mix = build_rewards(self.run.config.judge)
        tokenizer = self.run.tokenizer(str(policy))
        cast = assemble(self.run, str(policy), tokenizer, Schedule(1, 1), mix.needs_model)
        if not eos_ends:
            cast.actor.eos_token_ids = ()
        self.cast = cast
        self.scorer = Scorer(cast, mix, make_kl_controller(config.kl), config)
        self.updater = Updater(cast, config)
        self.iterations = 0

    def __call__(self, prompts: Sequence[Sequence[int]]) -> Iteration:
        """One iteration: generate, score, train."""
        decode = self.cast.tokenizer.decode
        examples = [PromptExample(list(p), decode(list(p)), {}) for p in prompts]
        self.iterations += 1
        with self.run.reporter.stage(STAGE, self.iterations, self.iterations - 1):
            rollout, scored, values = iterate(
                self.run,
                Rollouts(self.run, self.cast, examples),  # without what it remembers of epochs
                self.scorer,
                self.updater,
                examples,
                list(range(len(examples))),
                self.iterations,
            )
            self.run.reporter.log(STAGE, self.iterations, values)
        return Iteration(rollout, scored, values, self._phase_seconds())

    def _phase_seconds(self) -> dict[str, float]:
        last = (self.run.output / "metrics.jsonl").read_text().splitlines()[-1]
        line = json.loads(last)
        return {phase: line[f"seconds_{phase}"] for phase in PHASES}

    def close(self) -> None:
        self.run.reporter.close()
