"""What the three steps share: the configuration, the output directory, and how models enter and
leave it.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from hybrid_engine.checkpoint import Checkpoints
from hybrid_engine.config import OptimizerConfig, RunConfig
from hybrid_engine.distributed.collectives import broadcast_json
from hybrid_engine.errors import UserError
from hybrid_engine.report import Reporter

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from hybrid_engine.data import StageData
    from hybrid_engine.engine.train_engine import TrainEngine
    from hybrid_engine.models import (
        CausalLM,
        ForeignCausalLM,
        ForeignScalarModel,
        LoRAConfig,
        ScalarModel,
    )
    from hybrid_engine.models.saving import AnyModel

STAGE_OF_STEP = {1: "sft", 2: "reward", 3: "rlhf"}


@dataclass(frozen=True)
class Run:
    """One invocation of the trainer, on one rank."""

    config: RunConfig
    output: Path
    reporter: Reporter
    engines: list[TrainEngine] = field(default_factory=list)  # of the step that is running

    def finished(self, step: int) -> bool:
        """Whether this step's results are there and wanted: summary.json gets its entry last."""
        if self.config.overwrite:
            return False
        entry = self.reporter.summary().get(STAGE_OF_STEP[step], {})
        return bool(broadcast_json(entry.get("done", False)))

    def forget(self, stage: str) -> None:
        """Drops what earlier runs recorded about a stage that is about to be trained from its
        start; their models stay until the new ones take their place.

        With --overwrite the later steps of this run go with it. They would otherwise pass for done
        if this run were interrupted and resumed.
        """
        steps = {name: step for step, name in STAGE_OF_STEP.items()}
        later = [s for s in self.config.steps if self.config.overwrite and s > steps[stage]]
        for name in (stage, *(STAGE_OF_STEP[step] for step in later)):
            self.reporter.restart(name)
            self.checkpoints(name).clear()

    def finish(self, stage: str, values: Mapping[str, Any]) -> None:
        """Records a stage's results; its checkpoints have done their duty."""
        self.reporter.summarize(stage, {**values, "done": True})
        self.checkpoints(stage).clear()

    def checkpoints(self, stage: str) -> Checkpoints:
        return Checkpoints(self.output / "checkpoints" / stage, self.config.keep_checkpoints)

    # Which weights a step starts from

    def policy_source(self, stage: str) -> str:
        """The policy that `stage` starts from: step 1's result for the later steps, if there is
        one.
        """
        fine_tuned = self.output / "sft"
        if stage != "sft" and fine_tuned.is_dir():
            return str(fine_tuned)
        return self.starting_actor()

    def reward_source(self) -> str:
        """What the reward model is initialised from."""
        named = self.config.model.reward_model
        return self.resolve(named, "reward") if named else self.policy_source("reward")

    def trained_reward_model(self) -> str:
        """The reward model of step 2, or the one that the user brings.

        Raises:
            UserError: neither exists, or the user's has no trained head.
        """
        from hybrid_engine.models.checkpoint_files import locate
        from hybrid_engine.rewards.model_reward import check_has_score

        source = self._reward_model_at_hand()
        if source is None:
            raise UserError(
                f"step 3 needs a reward model and {self.output / 'reward'} does not exist: run "
                "step 2 first (--steps 2 3), or give a trained one with --reward-model"
            )
        check_has_score(
            locate(source),
            f"reward model {source}",
            "train it in step 2 first (--steps 2 3), or give a trained one with --reward-model",
        )
        return source

    def critic_source(self, needs_reward_model: bool) -> str:
        """What the value model starts from: the reward model where one scores the answers. Where
        other rewards do, any model serves, if need be the policy with a new head.
        """
        if needs_reward_model:
            return self.trained_reward_model()
        return self._reward_model_at_hand() or self.policy_source("rlhf")

    def _reward_model_at_hand(self) -> str | None:
        trained = self.output / "reward"
        if trained.is_dir():
            return str(trained)
        named = self.config.model.reward_model
        return self.resolve(named, "reward") if named else None

    def starting_actor(self) -> str:
        """What --actor-model names."""
        return self.resolve(self.config.model.actor_model, "actor")

    def resolve(self, name: str, role: str) -> str:
        """The directory or hub name of a model that the user names; an adapter is merged into its
        base first, in OUTPUT/start.
        """
        if name == "demo":
            from hybrid_engine.data.demo import ensure_demo_model

            return str(ensure_demo_model())
        if not names_adapter(name):
            return name
        from hybrid_engine.merged_start import merged_start

        directory = self.output / "start" / role
        if merged_start(name, directory, self.config.model.dtype):
            self.reporter.note(f"{name} is an adapter: merged with its base in {directory}")
        return str(directory)

    # Loading

    def load_policy(self, source: str, dropout: bool = False) -> CausalLM | ForeignCausalLM:
        """The policy to be trained; `dropout` says whether its adapters have theirs."""
        from hybrid_engine.models import load_causal_lm, placed

        model = self.config.model
        policy = load_causal_lm(
            source,
            model.dtype,
            self._lora(dropout),
            model.trainable_layers,
            self.config.seed,
            base_bits=model.lora_base_bits,
        )
        policy.gradient_checkpointing = model.gradient_checkpointing
        return placed(policy)

    def load_scalar(
        self, source: str, trainable_layers: int = 0, dropout: bool = False
    ) -> ScalarModel | ForeignScalarModel:
        """A reward or value model: a trained one with its head, or a language model with a new
        one. `trainable_layers` 0 takes the policy's; `dropout` as for it.
        """
        from hybrid_engine.models import load_scalar_model, placed

        model = self.config.model
        scalar = load_scalar_model(
            source,
            model.dtype,
            self._lora(dropout),
            trainable_layers or model.trainable_layers,
            self.config.seed,
            base_bits=model.lora_base_bits,
        )
        scalar.gradient_checkpointing = model.gradient_checkpointing
        return placed(scalar)

    def _lora(self, dropout: bool) -> LoRAConfig | None:
        from hybrid_engine.models import LoRAConfig

        model = self.config.model
        if not model.lora_r:
            return None
        return LoRAConfig(
            model.lora_r,
            model.lora_alpha,
            model.lora_dropout if dropout else 0.0,
            model.lora_target_modules,
            model.lora_rslora,
        )

    def load_frozen(self, load: Callable[..., Any], source: str) -> Any:
        """A model that is only asked, never trained: `load` is load_causal_lm or
        load_scalar_model.
        """
        from hybrid_engine.models import placed

        return placed(load(source, self.config.model.dtype).requires_grad_(False).eval())

    def tokenizer(self, source: str) -> Any:
        from hybrid_engine.models import load_tokenizer

        return load_tokenizer(source)

    def load_data(self, stage: str, source: str, tokenizer: Any) -> StageData:
        """The rows of a step, tokenised for the model at `source`, whose end tokens end the
        answers.
        """
        from hybrid_engine.data import load_stage
        from hybrid_engine.engine.end_tokens import end_tokens_of

        self._check_context(source)
        end_tokens = end_tokens_of(source, tokenizer)
        data = load_stage(self.config.data, stage, tokenizer, self.config.seed, end_tokens)
        self.reporter.note(
            f"{stage}: {len(data.train)} rows to train on, {len(data.heldout)} held out"
        )
        for reason, count in data.left_out.items():
            self.reporter.note(f"{stage}: {count} rows left out: {reason}")
        return data

    def _check_context(self, source: str) -> None:
        """A row that is too long for the model must not come up in the middle of training."""
        from hybrid_engine.models.checkpoint_io import context_of

        context = context_of(source)
        if self.config.data.max_length > context:
            raise UserError(
                f"data.max_length ({self.config.data.max_length}) is more than the model's context "
                f"of {context} tokens; lower it"
            )

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A phase of the step that is running, reported. What it has gathered and freed goes back
        before the next begins.
        """
        from hybrid_engine.plan import trim_heap

        with self.reporter.phase(name):
            yield
        for engine in self.engines:
            engine.release_gathered()
        trim_heap()

    # Training and saving

    def deepspeed_settings(self) -> dict[str, Any]:
        """See `deepspeed_config.settings_of`."""
        from hybrid_engine.engine.deepspeed_config import settings_of

        return settings_of(self.config)

    @property
    def zero_stage(self) -> int:
        return self.deepspeed_settings()["zero_optimization"]["stage"]

    def train_engine(
        self, module: Any, optimizer: OptimizerConfig, total_steps: int, name: str
    ) -> TrainEngine:
        from hybrid_engine.engine.train_engine import TrainEngine

        engine = TrainEngine(
            module,
            optimizer,
            total_steps,
            self.deepspeed_settings(),
            name,
            self.config.model.verify_frozen,
        )
        self.engines.append(engine)
        return engine

    def close_engines(self) -> None:
        """The step is over; the next one needs room."""
        while self.engines:
            self.engines.pop().close()
        gc.collect()  # they hold each other

    def save_model(
        self,
        engine: TrainEngine,
        directory: Path,
        tokenizer: Any,
        replace: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Writes step 3's models: Hugging Face directories, or adapters in PEFT's format; `replace`
        holds averaged parameters to show in place of the trained ones.
        """
        from hybrid_engine.models import save_adapter, save_model

        with engine.parameters_replaced(replace or {}):
            if self.config.model.lora_r:
                merged = self.config.model.lora_merge
                save_adapter(cast("AnyModel", engine.module), directory, tokenizer, merged)
            else:
                save_model(cast("AnyModel", engine.module), directory, tokenizer)

    def save_start(self, engine: TrainEngine, directory: Path, tokenizer: Any) -> None:
        """Writes a model that later steps start from: whole, with its adapter in `adapter/`."""
        from hybrid_engine.models import save_model

        save_model(cast("AnyModel", engine.module), directory, tokenizer, adapter=True)


def names_adapter(name: str) -> bool:
    """Whether a path or hub name leads to a PEFT adapter."""
    from hybrid_engine.models.checkpoint_files import is_adapter, locate_any

    return is_adapter(locate_any(name))
