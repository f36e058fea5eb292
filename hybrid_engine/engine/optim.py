"""The optimizer's parameter groups and its learning-rate schedule."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from hybrid_engine.config import OptimizerConfig
from hybrid_engine.errors import UserError


def build_adamw(module: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; vectors (biases, norm weights) are exempt from decay.

    Loshchilov, Hutter (2019). The fused implementation reads and writes every state once.
    """
    trainable = [p for p in module.parameters() if p.requires_grad]
    if not trainable:
        raise UserError(
            "the model has no trainable parameter; check model.trainable_layers and model.lora_r"
        )
    matrices = [p for p in trainable if p.dim() >= 2]
    vectors = [p for p in trainable if p.dim() < 2]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    beta1, beta2 = config.betas
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(beta1, beta2),
        eps=config.eps,
        fused=True,
    )


def learning_rate(step: int, total_steps: int, config: OptimizerConfig) -> float:
    """Learning rate of optimizer step `step` (0-based) out of `total_steps`.

    Warm-up: lr (step + 1) / (w + 1) for the first w = ceil(warmup_ratio total) steps, so that no
    step has rate zero. Then with progress p in [0, 1] from the end of warm-up to the last step:
    constant 1, linear 1 - p, cosine (1 + cos(pi p)) / 2, raised above min_lr_ratio.
    Steps past the end keep the last rate.
    """
    warmup = math.ceil(config.warmup_ratio * total_steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    decay = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
    }[config.schedule]
    if config.schedule == "constant":
        return config.learning_rate
    return config.learning_rate * (config.min_lr_ratio + (1.0 - config.min_lr_ratio) * decay)
