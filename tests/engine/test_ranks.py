"""Two ranks under ZeRO-3 generate unequally long: inside generation() neither waits."""

from __future__ import annotations

from pathlib import Path

import pytest

from hybrid_engine.config import OptimizerConfig
from hybrid_engine.distributed.collectives import rank
from hybrid_engine.engine import HybridEngine, SamplingParams, TrainEngine
from hybrid_engine.models import load_causal_lm
from tests.distributed.ranks import results_of
from tests.tiny import make_tiny_model

PROMPTS = [[1, 2, 3], [4] * 70, [5], [6, 7]]


def uneven(directory: str) -> dict[str, list]:
    """Rank 0 makes one long rollout, rank 1 three short ones; then both score."""
    model = load_causal_lm(Path(directory, "model"))
    config = OptimizerConfig(learning_rate=0.05, schedule="constant", warmup_ratio=0.0)
    engine = HybridEngine(
        model, None, TrainEngine(model, config, 1, {"zero_optimization": {"stage": 3}})
    )
    share = {0: [0], 1: [1, 2, 3]}[rank()]
    params = SamplingParams(max_new_tokens=120 if rank() == 0 else 5)
    with engine.generation():
        rollouts = [engine.generate([PROMPTS[i]], params, sample_ids=[i]) for i in share]
    sequences = [rollout.sequences[0] for rollout in rollouts]
    scores = engine.token_logprobs(sequences, [len(PROMPTS[i]) for i in share])
    return {
        "tokens": [rollout.tokens[0] for rollout in rollouts],
        "captured": [rollout.logprobs[0] for rollout in rollouts],
        "scored": [row.tolist() for row in scores],
    }


@pytest.mark.multi_process
def test_zero3_ranks_of_unequal_rollouts(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "model", "llama")
    first, second = results_of(f"{__name__}:uneven", 2, tmp_path)
    alone = HybridEngine(load_causal_lm(tmp_path / "model"), None)
    expected = [
        alone.generate(
            [prompt], SamplingParams(max_new_tokens=120 if i == 0 else 5), sample_ids=[i]
        )
        for i, prompt in enumerate(PROMPTS)
    ]
    for found in (first, second):
        assert found["scored"] == found["captured"]
    assert first["tokens"] + second["tokens"] == [rollout.tokens[0] for rollout in expected]
