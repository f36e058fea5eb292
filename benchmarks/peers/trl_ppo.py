"""One PPO iteration of TRL: `trl.experimental.ppo.PPOTrainer`, which 1.12 still has."""

from __future__ import annotations

import copy
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from benchmarks.peers.trl_phases import Stopwatch

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

PAD = "<|endoftext|>"  # SmolLM2's padding token ends its answers; TRL needs another


@dataclass(frozen=True)
class PPOOutcome:
    """`responses` end at the stop token, which is theirs."""

    seconds: dict[str, float]
    prompts: list[list[int]]
    responses: list[list[int]]
    metrics: dict[str, float]


class TrlPPO:
    """fp32 on the CPU, one micro-batch, no gradient checkpointing: its fastest configuration."""

    def __init__(
        self,
        policy: Path,
        scorer: Path,
        prompts: Sequence[Sequence[int]],
        new_tokens: int,
        learning_rate: float,
        output: Path,
        stop_token: int | None = None,
    ) -> None:
        logging.getLogger("transformers").setLevel(logging.ERROR)
        tokenizer = AutoTokenizer.from_pretrained(policy, padding_side="left")
        tokenizer.pad_token = PAD
        self.pad, self.stop_token = tokenizer.pad_token_id, stop_token
        self.context = max(map(len, prompts))
        config = PPOConfig(
            output_dir=str(output),
            report_to=[],
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            save_strategy="no",
            disable_tqdm=True,
            num_sample_generations=0,
            per_device_train_batch_size=len(prompts),
            local_rollout_forward_batch_size=len(prompts),
            gradient_accumulation_steps=1,
            num_mini_batches=1,
            num_ppo_epochs=1,
            total_episodes=len(prompts),
            response_length=new_tokens,
            stop_token_id=stop_token,
            temperature=1.0,
            learning_rate=learning_rate,
            lr_scheduler_type="constant",
            optim="adamw_torch_fused",
            logging_steps=1,
        )
        language = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)
        judge = AutoModelForSequenceClassification.from_pretrained(scorer, dtype=torch.float32)
        self.trainer = PPOTrainer(
            config,
            tokenizer,
            language,
            copy.deepcopy(language),
            copy.deepcopy(judge).requires_grad_(False),
            Dataset.from_dict({"input_ids": [list(p) for p in prompts]}),
            judge,
        )
        self.watch = Stopwatch()
        self.watch.watch(ppo_trainer, "batch_generation")
        self.watch.watch(self.trainer.accelerator, "accumulate")
        self.logged: dict[str, float] = {}
        self.trainer.log = self.logged.update

    def __call__(self) -> PPOOutcome:
        self.watch.reset()
        start = time.perf_counter()
        self.trainer.train()
        end = time.perf_counter()
        generate = self.watch.seconds["batch_generation"]
        trained = self.watch.first_calls["accumulate"]
        seconds = {
            "generate": generate,
            "score": trained - start - generate,
            "train": end - trained,
        }
        rows, _ = self.watch.results["batch_generation"]
        prompts, responses = self._unpadded(rows)
        return PPOOutcome(seconds, prompts, responses, dict(self.logged))

    def _unpadded(self, rows: Any) -> tuple[list[list[int]], list[list[int]]]:
        """Prompts, padded on the left to the longest, and what was generated after them."""
        prompts = [[t for t in row if t != self.pad] for row in rows[:, : self.context].tolist()]
        responses = []
        for row in rows[:, self.context :].tolist():
            if self.stop_token in row:
                row = row[: row.index(self.stop_token) + 1]
            responses.append(row)
        return prompts, responses
