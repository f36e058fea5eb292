"""What autograd saves of a pass, tensor by tensor, against the declared counts."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from hybrid_engine.engine.passes import pack_pass
from hybrid_engine.models import CausalLM, LoRAConfig, apply_lora, train_top_layers
from hybrid_engine.plan.activations import Activations, PassShape
from hybrid_engine.plan.models import model_size
from tests.plan.measured import SHAPES, spec_of

# Of a scored row the head keeps target, entropy, log-sum-exp and threshold; of the batch, numbers
# of rows and places.
STATISTICS = 8 + 4 + 8 + 4
INDICES = 32


def saved_bytes(model: CausalLM, lengths: list[int]) -> tuple[int, int]:
    """(bytes of distinct storages that the graph keeps, without parameters; rows scored)."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage
        return tensor

    sequences = [[1] * length for length in lengths]
    part = pack_pass(sequences, [[(3, length)] for length in lengths], list(range(len(lengths))))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        scores = model(part.batch, part.rows, part.targets)
    assert scores.logprobs.requires_grad
    return sum(storage.nbytes() for storage in kept.values()), len(part.rows)


@pytest.mark.parametrize("variant", ["all", "lora", "two blocks"])
@pytest.mark.parametrize("family", SHAPES)
def test_every_saved_byte_is_declared(family: str, variant: str) -> None:
    spec = spec_of(family, num_layers=3, vocab_size=300)
    lora = LoRAConfig(r=4) if variant == "lora" else None
    layers = 2 if variant == "two blocks" else 0
    model = CausalLM(spec)
    if lora:
        apply_lora(model, lora)
    elif layers:
        train_top_layers(model, layers)
    lengths = [9, 40, 70]
    saved, scored = saved_bytes(model, lengths)
    size = model_size(spec, "float32", "it", lora=lora, trainable_layers=layers)
    declared = Activations(size, PassShape(sum(lengths), scored)).saved()
    tables = 4 * spec.max_positions * spec.head_dim  # cos and sin, which all passes share
    assert declared <= saved <= declared + STATISTICS * scored + INDICES * sum(lengths) + tables


def test_normalised_queries_are_declared() -> None:
    spec = dataclasses.replace(spec_of("llama", num_layers=2, vocab_size=300), qk_norm=True)
    saved, scored = saved_bytes(CausalLM(spec), [100])
    declared = Activations(model_size(spec, "float32", "it"), PassShape(100, scored)).saved()
    tables = 4 * spec.max_positions * spec.head_dim
    assert declared <= saved <= declared + STATISTICS * scored + INDICES * 100 + tables
