"""Which models the steps of a run load, known from their config.json alone."""

from __future__ import annotations

from pathlib import Path

from hybrid_engine.config import RunConfig
from hybrid_engine.models import DecoderSpec, LoRAConfig
from hybrid_engine.models.checkpoint_io import spec_of
from hybrid_engine.models.origin import find
from hybrid_engine.rewards import build_rewards

from .models import ModelSize, model_size


class Sources:
    """The models of a run by their role, each with what is trained of it.

    Equality of parameters, on which sharing depends, is followed from the start: a training gives
    what it trains another origin.

    Raises:
        UserError: a model that is not there.
        UnsupportedFamily: one that runs through transformers, of whose memory nothing is known.
    """

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._model = config.model
        self._output = Path(config.output_dir)
        self.needs_reward_model = build_rewards(config.judge).needs_model
        self._actor = _spec(config.model.actor_model)
        # Loading may need what resolving writes; a plan only reads.
        self._fine_tuned = 1 in config.steps or (self._output / "sft").is_dir()

    def original(self) -> ModelSize:
        """What the run starts from, frozen."""
        return self._size(self._actor, self._model.actor_model, frozen=True)

    def start(self) -> ModelSize:
        """The policy of step 1."""
        return self._trained(self._actor, self._model.actor_model)

    def policy(self) -> ModelSize:
        """The policy of step 3."""
        return self._trained(self._actor, self._policy_origins())

    def reference(self) -> ModelSize:
        return self._size(self._actor, self._policy_origins(), frozen=True)

    def reward_start(self) -> ModelSize:
        """The reward model of step 2."""
        named = self._model.reward_model
        spec = _spec(named) if named else self._actor
        layers = self._model.reward_trainable_layers or self._model.trainable_layers
        return self._trained(spec, named or self._policy_origins(), scalar=True, layers=layers)

    def critic(self) -> ModelSize:
        return self._scorer(frozen=False)

    def reward_model(self) -> ModelSize:
        return self._scorer(frozen=True)

    def _scorer(self, frozen: bool) -> ModelSize:
        made = 2 in self._config.steps or (self._output / "reward").is_dir()
        start = self.reward_start()
        if made:
            origins: dict[str, str] | str = self._written(start, "reward")
        elif self._model.reward_model:
            origins = self._model.reward_model
        else:  # a critic on the policy itself, with a new head
            origins = self._policy_origins()
        if frozen:
            return self._size(start.spec, origins, scalar=True, frozen=True)
        return self._trained(start.spec, origins, scalar=True)

    def _policy_origins(self) -> dict[str, str] | str:
        return self._written(self.start(), "sft") if self._fine_tuned else self._model.actor_model

    def _written(self, size: ModelSize, training: str) -> dict[str, str]:
        """Origins after a training; adapters are saved merged into the weights that they adapt."""
        origins = size.of_origin(training).origins()
        adapted = {n.removesuffix("lora_a") for n in origins if n.endswith("lora_a")}
        return origins | {f"{name}weight": training for name in adapted}

    def _trained(
        self,
        spec: DecoderSpec,
        origins: dict[str, str] | str,
        scalar: bool = False,
        layers: int = 0,
    ) -> ModelSize:
        lora = None
        if self._model.lora_r:
            lora = LoRAConfig(self._model.lora_r, target_modules=self._model.lora_target_modules)
        layers = layers or self._model.trainable_layers
        return model_size(
            spec,
            self._model.dtype,
            origins,
            scalar=scalar,
            lora=lora,
            trainable_layers=0 if lora else layers,
        )

    def _size(
        self,
        spec: DecoderSpec,
        origins: dict[str, str] | str,
        scalar: bool = False,
        frozen: bool = True,
    ) -> ModelSize:
        return model_size(spec, self._model.dtype, origins, scalar=scalar, frozen=frozen)


def model_directory(name: str) -> Path:
    """Where the model that a setting names has its config.json; an adapter's is its base's."""
    if name == "demo":
        from hybrid_engine.data.demo import ensure_demo_model

        return ensure_demo_model()
    return find(name).directory


def _spec(name: str) -> DecoderSpec:
    return spec_of(model_directory(name))
