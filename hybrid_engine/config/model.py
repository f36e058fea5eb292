"""Which weights are trained, and how."""

from __future__ import annotations

from dataclasses import dataclass

from hybrid_engine.config.options import Options, option, require


@dataclass(frozen=True)
class ModelConfig(Options):
    """Which weights are trained, and which part of them."""

    actor_model: str = option(
        "demo",
        "policy to start from: directory, hub name, or 'demo' (SmolLM2-135M-Instruct)",
        "--actor-model",
    )
    reward_model: str = option(
        "",
        "model to start the reward model from; empty takes the fine-tuned actor",
        "--reward-model",
    )
    dtype: str = option(
        "float32", "parameter type", "--dtype", choices=("float32", "bfloat16", "float16")
    )
    device: str = option(
        "cpu",
        "where models live: cpu, or cuda, which gives every rank the GPU of its local number",
        "--device",
        choices=("cpu", "cuda"),
    )
    trainable_layers: int = option(
        0,
        "train only the last N blocks (and the final norm); 0 trains all of them",
        within="[0, inf)",
    )
    reward_trainable_layers: int = option(
        0,
        "the same for step 2's reward model, which may need more; 0 takes trainable_layers",
        within="[0, inf)",
    )
    lora_r: int = option(
        0,
        "rank of LoRA adapters on the blocks' linear layers; 0 trains the weights themselves",
        "--lora-r",
        within="[0, inf)",
    )
    lora_alpha: float = option(16.0, "LoRA's scale is alpha / r", "--lora-alpha", within="(0, inf)")
    lora_dropout: float = option(
        0.0,
        "LoRA's dropout in steps 1 and 2; step 3 trains the very network that generates, without",
        "--lora-dropout",
        within="[0, 1)",
    )
    lora_target_modules: tuple[str, ...] = option(
        ("all-linear",),
        "layers that get an adapter, by transformers' names (q_proj v_proj ..., c_attn ...) or by "
        "regular expressions of whole names, or all-linear",
        "--lora-target-modules",
    )
    lora_rslora: bool = option(
        False, "LoRA's scale is alpha / sqrt(r) instead (rsLoRA)", "--lora-rslora"
    )
    lora_base_bits: int = option(
        0,
        "keep the frozen weights of the blocks in 4 or 8 bits (QLoRA; needs bitsandbytes); 0 keeps "
        "them as they are",
        "--lora-base-bits",
    )
    lora_merge: bool = option(
        False,
        "write step 3's models merged as well, beside their adapters",
        "--lora-merge",
    )
    verify_frozen: bool = option(
        False,
        "check after every optimizer step and every rollout that weights which are not trained "
        "have kept their bits",
        "--verify-frozen",
    )
    gradient_checkpointing: bool = option(
        False, "recompute activations in the backward pass, block by block"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            not (self.lora_r and (self.trainable_layers or self.reward_trainable_layers)),
            "model.lora_r and model.trainable_layers (or reward_trainable_layers) are both set; "
            "choose one way of training part of the model",
        )
        require(
            len(self.lora_target_modules) > 0,
            "model.lora_target_modules is empty; give all-linear, or names of layers",
        )
        require(
            not self.verify_frozen
            or bool(self.lora_r or self.trainable_layers or self.reward_trainable_layers),
            "model.verify_frozen is set, but all weights are trained; give --lora-r a rank, or "
            "model.trainable_layers a number",
        )
        require(
            self.lora_base_bits in (0, 4, 8),
            f"model.lora_base_bits is {self.lora_base_bits}; give 4 or 8, or 0",
        )
        for name in ("alpha", "dropout", "target_modules", "rslora", "base_bits", "merge"):
            setting = f"lora_{name}"
            require(
                self.lora_r > 0 or getattr(self, setting) == getattr(ModelConfig, setting),
                f"model.{setting} is set, but model.lora_r is 0: no adapter is trained; give "
                "--lora-r a rank",
            )


@dataclass(frozen=True)
class OptimizerConfig(Options):
    """AdamW and its schedule."""

    learning_rate: float = option(1e-5, "peak learning rate", within="(0, inf)")
    schedule: str = option(
        "cosine", "learning-rate decay", choices=("cosine", "linear", "constant")
    )
    warmup_ratio: float = option(
        0.03, "share of the steps spent warming up linearly", within="[0, 1)"
    )
    min_lr_ratio: float = option(
        0.0, "learning rate at the end, relative to the peak", within="[0, 1]"
    )
    weight_decay: float = option(
        0.0, "decoupled weight decay; biases and norms are exempt", within="[0, inf)"
    )
    betas: tuple[float, ...] = option((0.9, 0.95), "Adam moment decay rates", within="[0, 1)")
    eps: float = option(1e-8, "Adam epsilon", within="(0, inf)")
    max_grad_norm: float = option(
        1.0, "gradient clipping by global norm; 0 does not clip", within="[0, inf)"
    )
    max_bad_steps: int = option(
        3,
        "stop after this many consecutive steps with a non-finite loss or gradient",
        within="[1, inf)",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(len(self.betas) == 2, f"betas has {len(self.betas)} entries; give two")
