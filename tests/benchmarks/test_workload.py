"""The benchmarks' inputs and their counting of work."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from benchmarks.models import FLOAT, Cost
from benchmarks.workload import heavy_tailed_lengths, ragged_lengths
from tests.tiny import make_tiny_model


@pytest.mark.parametrize("count, mean, longest", [(64, 64, 256), (16, 20, 100)])
def test_heavy_tailed_lengths(count: int, mean: int, longest: int) -> None:
    lengths = heavy_tailed_lengths(count, mean, longest)
    assert sum(lengths) == count * mean
    assert max(lengths) == longest
    assert min(lengths) >= 1
    assert sorted(lengths)[count // 2] < mean  # skewed: most answers are short
    assert lengths == heavy_tailed_lengths(count, mean, longest)


def test_ragged_lengths_reach_both_ends() -> None:
    lengths = ragged_lengths(16, 8, 64)
    assert (min(lengths), max(lengths), len(lengths)) == (8, 64, 16)


def test_forward_flops_are_those_that_torch_counts(tmp_path: Path) -> None:
    """torch counts attention as if nothing were masked, hence one token a sequence."""
    directory = make_tiny_model(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
    ids = torch.arange(5)[:, None]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids)
    assert counter.get_total_flops() == Cost.of(directory).forward_flops([1] * 5, 5)


def test_generating_costs_as_much_as_one_forward_over_everything_but_the_last_token() -> None:
    cost = Cost(layers=2, heads=4, head_dim=16, kv_heads=2, block_weights=1000, head_weights=500)
    assert cost.generate_flops([7], [5]) == cost.forward_flops([11], 5)


def test_a_group_computes_its_prompt_once() -> None:
    cost = Cost(layers=2, heads=4, head_dim=16, kv_heads=2, block_weights=1000, head_weights=500)
    alone = cost.generate_flops([7], [5])
    assert cost.generate_flops([7], [5, 5], n=2) == 2 * alone - cost.forward_flops([7], 0)


def test_kv_bytes() -> None:
    cost = Cost(layers=2, heads=4, head_dim=16, kv_heads=2, block_weights=0, head_weights=0)
    assert cost.kv_bytes_per_token == 2 * 2 * 2 * 16 * FLOAT
