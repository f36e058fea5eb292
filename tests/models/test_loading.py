"""What loading a model takes besides the model."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from hybrid_engine.models import load_causal_lm
from hybrid_engine.plan import give_back_freed
from hybrid_engine.plan.process import resident_bytes
from hybrid_engine.report.memory import KernelGauge


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_a_file_is_not_held_beside_its_model(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=300, hidden_size=512, intermediate_size=1536, num_hidden_layers=8,
        num_attention_heads=8, num_key_value_heads=4, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    load_causal_lm(tmp_path)  # loads what is loaded once
    give_back_freed()
    gauge = KernelGauge()
    gauge.reset()
    model = load_causal_lm(tmp_path)
    nbytes = sum(p.nbytes for p in model.parameters())
    assert nbytes > 80_000_000
    assert gauge.peak() - resident_bytes() < nbytes / 8  # its largest tensor is a fortieth
