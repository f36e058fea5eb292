"""Steps 1 and 2: supervised fine-tuning and the reward model."""

from __future__ import annotations

from dataclasses import dataclass

from hybrid_engine.config.model import OptimizerConfig
from hybrid_engine.config.options import Options, option, require, section


@dataclass(frozen=True)
class SFTConfig(Options):
    """Step 1: supervised fine-tuning on answers (prompt tokens carry no loss)."""

    epochs: float = option(1.0, "passes over the step's rows", within="[0, inf)")
    max_steps: int = option(
        0, "stop after this many optimizer steps; 0 runs the epochs out", within="[0, inf)"
    )
    batch_size: int = option(32, "rows an optimizer step, over all ranks", within="[1, inf)")
    max_tokens_per_pass: int = option(
        4096,
        "most packed tokens in one forward pass; a batch takes as many as it needs",
        within="[1, inf)",
    )
    eval_steps: int = option(
        0,
        "evaluate on held-out rows every so many steps; 0 only before and after",
        within="[0, inf)",
    )
    save_steps: int = option(
        100, "write a resumable checkpoint every so many steps; 0 never", within="[0, inf)"
    )
    optimizer: OptimizerConfig = section(OptimizerConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_length("sft", self)


@dataclass(frozen=True)
class RewardConfig(Options):
    """Step 2: Bradley-Terry reward model on chosen and rejected answers."""

    epochs: float = option(1.0, "passes over the step's pairs", within="[0, inf)")
    max_steps: int = option(
        0, "stop after this many optimizer steps; 0 runs the epochs out", within="[0, inf)"
    )
    batch_size: int = option(32, "pairs an optimizer step, over all ranks", within="[1, inf)")
    max_tokens_per_pass: int = option(
        4096, "most packed tokens in one forward pass", within="[1, inf)"
    )
    margin: float = option(
        0.0,
        "the chosen score must win by this much; added to a row's own margin if it has one",
        within="[0, inf)",
    )
    centering: float = option(
        0.0,
        "weight of (chosen + rejected)^2, which keeps scores around zero",
        within="[0, inf)",
    )
    eval_steps: int = option(
        0,
        "evaluate on held-out pairs every so many steps; 0 only at the end",
        within="[0, inf)",
    )
    save_steps: int = option(
        100, "write a resumable checkpoint every so many steps; 0 never", within="[0, inf)"
    )
    optimizer: OptimizerConfig = section(OptimizerConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_length("reward", self)


def require_length(stage: str, config: SFTConfig | RewardConfig) -> None:
    require(config.epochs > 0 or config.max_steps > 0, f"{stage}: give epochs or max_steps above 0")
