"""The models of step 3: who is trained, who is frozen, and what they share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from hybrid_engine.engine.hybrid import HybridEngine
from hybrid_engine.engine.train_engine import TrainEngine
from hybrid_engine.models import (
    CausalLM,
    ForeignScalarModel,
    PackedBatch,
    Resting,
    ScalarModel,
    TokenScores,
    Trunk,
    adapters_disabled,
    compute_trunk,
    load_causal_lm,
    load_scalar_model,
    share_frozen_trunk,
)
from hybrid_engine.models.checkpoint_files import has_score_head, locate
from hybrid_engine.run import Run

STAGE = "rlhf"


@dataclass(frozen=True)
class Cast:
    """Actor and critic are trained; reference and reward model are frozen.

    Attributes:
        actor: generates and learns; `actor.train_engine` trains it.
        critic: value model, initialised from the reward model; None for group-relative advantages.
        reference: the policy before training; None means the actor without its LoRA adapters.
        reward_model: None when every reward comes from elsewhere.
        original: the model that the whole run started from, which judges fluency; None if nobody
            asks.
        shared_blocks: leading blocks that are frozen and equal in all of them, so that their output
            is computed once.
        resting: reference, reward model and original, if they wait in the host's memory.
    """

    actor: HybridEngine
    critic: TrainEngine | None
    reference: CausalLM | None
    reward_model: ScalarModel | None
    original: CausalLM | None
    shared_blocks: int
    tokenizer: Any
    resting: Resting | None = None

    @property
    def policy(self) -> TrainEngine:
        assert self.actor.train_engine is not None
        return self.actor.train_engine

    def trunk(self, batch: PackedBatch) -> Trunk | None:
        """Output of the shared blocks on a batch, without gradient; None if nothing is shared."""
        if not self.shared_blocks:
            return None
        assert isinstance(self.actor.model, CausalLM)  # only native models share
        return compute_trunk(self.actor.model, batch, self.shared_blocks)

    def awake(self, *frozen: CausalLM | ScalarModel | None) -> AbstractContextManager[None]:
        """Those models, of reference, reward model and original, can be asked inside."""
        if self.resting is None:
            return nullcontext()
        return self.resting.awake(*(model for model in frozen if model is not None))

    @torch.no_grad()
    def reference_scores(
        self,
        batch: PackedBatch,
        rows: torch.Tensor,
        targets: torch.Tensor,
        temperature: float,
        trunk: Trunk | None,
    ) -> TokenScores:
        """What the reference policy thinks of `targets`."""
        if self.reference is not None:
            return self.reference(batch, rows, targets, temperature, trunk)
        with adapters_disabled(self.actor.model):
            return self.policy(batch, rows, targets, temperature, trunk)


@dataclass(frozen=True)
class Schedule:
    """Optimizer steps of the whole of step 3: while the critic warms up, the actor makes none."""

    actor: int
    critic: int


def assemble(
    run: Run, source: str, tokenizer: Any, steps: Schedule, needs_reward_model: bool
) -> Cast:
    """Loads the models of step 3 and hands the trained ones to DeepSpeed."""
    config = run.config
    run.reporter.note(f"{STAGE}: the policy starts from {source}")
    actor = run.load_policy(source)
    # With adapters switched off the actor is the policy that it started as.
    reference = None if config.model.lora_r else run.load_frozen(load_causal_lm, source)
    original = None
    if config.judge.fluency:
        original = run.load_frozen(load_causal_lm, run.starting_actor())
    critic = reward_model = None
    if config.rlhf.uses_critic:
        critic = load_critic(run, run.critic_source(needs_reward_model))
    if needs_reward_model:
        scorer = run.trained_reward_model()
        run.reporter.note(f"{STAGE}: the reward model is {scorer}")
        reward_model = run.load_frozen(load_scalar_model, scorer)
    everyone = [
        model for model in (actor, reference, critic, reward_model, original) if model is not None
    ]
    natives = [model for model in everyone if isinstance(model, (CausalLM, ScalarModel))]
    shared = 0
    # Equal codes under unequal scales would pass for equal weights.
    plain = run.zero_stage < 3 and not config.model.lora_base_bits
    if len(natives) == len(everyone) and plain:
        shared = share_frozen_trunk(natives)
    policy = run.train_engine(actor, config.rlhf.actor_optimizer, steps.actor, "actor")
    critic_engine = None
    if critic is not None:
        critic_engine = run.train_engine(
            critic, config.rlhf.critic_optimizer, steps.critic, "critic"
        )
    engine = HybridEngine(
        actor,
        tokenizer,
        policy,
        max_batch=config.rlhf.generation.max_batch,
        kv_bytes=config.rlhf.generation.kv_bytes,
        weight_bytes=config.rlhf.generation.weight_bytes,
        score_tokens=config.rlhf.max_tokens_per_pass,
        merge_adapters=config.rlhf.generation.merge_adapters,
        inference_tp=config.rlhf.generation.inference_tp,
        on_plan=lambda line: run.reporter.note(f"{STAGE}: {line}"),
    )
    resting = None
    frozen = [model for model in (reference, reward_model, original) if model is not None]
    if frozen and config.rlhf.frozen_models == "offload":
        resting = Resting(frozen, [actor] if critic is None else [actor, critic])
        run.reporter.note(
            f"{STAGE}: {resting.nbytes / 1e9:.2f} GB of frozen models wait in the host's memory "
            "and come to the GPU to score"
        )
    return Cast(
        engine, critic_engine, reference, reward_model, original, shared, tokenizer, resting
    )


def load_critic(run: Run, source: str) -> ScalarModel | ForeignScalarModel:
    """The value model, with a word on where its head comes from."""
    head = "" if has_score_head(locate(source)) else ", with a new value head"
    run.reporter.note(f"{STAGE}: the critic starts from {source}{head}")
    return run.load_scalar(source)


@contextmanager
def both_training(cast: Cast) -> Iterator[None]:
    """Actor and critic in their training phase."""
    with cast.actor.training():
        if cast.critic is None:
            yield
            return
        cast.critic.module.train()
        try:
            yield
        finally:
            cast.critic.module.eval()
