"""transformers' `generate` under DeepSpeed's ZeRO-3 hooks, as DeepSpeed-Chat calls it: every
forward pass gathers each module's parameters and lets go of them again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import deepspeed
import torch
from transformers import AutoModelForCausalLM, GenerationConfig


class HFZero3:
    """Prompts of one length in, token lists out; nothing ends before its limit."""

    def __init__(self, directory: Path) -> None:
        # Serves tensor-parallel inference only, and compiles for a minute.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        settings = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": 3},
            "zero_allow_untested_optimizer": True,
        }
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
        self._engine, *_ = deepspeed.initialize(model=model, config=settings, optimizer=optimizer)
        self._engine.eval()
        model.generation_config = GenerationConfig()

    def generate(
        self, prompts: Sequence[Sequence[int]], new_tokens: int, *, greedy: bool = False
    ) -> list[list[int]]:
        """Samples at temperature 1, or takes the likeliest."""
        config = GenerationConfig(
            max_new_tokens=new_tokens,
            do_sample=not greedy,
            top_k=0 if not greedy else None,
            pad_token_id=0,
            eos_token_id=None,
            disable_compile=True,
        )
        ids = torch.tensor(prompts)
        with torch.no_grad():
            out = self._engine.module.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                generation_config=config,
                synced_gpus=True,
            )
        return out[:, ids.shape[1] :].tolist()
