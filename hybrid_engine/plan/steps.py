"""The three steps: what each of them loads, trains and computes, as holdings of one rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from hybrid_engine.config import RewardConfig, RunConfig, SFTConfig
from hybrid_engine.engine.deepspeed_config import complete

from .activations import Activations, PassShape
from .generation import (
    RolloutShape,
    cache_width,
    gather_holdings,
    merge_record,
    rollout_holdings,
)
from .holdings import ALWAYS, LOAD, Holding, StepPlan, always
from .limits import ranks_of_this_host
from .models import ModelSize, own_bytes, shared_blocks
from .sources import Sources
from .training import Trained, Zero


@dataclass(frozen=True)
class Work:
    """Rows of a rank: how many tokens it has in all, and how they are packed."""

    tokens: int
    longest: int
    most: int  # tokens of a pass

    @property
    def rows(self) -> int:
        """Of the largest pass."""
        return min(self.tokens, max(self.most, self.longest))

    @property
    def several(self) -> bool:
        return self.tokens > self.rows


class Planner:
    """Plans the steps of one run.

    Args:
        settings: DeepSpeed's, with the ZeRO stage: `Run.deepspeed_settings`.
        ranks: of the whole run.
        baseline: bytes of the process before it loads a model; 0 for a GPU, whose memory is
            planned alone.
    """

    def __init__(
        self, config: RunConfig, settings: dict[str, Any], ranks: int, baseline: int
    ) -> None:
        self.config = config
        self._ranks = ranks
        self._baseline = baseline
        self._sources = Sources(config)
        dtype = getattr(torch, config.model.dtype)
        self._zero = Zero.of(complete(settings, dtype, ranks, 1.0), ranks)
        self.width = 4 if config.model.device == "cpu" else dtype.itemsize

    @property
    def one_host(self) -> bool:
        """Whether all ranks are on one."""
        return ranks_of_this_host(self.config) == self._ranks

    def steps(self) -> list[StepPlan]:
        """In the order of the run."""
        plans: dict[int, Callable[[], StepPlan]] = {1: self._sft, 2: self._reward, 3: self._rlhf}
        return [plans[step]() for step in self.config.steps]

    def _sft(self) -> StepPlan:
        return self._supervised("sft", "policy", self._sources.start(), self.config.sft, 1)

    def _reward(self) -> StepPlan:
        model = self._sources.reward_start()
        return self._supervised("reward", "reward model", model, self.config.reward, 2)

    def _supervised(
        self, step: str, name: str, model: ModelSize, config: SFTConfig | RewardConfig, texts: int
    ) -> StepPlan:
        """`texts` to a row: a pair has two."""
        longest = self.config.data.max_length * texts
        work = Work(self.share(config.batch_size) * longest, longest, config.max_tokens_per_pass)
        scored = work.rows if texts == 1 else work.rows // self.config.data.max_length
        knobs = (f"{step}.max_tokens_per_pass", "data.max_length")
        dropout = self.config.model.lora_dropout > 0
        activations = self.activations(model, work.rows, scored, dropout)
        asked = ("evaluate.forward",)
        trained = Trained(
            name, activations, self._zero, texts == 1, work.several, knobs, asked=asked
        )
        heldout = self.share(self.config.data.max_heldout) * longest
        rows = Work(heldout, longest, config.max_tokens_per_pass).rows
        forward = self.activations(model, rows, rows).forward()
        return self._plan(
            step,
            [
                Holding("a forward pass", {asked[0]: forward}, knobs, longest=True),
                *trained.holdings(),
            ],
        )

    def _rlhf(self) -> StepPlan:
        return self._plan("rlhf", [*StepThree(self, self._sources, self._zero).holdings()])

    def activations(
        self, model: ModelSize, rows: int, scored: int, dropout: bool = False
    ) -> Activations:
        checkpointing = self.config.model.gradient_checkpointing
        shape = PassShape(rows, scored)
        return Activations(model, shape, self.width, checkpointing, dropout)

    def share(self, count: int) -> int:
        """Of one rank, the one with most."""
        return -(-count // self._ranks)

    def _plan(self, step: str, holdings: list[Holding]) -> StepPlan:
        if self.config.model.device != "cpu":
            holdings = [holding for holding in holdings if not holding.host]
        return StepPlan(step, self._baseline, tuple(holdings))


# Models are there, and DeepSpeed takes over the first, the second.
_LOADING = (f"{LOAD}.policy", f"{LOAD}.critic")
FROZEN = ("reference", "reward model", "original model")  # in this order; evaluated alone: the last


class StepThree:
    """Policy, reference, critic, reward model: generating, scoring, training, and evaluating, which
    is the first two.
    """

    def __init__(self, planner: Planner, sources: Sources, zero: Zero) -> None:
        self._planner = planner
        self._config = planner.config
        self._ppo = planner.config.rlhf
        self._zero = zero
        self._policy = sources.policy()
        self._critic = sources.critic() if self._ppo.uses_critic else None
        frozen = (
            None if self._config.model.lora_r else sources.reference(),
            sources.reward_model() if sources.needs_reward_model else None,
            sources.original() if self._config.judge.fluency else None,
        )
        named = zip(FROZEN, frozen, strict=True)
        self._frozen = {name: model for name, model in named if model is not None}

    def holdings(self) -> list[Holding]:
        models = [m for m in (self._policy, self._critic, *self._frozen.values()) if m is not None]
        sharing = self._zero.stage < 3
        own = own_bytes(models, sharing)
        stop = shared_blocks(models) if sharing else 0
        holdings = [self._loaded(models), *self._trained(own, stop)]
        frozen_own = own[len(own) - len(self._frozen) :]
        for (name, _), nbytes in zip(self._frozen.items(), frozen_own, strict=True):
            holdings.append(self._frozen_weights(name, nbytes))
        if self._ppo.ema_decay:
            nbytes = 4 * self._zero.part(self._policy.trained)
            holdings.append(always("average of the policy", nbytes, "rlhf.ema_decay"))
        return [*holdings, *self._generating(), *self._scoring(stop)]

    def _loaded(self, models: list[ModelSize]) -> Holding:
        """All of them whole, until DeepSpeed has made shards of the first."""
        whole = sum(model.nbytes for model in models)
        given_back = 0
        if self._zero.stage == 3:
            given_back = self._policy.nbytes - self._zero.part(self._policy.nbytes)
        at = dict(zip(_LOADING, (whole, whole - given_back), strict=True))
        return Holding("all models", at)

    def _frozen_weights(self, name: str, nbytes: int) -> Holding:
        knobs = ("model.dtype", "model.lora_r", "rlhf.frozen_models")
        on_gpu = self._config.model.device != "cpu"
        moments: tuple[str, ...] = (ALWAYS,)
        if on_gpu and self._ppo.frozen_models == "offload":
            moments = ("score.forward", "evaluate.score")
            if name == FROZEN[-1]:
                moments = moments[1:]
        return Holding(f"{name}: weights", dict.fromkeys(moments, nbytes), knobs)

    def _trained(self, own: list[int], stop: int) -> list[Holding]:
        work = self._training_work()
        rows, scored = work.rows, self._scored(work.rows)
        knobs = ("rlhf.max_tokens_per_pass", "data.max_prompt_tokens")
        asked = ("score.forward", "evaluate.score")

        def trained(name: str, model: ModelSize, nbytes: int, **rest: Any) -> Trained:
            activations = self._planner.activations(model, rows, scored)
            return Trained(
                name, activations, self._zero, name == "policy", work.several, knobs,
                own_bytes=nbytes, **rest,
            )  # fmt: skip

        lora = bool(self._config.model.lora_r)  # then the policy without adapters is the reference
        policy = trained("policy", self._policy, own[0], asked=asked if lora else ())
        if self._critic is None:
            return [*policy.holdings(), *self._taking_over(policy)]
        critic = trained(
            "critic", self._critic, own[1], asked=asked, others=tuple(policy.moments())
        )
        if work.several:
            policy = trained(
                "policy", self._policy, own[0],
                asked=asked if lora else (), others=tuple(critic.moments()[:-1]),
            )  # fmt: skip
        more = self._taking_over(policy, critic)
        if self._keeps_graph():
            saved = {"score.forward": critic.activations.saved()}
            more.append(Holding("critic: activations kept for its first step", saved, knobs, True))
        return [*policy.holdings(), *critic.holdings(), *more]

    def _taking_over(self, *engines: Trained) -> list[Holding]:
        """What DeepSpeed makes of loaded weights, one model after the other."""
        zero = self._zero
        moments = _LOADING[: len(engines)]
        weights = {moment: e.conversion() for moment, e in zip(moments, engines, strict=True)}
        so_far = accumulate(engine.masters() for engine in engines)
        masters = dict(zip(moments, so_far, strict=True))
        return [
            Holding("copies for training", weights, host=zero.parameters_on_host),
            Holding("their float32 masters", masters, host=zero.optimizer_on_host),
        ]

    def _keeps_graph(self) -> bool:
        """As in `stages.scoring`."""
        return self._ppo.minibatches == 1 and not self._scoring_work().several

    def _generating(self) -> list[Holding]:
        generation = self._ppo.generation
        width = cache_width(self._config.model.device, self._config.model.dtype)
        shares = {
            "generate.rollout": (self._ppo.prompts_per_iteration, generation.samples_per_prompt),
            "evaluate.rollout": (self._ppo.eval_prompts, 1),
        }
        holdings = []
        for moment, (prompts, samples) in shares.items():
            shape = RolloutShape(
                self._planner.share(prompts), self._prompt, samples, self._longest - self._prompt
            )
            holdings += rollout_holdings(self._policy, shape, generation, moment, width)
            if generation.merge_adapters:
                record = {moment: merge_record(self._policy)}
                holdings.append(
                    Holding("bits of merged weights", record, ("rlhf.generation.merge_adapters",))
                )
            else:
                holdings += gather_holdings(
                    self._policy, self._zero, generation, self._planner.one_host, moment
                )
        return holdings

    def _scoring(self, stop: int) -> list[Holding]:
        work, knobs = self._scoring_work(), ("rlhf.max_tokens_per_pass",)
        forward = self._planner.activations(self._policy, work.rows, work.rows).forward()
        passing = {"score.forward": forward, "evaluate.score": forward}
        holdings = [Holding("a forward pass", passing, knobs, longest=True)]
        if stop:
            width = self._policy.spec.hidden_size * self._planner.width
            evaluated = self._planner.share(self._ppo.eval_prompts) * self._longest
            hidden = {"score.forward": work.tokens * width, "evaluate.score": evaluated * width}
            moments = ("policy head", "policy top", "policy bottom", "critic top", "critic bottom")
            hidden |= {f"train.{m}": (work.tokens + work.rows) * width for m in moments}
            name = "hidden states of the shared blocks"
            holdings.append(Holding(name, hidden, ("rlhf.prompts_per_iteration",), longest=True))
        return holdings

    def _scoring_work(self) -> Work:
        share = self._planner.share(self._ppo.prompts_per_iteration)
        tokens = share * self._ppo.generation.samples_per_prompt * self._longest
        return Work(tokens, self._longest, self._ppo.max_tokens_per_pass)

    def _training_work(self) -> Work:
        samples = -(-self._ppo.samples_per_iteration // self._ppo.minibatches)
        tokens = self._planner.share(samples) * self._longest
        return Work(tokens, self._longest, self._ppo.max_tokens_per_pass)

    def _scored(self, rows: int) -> int:
        return -(-rows * (self._longest - self._prompt) // self._longest)

    @property
    def _prompt(self) -> int:
        return min(self._config.data.max_prompt_tokens, self._policy.spec.max_positions - 1)

    @property
    def _longest(self) -> int:
        """Tokens of prompt and answer."""
        whole = self._config.data.max_prompt_tokens + self._ppo.generation.max_new_tokens
        return min(whole, self._policy.spec.max_positions)
