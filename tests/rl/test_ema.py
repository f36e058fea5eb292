"""The average, its start and its exact continuation."""

import pytest
import torch

from hybrid_engine.rl.ema import EMA


def test_average_follows_the_formula_in_fp32():
    live = {"w": torch.tensor([1.0, 2.0], dtype=torch.bfloat16)}
    ema = EMA(live, decay=0.9)
    assert ema.averages["w"].dtype == torch.float32
    assert ema.averages["w"].tolist() == [1.0, 2.0]
    live["w"] = torch.tensor([2.0, 0.0], dtype=torch.bfloat16)
    ema.update(live)
    torch.testing.assert_close(ema.averages["w"], torch.tensor([1.1, 1.8]))


def test_updates_too_small_for_bf16_are_not_lost():
    live = {"w": torch.ones(1, dtype=torch.bfloat16)}
    ema = EMA(live, decay=0.999)
    live["w"] = torch.full((1,), 1.0078125, dtype=torch.bfloat16)
    for _ in range(1000):
        ema.update(live)
    assert ema.averages["w"].item() == pytest.approx(1 + 0.0078125 * (1 - 0.999**1000), abs=1e-5)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="decay is 1.0"):
        EMA({}, 1.0)
