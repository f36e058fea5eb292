"""Families without a table: the same interface and numbers through transformers, one warning."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPTNeoXConfig,
    PretrainedConfig,
    Qwen2Config,
)

from hybrid_engine.errors import UserError
from hybrid_engine.models import (
    ForeignCausalLM,
    ForeignScalarModel,
    LoRAConfig,
    last_rows,
    load_causal_lm,
    load_scalar_model,
    pack,
    response_rows,
    save_model,
)

from .peers import CONTEXT, EOS, PAD, VOCAB, grouped, padded, ragged

_COMMON = {"vocab_size": VOCAB, "hidden_size": 32, "num_attention_heads": 4, "pad_token_id": PAD}
_COMMON |= {"num_hidden_layers": 2, "intermediate_size": 48, "max_position_embeddings": CONTEXT}
_COMMON |= {"bos_token_id": 3, "eos_token_id": EOS}


def neox() -> PretrainedConfig:
    return GPTNeoXConfig(**_COMMON, attention_dropout=0.3, hidden_dropout=0.3)


def mixed_windows() -> PretrainedConfig:
    """A family with a table, but a feature that the table cannot say."""
    windows = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    return Qwen2Config(**_COMMON, num_key_value_heads=2, **windows)


CONFIGS = {
    "neox": (neox, "model type 'gpt_neox'"),
    "mixed-windows": (mixed_windows, "sliding windows in some layers only"),
}


def save_peer(auto_class, config: PretrainedConfig, directory: Path) -> torch.nn.Module:
    config.num_labels = 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = auto_class.from_config(config, dtype=torch.float32)
    model.save_pretrained(directory)
    return model.eval()


def warned_once(load, directory: Path, reason: str):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = load(directory)
    ours = [str(w.message) for w in caught if "native decoder" in str(w.message)]
    assert len(ours) == 1
    assert reason in ours[0]
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_causal_scores_equal_transformers(name: str, tmp_path: Path) -> None:
    make, reason = CONFIGS[name]
    peer = save_peer(AutoModelForCausalLM, make(), tmp_path)
    model = warned_once(load_causal_lm, tmp_path, reason)
    assert isinstance(model, ForeignCausalLM)
    model.train()  # dropout must stay off
    sequences, batch = ragged(), pack(ragged())
    rows, targets = response_rows(batch, [1] * 4)
    scores = model(batch, rows, targets, temperature=0.5)
    expected = []
    for tokens in sequences:
        table = (peer(torch.tensor([tokens])).logits[0, :-1] / 0.5).log_softmax(-1)
        expected.append(table.gather(1, torch.tensor(tokens[1:])[:, None]).squeeze(1))
    torch.testing.assert_close(scores.logprobs, torch.cat(expected), rtol=0, atol=1e-4)
    scores.logprobs.sum().backward()
    assert all(p.grad is not None for p in model.parameters())

    save_model(model, tmp_path / "out")
    reopened = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for (key, a), (_, b) in zip(reopened.named_parameters(), peer.named_parameters(), strict=True):
        assert torch.equal(a, b), key


def test_scalar_scores_equal_transformers(tmp_path: Path) -> None:
    peer = save_peer(AutoModelForSequenceClassification, neox(), tmp_path / "in")
    model = warned_once(load_scalar_model, tmp_path / "in", "gpt_neox")
    assert isinstance(model, ForeignScalarModel)
    batch = pack(ragged())
    scores = model(batch, last_rows(batch))
    expected = peer(**padded(ragged(), "right")).logits.squeeze(-1)
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-4)
    save_model(model, tmp_path / "out")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(
        again(**padded(ragged(), "right")).logits.squeeze(-1), expected, rtol=0, atol=1e-5
    )


def test_shared_prompts_are_taken_apart(tmp_path: Path) -> None:
    save_peer(AutoModelForCausalLM, neox(), tmp_path)
    model = warned_once(load_causal_lm, tmp_path, "gpt_neox")
    sequences, prompts = grouped()
    shared, apart = pack(sequences, prompts), pack(sequences)
    scores = [model(batch, *response_rows(batch, prompts)).logprobs for batch in (shared, apart)]
    assert shared.num_tokens < apart.num_tokens
    assert torch.equal(*scores)


def test_a_causal_source_gets_a_seeded_head(tmp_path: Path) -> None:
    save_peer(AutoModelForCausalLM, neox(), tmp_path)
    with pytest.warns(UserWarning, match="native decoder"):
        models = [load_scalar_model(tmp_path, seed=seed) for seed in (1, 1, 2)]
    heads = [model.hf_model.score.weight for model in models]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_a_classifier_whose_head_is_missing_gets_no_random_one(tmp_path: Path) -> None:
    save_peer(AutoModelForSequenceClassification, neox(), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with (
        pytest.warns(UserWarning, match="native decoder"),
        pytest.raises(UserError, match=r"the weight files lack score\.weight"),
    ):
        load_scalar_model(tmp_path)


def test_native_features_are_refused(tmp_path: Path) -> None:
    save_peer(AutoModelForCausalLM, neox(), tmp_path)
    with pytest.raises(UserError, match="LoRA and trainable_layers need a family"):
        load_causal_lm(tmp_path, lora=LoRAConfig(r=2))
    with pytest.raises(UserError, match="LoRA and trainable_layers need a family"):
        load_scalar_model(tmp_path, trainable_layers=1)
    with pytest.warns(UserWarning, match="native decoder"):
        model = load_causal_lm(tmp_path)
    with pytest.raises(UserError, match="gradient checkpointing needs a family"):
        model.gradient_checkpointing = True
