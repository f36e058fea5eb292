"""Everything that a spec can say: generation equals the training forward in each."""

from __future__ import annotations

import pytest
import torch

from hybrid_engine.engine import HybridEngine, SamplingParams
from hybrid_engine.engine.reference_generate import reference_generate
from hybrid_engine.engine.request import Request
from hybrid_engine.models import CausalLM, DecoderSpec, RopeSpec
from tests.engine.rollouts import random_prompts, run

LLAMA = {
    "family": "llama", "vocab_size": 97, "hidden_size": 24, "embed_dim": 24, "num_layers": 2,
    "heads": 6, "kv_heads": 2, "head_dim": 8, "intermediate_size": 40, "max_positions": 200,
    "norm": "rms_norm", "norm_eps": 1e-5, "positions": "rotary", "activation": "silu",
    "attention_scale": 8**-0.5, "gated_mlp": True, "rope": RopeSpec(theta=10000.0, rotary_dim=8),
}  # fmt: skip
OPT = LLAMA | {
    "family": "opt", "kv_heads": 6, "norm": "layer_norm", "positions": "learned", "rope": None,
    "position_offset": 2, "activation": "relu", "gated_mlp": False, "qkv_bias": True,
    "attn_out_bias": True, "mlp_bias": True, "tied_head": True,
}  # fmt: skip
LAYOUTS = {
    "untied head": LLAMA,
    "one key-value head": LLAMA | {"kv_heads": 1},
    "part of a head rotates": LLAMA | {"rope": RopeSpec(theta=100.0, rotary_dim=4)},
    "head norms and wide heads": LLAMA
    | {"qk_norm": True, "head_dim": 16, "rope": RopeSpec(1e4, 16)},
    "sliding window of less than a block": LLAMA | {"sliding_window": 9},
    "sliding window of more than a block": LLAMA | {"sliding_window": 70},
    "bias of queries, keys and values only": LLAMA | {"qkv_bias": True, "tied_head": True},
    "gelu gate": LLAMA | {"activation": "gelu_erf"},
    "alibi": OPT | {"positions": "alibi", "position_offset": 0, "activation": "gelu_tanh"},
    "post-norm and narrow embedding": OPT
    | {"norm_position": "post", "final_norm": False, "embed_dim": 12},
    "pre-norm without a final norm": OPT | {"final_norm": False},
}
PROMPTS = random_prompts(6, vocab=97)


def random_layout(name: str) -> CausalLM:
    model = CausalLM(DecoderSpec(**LAYOUTS[name]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = torch.randn(parameter.shape) * 0.3
            norm_weight = "norm" in name and name.endswith("weight")
            parameter.copy_(spread + 1.0 if norm_weight else spread)
    return model


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> CausalLM:
    return random_layout(request.param)


def test_captured_logprobs_are_those_of_training(layout: CausalLM) -> None:
    rollout = run(layout, PROMPTS, SamplingParams(n=2, max_new_tokens=80), max_batch=5)
    assert min(map(len, rollout.tokens)) == 80  # every sequence crosses a block's end
    engine = HybridEngine(layout, None, score_tokens=300)
    again = engine.token_logprobs(rollout.sequences, rollout.prompt_lengths)
    assert [row.tolist() for row in again] == rollout.logprobs


def test_same_tokens_as_recomputing_every_sequence(layout: CausalLM) -> None:
    params = SamplingParams(max_new_tokens=10, top_p=0.9)
    native = run(layout, PROMPTS, params, max_batch=4, poison_freed_blocks=True)
    slow = reference_generate(layout, Request(PROMPTS, params, [], list(range(6))))
    assert slow["tokens"] == native.tokens
