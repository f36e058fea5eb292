"""One step of TRL's `GRPOTrainer`: rollout, reference, reward, update."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.peers.trl_phases import Stopwatch


class StepTimes(TrainerCallback):
    """Begin and end of the last step; what `train()` does around it does not count."""

    begin = end = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.begin = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.end = time.perf_counter()


class TrlGRPO:
    """fp32 on the CPU, one micro-batch, no gradient checkpointing; answers of full length.

    Args:
        prompts: texts that tokenise to equally many tokens.
        reward: TRL's kind of reward function.
    """

    def __init__(
        self,
        policy: Path,
        prompts: Sequence[str],
        n: int,
        new_tokens: int,
        learning_rate: float,
        reward: Callable[..., list[float]],
        output: Path,
    ) -> None:
        logging.getLogger("transformers").setLevel(logging.ERROR)
        config = GRPOConfig(
            output_dir=str(output),
            report_to=[],
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            max_steps=1,
            per_device_train_batch_size=len(prompts) * n,
            gradient_accumulation_steps=1,
            num_generations=n,
            num_iterations=1,
            max_completion_length=new_tokens,
            temperature=1.0,
            beta=0.05,
            loss_type="grpo",
            learning_rate=learning_rate,
            lr_scheduler_type="constant",
            optim="adamw_torch_fused",
            max_grad_norm=0.0,
            generation_kwargs={"eos_token_id": None},
        )
        model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)
        model.generation_config.eos_token_id = None
        self.times = StepTimes()
        self.trainer = GRPOTrainer(
            model,
            reward,
            config,
            Dataset.from_dict({"prompt": list(prompts)}),
            processing_class=AutoTokenizer.from_pretrained(policy, padding_side="left"),
            callbacks=[self.times],
        )
        self.trainer.eos_token_ids = []
        self.watch = Stopwatch()
        self.watch.watch(self.trainer, "_generate")
        self.watch.watch(self.trainer, "_generate_and_score_completions")

    def __call__(self) -> tuple[dict[str, float], int]:
        """Seconds of the step's phases, and completion tokens."""
        self.watch.reset()
        self.trainer.train()
        rollout = self.watch.seconds["_generate_and_score_completions"]
        generate = self.watch.seconds["_generate"]
        mask = self.watch.results["_generate_and_score_completions"]["completion_mask"]
        seconds = {
            "generate": generate,
            "score": rollout - generate,
            "train": self.times.end - self.times.begin - rollout,
        }
        return seconds, int(mask.sum())
