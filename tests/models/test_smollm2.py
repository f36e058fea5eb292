"""The real model: SmolLM2-135M-Instruct, 30 layers of it, against transformers."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from hybrid_engine.models import load_causal_lm, load_tokenizer, save_model

from .peers import worst_logit_gap

pytestmark = [pytest.mark.real_model, pytest.mark.slow]

TEXTS = [
    "Gravity is",
    "<|im_start|>user\nWhat did you think of the film?<|im_end|>\n<|im_start|>assistant\n",
    "def fibonacci(n):\n    return n if n < 2 else",
]


@pytest.fixture(scope="module")
def smollm2() -> Path:
    """The directory named by HYBRID_ENGINE_SMOLLM2, or the demo model where it has been made."""
    named = os.environ.get("HYBRID_ENGINE_SMOLLM2")
    if named:
        return Path(named)
    from hybrid_engine.data.demo import ensure_demo_model

    return Path(ensure_demo_model())


def test_logits_equal_transformers(smollm2: Path) -> None:
    peer = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    model, tokenizer = load_causal_lm(smollm2), load_tokenizer(smollm2)
    sequences = [tokenizer(text)["input_ids"] for text in TEXTS]
    gaps = [worst_logit_gap(model, peer, sequences, side) for side in ("left", "right")]
    # logits reach 30 here: 1e-4 is a few units in the last place
    assert max(gaps) <= 1e-4


def test_a_saved_copy_has_the_same_bytes(smollm2: Path, tmp_path: Path) -> None:
    save_model(load_causal_lm(smollm2), tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text()) == json.loads(
        (smollm2 / "config.json").read_text()
    )
    with (
        safe_open(smollm2 / "model.safetensors", "pt") as before,
        safe_open(tmp_path / "out/model.safetensors", "pt") as after,
    ):
        assert set(before.keys()) == set(after.keys())
        for name in before.keys():  # noqa: SIM118 (a safetensors handle is not iterable)
            assert torch.equal(before.get_tensor(name), after.get_tensor(name)), name
