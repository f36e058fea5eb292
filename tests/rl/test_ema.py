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


def test_resume_is_exact():
    values = list(torch.randn(6, 5).unbind())
    whole, first, second = (EMA({"w": values[0]}, 0.97) for _ in range(3))
    for value in values[1:]:
        whole.update({"w": value})
    for value in values[1:3]:
        first.update({"w": value})
    second.load_tensors({name: t.clone() for name, t in first.tensors().items()})
    for value in values[3:]:
        second.update({"w": value})
    assert torch.equal(second.averages["w"], whole.averages["w"])


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="decay is 1.0"):
        EMA({}, 1.0)
    with pytest.raises(ValueError, match="'b'"):
        EMA({"a": torch.ones(1)}, 0.5).load_tensors({"a": torch.ones(1), "b": torch.ones(1)})
