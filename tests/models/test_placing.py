"""A model takes arguments from the CPU and brings results back, wherever it is itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hybrid_engine.models import CausalLM, ScalarModel, pack
from tests.engine.test_layouts import random_layout

ELSEWHERE = torch.device("meta")


class ComputesElsewhere(nn.Module):
    """A part of a model that must be given tensors of another device."""

    def __init__(self, *results: Tensor) -> None:
        super().__init__()
        self.results, self.spec = results, None

    def forward(self, *arguments: Any) -> Any:
        tensors = [x for x in _flat(arguments) if isinstance(x, Tensor)]
        assert tensors
        assert all(x.device == ELSEWHERE for x in tensors)
        return self.results[0] if len(self.results) == 1 else self.results


def _flat(values: Any) -> list[Any]:
    if isinstance(values, tuple):
        return [x for value in values for x in _flat(value)]
    return [values]


@pytest.fixture
def causal(monkeypatch: pytest.MonkeyPatch) -> CausalLM:
    model = random_layout("untied head")
    monkeypatch.setattr(CausalLM, "device", ELSEWHERE)
    monkeypatch.setattr(ScalarModel, "device", ELSEWHERE)
    return model


def test_arguments_move_to_the_parameters(causal: CausalLM) -> None:
    batch, rows = pack([[1, 2, 3], [1, 2, 5]], [2, 2]), torch.tensor([0, 1])
    causal.decoder = ComputesElsewhere(torch.empty(2, 24, device=ELSEWHERE))
    causal.head = ComputesElsewhere(torch.ones(2), torch.zeros(2))
    scores = causal(batch, rows, torch.tensor([4, 5]), 1.0, None, torch.tensor([0.0, 0.0]))
    assert [values.device.type for values in scores] == ["cpu", "cpu"]
    scalar = ScalarModel(causal.spec)
    scalar.decoder = causal.decoder
    scalar.score = ComputesElsewhere(torch.ones(2, 1))
    assert scalar(batch, rows).tolist() == [1.0, 1.0]


def test_on_the_cpu_nothing_is_copied() -> None:
    batch = pack([[1, 2, 3]])
    assert batch.to("cpu") is batch
