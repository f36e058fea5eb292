"""What every rank does in `bench_gather.py`."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.crew import Tasks
from benchmarks.peers.hf_zero3 import HFZero3
from benchmarks.slow_link import slow_all_gathers
from benchmarks.workload import random_prompts
from hybrid_engine.config import OptimizerConfig
from hybrid_engine.distributed.collectives import barrier, rank
from hybrid_engine.engine import HybridEngine, SamplingParams, TrainEngine, gather
from hybrid_engine.engine.gather_plan import part_sizes
from hybrid_engine.engine.gather_policy import GatherPolicy
from hybrid_engine.engine.staging import shards_group
from hybrid_engine.models import load_causal_lm

PROMPTS = 8


def make_tasks(directory: str) -> Tasks:
    ranks = _Rank(Path(directory))
    return {
        "ours": ranks.ours,
        "transformers": ranks.transformers,
        "overlap": ranks.overlap,
    }


class _Rank:
    """One rank's engines, each made when it is first asked for."""

    def __init__(self, model: Path) -> None:
        self._model = model
        self._engine, self._peer = cache(self._make_engine), cache(lambda: HFZero3(model))

    def _make_engine(self, stage: int, pinned: int | None) -> HybridEngine:
        model = load_causal_lm(self._model)
        settings = {"zero_optimization": {"stage": stage}}
        train_engine = TrainEngine(model, OptimizerConfig(), 1, settings)
        if pinned is None:
            return HybridEngine(model, None, train_engine)
        # As where ranks cannot read one copy, which would fit into any limit.
        group = replace(shards_group(), one_copy=False)
        policy = GatherPolicy(model.spec.num_layers, pinned)
        limit = policy.held_bytes(part_sizes(model, group.ranks), group)
        engine = HybridEngine(model, None, train_engine, weight_bytes=limit)
        with mock.patch.object(gather, "shards_group", return_value=group), engine.generation():
            return engine

    def ours(
        self,
        stage: int,
        length: int,
        new_tokens: int,
        greedy: bool = False,
        pinned: int | None = None,
    ) -> dict[str, Any]:
        """``pinned``: layers that stay gathered under stage 3; the others are streamed."""
        engine = self._engine(stage, pinned)
        params = SamplingParams(
            max_new_tokens=new_tokens, temperature=0.0 if greedy else 1.0, ignore_eos=True
        )
        rollout = engine.generate(_prompts(length), params)
        counters = rollout.counters
        phases = {"prefill": counters["prefill_seconds"], "decode": counters["decode_seconds"]}
        if engine.gathered is not None:
            phases["gather"] = engine.gathered.seconds
            phases["waiting for it"] = engine.gathered.waited_seconds
        return {"tokens": rollout.tokens, "phases": phases}

    def transformers(self, length: int, new_tokens: int, greedy: bool = False) -> dict[str, Any]:
        tokens = self._peer().generate(_prompts(length), new_tokens, greedy=greedy)
        return {"tokens": tokens, "phases": {}}

    def overlap(self, length: int, seconds: float) -> dict[str, float]:
        """The gather alone, over a link that takes so many seconds a collective, the prefill
        alone, and both at once: seconds until all ranks have it.
        """
        engine, prompts = self._engine(3, None), _prompts(length)
        first_token = SamplingParams(max_new_tokens=1)
        with slow_all_gathers(seconds):
            clock = _Clock()
            with engine.generation():
                pass
            alone = clock.lap()
            with engine.generation():
                engine.generate(prompts, first_token)
                together = clock.lap()
                engine.generate(prompts, first_token)
                prefill = clock.lap()
        assert engine.gathered is not None
        return {
            "gather": alone,
            "prefill": prefill,
            "together": together,
            "collectives": engine.gathered.collectives,
        }


class _Clock:
    """Time between moments that all ranks have reached."""

    def __init__(self) -> None:
        barrier("lap")
        self._last = time.perf_counter()

    def lap(self) -> float:
        barrier("lap")
        previous, self._last = self._last, time.perf_counter()
        return self._last - previous


def _prompts(length: int) -> list[list[int]]:
    return random_prompts(PROMPTS, length, 40000, seed=rank())
