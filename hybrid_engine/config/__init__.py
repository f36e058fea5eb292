"""Every setting of a run, typed and nested. The command line, YAML and OUTPUT/config.yaml are
generated from these classes.

A field declared through :func:`option` carries its help text and, where the setting deserves a
short name, its top-level flag (``--actor-model``); every field also answers to its dotted name
(``--rlhf.kl.coef 0.05``).
"""

from __future__ import annotations

from dataclasses import dataclass

from hybrid_engine.config.data import DataConfig
from hybrid_engine.config.model import ModelConfig, OptimizerConfig
from hybrid_engine.config.options import Options, option, require, section
from hybrid_engine.config.rlhf import (
    GenerationConfig,
    JudgeConfig,
    KLConfig,
    PPOConfig,
    RewardShapingConfig,
)
from hybrid_engine.config.supervised import RewardConfig, SFTConfig

__all__ = [
    "SEEDS",
    "DataConfig",
    "GenerationConfig",
    "JudgeConfig",
    "KLConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PPOConfig",
    "RewardConfig",
    "RewardShapingConfig",
    "RunConfig",
    "SFTConfig",
]

SEEDS = f"[0, {2**63})"  # what the sampling kernel's counter takes


@dataclass(frozen=True)
class RunConfig(Options):
    """A whole run."""

    steps: tuple[int, ...] = option((1, 2, 3), "which of the three steps to run", "--steps")
    output_dir: str = option("output", "where models, metrics and checkpoints go", "--output-dir")
    seed: int = option(0, "seed of everything random", "--seed", within=SEEDS)
    resume: bool = option(
        False, "continue from the last checkpoint in the output directory", "--resume"
    )
    overwrite: bool = option(
        False, "train steps anew that the output directory has already", "--overwrite"
    )
    num_gpus: int = option(
        0,
        "processes (ranks) to start on this machine; the kernels run on the CPU; 0 runs in "
        "this process",
        "--num-gpus",
    )
    deepspeed: str = option("", "your DeepSpeed JSON, merged over our settings", "--deepspeed")
    zero_stage: int = option(0, "ZeRO stage of the trained models: 0, 1, 2 or 3", "--zero-stage")
    memory_check: str = option(
        "refuse",
        "what a run does that cannot fit into memory: refuse to start, or warn",
        "--memory-check",
        choices=("refuse", "warn"),
    )
    memory_limit: float = option(
        0.0,
        "memory of a rank to plan for, in GB (10^9 bytes); 0 takes what the machine has",
        "--memory-limit",
        within="[0, inf)",
    )
    keep_checkpoints: int = option(2, "older resumable checkpoints are deleted", within="[1, inf)")
    model: ModelConfig = section(ModelConfig)
    data: DataConfig = section(DataConfig)
    sft: SFTConfig = section(SFTConfig)
    reward: RewardConfig = section(RewardConfig)
    rlhf: PPOConfig = section(PPOConfig)
    judge: JudgeConfig = section(JudgeConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            len(self.steps) > 0
            and set(self.steps) <= {1, 2, 3}
            and list(self.steps) == sorted(set(self.steps)),
            f"--steps is {list(self.steps)}; give some of 1 2 3, in order",
        )
        require(
            self.zero_stage in (0, 1, 2, 3), f"--zero-stage is {self.zero_stage}; give 0, 1, 2 or 3"
        )
        require(self.num_gpus >= 0, f"--num-gpus is {self.num_gpus}; give 0 or more")
        require(
            self.model.lora_r > 0 or not self.rlhf.generation.merge_adapters,
            "rlhf.generation.merge_adapters has nothing to merge: model.lora_r is 0; give --lora-r "
            "a rank",
        )
        require(
            not (self.model.lora_base_bits and self.rlhf.generation.merge_adapters),
            "rlhf.generation.merge_adapters needs the weights that model.lora_base_bits quantizes; "
            "give one of the two",
        )
        require(
            not (self.resume and self.overwrite),
            "--resume and --overwrite contradict each other; give one",
        )
