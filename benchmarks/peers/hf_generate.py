"""transformers' `generate`: fp32 or bf16 weights, SDPA attention, dynamic or static cache."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    StoppingCriteria,
    StoppingCriteriaList,
)

CACHES = ("dynamic", "static")
PROBE_STEPS = 8


class StopAt(StoppingCriteria):
    """Row i is done after `lengths[i]` new tokens; the batch runs until all are."""

    def __init__(self, prompt_length: int, lengths: Sequence[int]) -> None:
        self.ends = torch.tensor(lengths) + prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        return input_ids.shape[1] >= self.ends


class HFGenerator:
    """Prompts of one length in, token lists out; nothing ends before its limit."""

    def __init__(self, directory: Path, dtype: torch.dtype = torch.float32) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype, attn_implementation="sdpa"
        ).eval()
        self.model.generation_config = GenerationConfig()

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        new_tokens: int,
        *,
        cache: str = "dynamic",
        n: int = 1,
        greedy: bool = False,
        stop: StoppingCriteria | None = None,
    ) -> list[list[int]]:
        """Samples at temperature 1 (or takes the likeliest), n answers to each prompt."""
        config = GenerationConfig(
            max_new_tokens=new_tokens,
            do_sample=not greedy,
            top_k=0 if not greedy else None,
            cache_implementation=cache,
            num_return_sequences=n,
            pad_token_id=0,
            eos_token_id=None,
            disable_compile=True,  # a CPU is not among the devices that transformers compiles for
        )
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            out = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                generation_config=config,
                stopping_criteria=StoppingCriteriaList([stop] if stop else []),
            )
        return out[:, ids.shape[1] :].tolist()

    def generate_to(
        self, prompts: Sequence[Sequence[int]], lengths: Sequence[int], cache: str, at_once: int
    ) -> list[list[int]]:
        """Rows that stop at lengths of their own, `at_once` in a batch. A batch runs as long as its
        longest row, so that sorting rows by length, known beforehand as by an oracle, wastes least.
        """
        order = sorted(range(len(prompts)), key=lambda i: -lengths[i])
        answers: list[list[int]] = [[]] * len(prompts)
        for begin in range(0, len(order), at_once):
            rows = order[begin : begin + at_once]
            batch, limits = [prompts[i] for i in rows], [lengths[i] for i in rows]
            stop = StopAt(len(batch[0]), limits)
            drawn = self.generate(batch, max(limits), cache=cache, stop=stop)
            for i, answer in zip(rows, drawn, strict=True):
                answers[i] = answer[: lengths[i]]
        return answers

    def better_cache(self, prompts: Sequence[Sequence[int]], new_tokens: int, n: int = 1) -> str:
        """The cache with the faster decode steps; both are warm afterwards."""
        return min(CACHES, key=lambda cache: self._step_seconds(cache, prompts, new_tokens, n))

    def _step_seconds(
        self, cache: str, prompts: Sequence[Sequence[int]], new_tokens: int, n: int
    ) -> float:
        """Of a decode step, in the middle of the answer: a static cache is as long as the whole."""
        rows = [list(p) + [p[-1]] * (new_tokens // 2) for p in prompts for _ in range(n)]
        clock = StepClock(len(rows[0]) + PROBE_STEPS)
        self.generate(rows, new_tokens - new_tokens // 2, cache=cache, stop=clock)
        return min(b - a for a, b in zip(clock.times, clock.times[1:]))


class StepClock(StoppingCriteria):
    """Notes when each token came, and ends after `length` of them, prompt included."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        self.times.append(time.perf_counter())
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)
