"""Rotary tables against transformers' formulas, and how they grow."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from hybrid_engine.models import RopeSpec, UnsupportedFamily, rope_tables, spec_from_hf
from hybrid_engine.models.decoder import alibi_slopes
from hybrid_engine.models.rope import inverse_frequencies

SCALINGS = {
    "linear": {"factor": 3.0},
    "llama3": {
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "yarn": {"factor": 16.0, "original_max_position_embeddings": 4096},
    "yarn-tuned": {
        "factor": 4.0,
        "original_max_position_embeddings": 32768,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "truncate": False,
        "attention_factor": 1.25,
    },
    "yarn-mscale": {
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "mscale": 1.0,
        "mscale_all_dim": 0.707,
    },
}


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_frequencies_equal_transformers(name: str, head_dim: int) -> None:
    kind = name.split("-")[0]
    config = LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        head_dim=head_dim,
        max_position_embeddings=131072,
        rope_parameters={"rope_type": kind, "rope_theta": 500000.0, **SCALINGS[name]},
    )
    rope = spec_from_hf(config).rope
    assert rope is not None
    expected, attention_factor = ROPE_INIT_FUNCTIONS[kind](config)
    # a few roundings of fp32, in another order
    torch.testing.assert_close(inverse_frequencies(rope), expected, rtol=1e-6, atol=0)
    assert rope.attention_factor == pytest.approx(attention_factor, rel=1e-12)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_length_dependent_rope_is_refused(kind: str) -> None:
    parameters = {
        "rope_type": kind,
        "rope_theta": 1e4,
        "factor": 2.0,
        "short_factor": [1.0] * 16,
        "long_factor": [2.0] * 16,
        "original_max_position_embeddings": 16,
    }
    config = LlamaConfig(hidden_size=128, num_attention_heads=4, rope_parameters=parameters)
    with pytest.raises(UnsupportedFamily, match=f"rope type '{kind}'"):
        spec_from_hf(config)


def test_tables_grow_without_changing_their_rows() -> None:
    rope = RopeSpec(theta=1e4, rotary_dim=16)
    short, _ = rope_tables(rope, length=5, max_positions=131072)
    long, _ = rope_tables(rope, length=5000, max_positions=131072)
    assert short.shape == (4096, 8)
    assert long.shape == (8192, 8)
    assert torch.equal(long[: len(short)], short)
    assert rope_tables(rope, length=3, max_positions=131072)[0] is short
    assert rope_tables(rope, length=3, max_positions=64)[0].shape == (64, 8)


def test_tables_made_in_inference_mode_serve_training() -> None:
    rope = RopeSpec(theta=12345.0, rotary_dim=4)
    with torch.inference_mode():
        cos, _ = rope_tables(rope, length=2, max_positions=2)
    assert not cos.is_inference()


@pytest.mark.parametrize(
    ("heads", "expected"),
    [
        (4, [2**-2, 2**-4, 2**-6, 2**-8]),
        (6, [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]),
        (1, [2**-8]),
    ],
)
def test_alibi_slopes(heads: int, expected: list[float]) -> None:
    assert alibi_slopes(heads).tolist() == expected
