"""The policy that ends its answers by itself."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest
import torch

from benchmarks.ending import expected_length, with_mean_answer
from hybrid_engine.engine import HybridEngine, SamplingParams
from tests.tiny import make_tiny_model

NEW_TOKENS, MEAN = 32, 10.0


def test_sampled_answers_are_as_long_as_asked(tmp_path: Path) -> None:
    source = make_tiny_model(tmp_path / "source")
    prompts = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
    model = with_mean_answer(source, prompts, NEW_TOKENS, MEAN, tmp_path / "ending")
    engine = HybridEngine.from_pretrained(model)
    params = SamplingParams(n=128, max_new_tokens=NEW_TOKENS, seed=1)
    lengths = engine.generate(prompts, params).lengths.tolist()
    error = statistics.stdev(lengths) / len(lengths) ** 0.5
    assert statistics.fmean(lengths) == pytest.approx(MEAN, abs=4 * error + 0.1 * MEAN)


def test_expected_length_of_a_constant_hazard() -> None:
    weight = torch.zeros(2, 50, dtype=torch.float64)
    hazard = 0.1
    odds = torch.full_like(weight, hazard / (1 - hazard)).log()
    assert expected_length(odds, weight) == pytest.approx((1 - (1 - hazard) ** 50) / hazard)
