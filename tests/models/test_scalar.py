"""Reward and value models: the AutoModelForSequenceClassification layout, both ways."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hybrid_engine.errors import UserError
from hybrid_engine.models import last_rows, load_causal_lm, load_scalar_model, pack, save_model
from tests.tiny import make_tiny_model

from .peers import EOS, LAYOUTS, ONE_OF_EACH_FAMILY, padded, ragged, save_causal, save_classifier

TOLERANCE = 1e-4


@torch.no_grad()
def our_scores(model: torch.nn.Module, sequences: list[list[int]]) -> torch.Tensor:
    batch = pack(sequences)
    return model(batch, last_rows(batch))


@torch.no_grad()
def their_scores(peer: torch.nn.Module, sequences: list[list[int]]) -> torch.Tensor:
    return peer(**padded(sequences, "right")).logits.squeeze(-1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_classifier_scores_as_in_transformers(layout: str, tmp_path: Path) -> None:
    peer = save_classifier(layout, tmp_path)
    model = load_scalar_model(tmp_path)
    expected = their_scores(peer, ragged())
    torch.testing.assert_close(our_scores(model, ragged()), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("layout", ONE_OF_EACH_FAMILY)
def test_a_scalar_model_from_a_causal_one_reopens_in_transformers(
    layout: str, tmp_path: Path
) -> None:
    save_causal(layout, tmp_path / "causal")
    model = load_scalar_model(tmp_path / "causal", seed=5)
    save_model(model, tmp_path / "reward")
    peer, report = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "reward", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert peer.config.num_labels == 1
    assert peer.config.architectures == [type(peer).__name__]
    sequences = [*ragged(), [7, 8, EOS]]  # an answer's score is at its EOS
    expected = their_scores(peer.eval(), sequences)
    torch.testing.assert_close(our_scores(model, sequences), expected, rtol=0, atol=TOLERANCE)

    again = load_scalar_model(tmp_path / "reward", seed=6)  # the seed must not matter
    assert torch.equal(our_scores(again, sequences), our_scores(model, sequences))


def test_every_row_has_a_value(tmp_path: Path) -> None:
    save_classifier("llama", tmp_path)
    model = load_scalar_model(tmp_path)
    (tokens,) = ragged(lengths=(7,))
    with torch.no_grad():
        values = model(pack([tokens]), torch.arange(7))
    prefixes = torch.stack([our_scores(model, [tokens[: i + 1]])[0] for i in range(7)])
    torch.testing.assert_close(values, prefixes, rtol=0, atol=1e-5)


def test_fresh_head_has_the_declared_spread_and_follows_its_seed(tmp_path: Path) -> None:
    save_causal("llama", tmp_path)
    draws = [load_scalar_model(tmp_path, seed=seed).score.weight for seed in range(40)]
    width = draws[0].shape[1]
    everything = torch.cat([draw.detach().flatten() for draw in draws])
    # 1920 normals: the sample deviation is within 5 standard errors (1/sqrt(2n)) of the true one
    ratio = everything.std().item() * math.sqrt(width + 1)
    assert abs(ratio - 1) < 5 / math.sqrt(2 * len(everything))
    assert torch.equal(draws[3], load_scalar_model(tmp_path, seed=3).score.weight)
    assert not torch.equal(draws[3], draws[4])


def test_padding_is_another_token_than_eos_in_config_and_tokenizer(tmp_path: Path) -> None:
    """A tokenizer that pads with EOS would make transformers score one token early."""
    source = make_tiny_model(tmp_path / "causal", pad_is_eos=True)
    model = load_scalar_model(source)
    save_model(model, tmp_path / "reward")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "reward")
    peer = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward").eval()
    assert tokenizer.pad_token_id == peer.config.pad_token_id != tokenizer.eos_token_id

    texts = ["fine film<|im_end|>", "no<|im_end|>", "unfinished"]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
    inputs.pop("token_type_ids", None)
    with torch.no_grad():
        theirs = peer(**inputs).logits.squeeze(-1)
    ours = our_scores(model, [tokenizer(text)["input_ids"] for text in texts])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)


def test_a_vocabulary_with_eos_alone_is_announced(tmp_path: Path) -> None:
    save_causal("gpt2", tmp_path / "causal")
    config = json.loads((tmp_path / "causal/config.json").read_text())
    config["pad_token_id"] = config["eos_token_id"]
    (tmp_path / "causal/config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match="no token but EOS to pad with"):
        save_model(load_scalar_model(tmp_path / "causal"), tmp_path / "reward")


def test_a_classifier_with_more_labels_is_refused(tmp_path: Path) -> None:
    save_classifier("llama", tmp_path)
    peer_config = json.loads((tmp_path / "config.json").read_text())
    from safetensors.torch import load_file, save_file

    tensors = load_file(tmp_path / "model.safetensors")
    tensors["score.weight"] = tensors["score.weight"].repeat(3, 1)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    peer_config["id2label"] = {str(i): f"LABEL_{i}" for i in range(3)}
    (tmp_path / "config.json").write_text(json.dumps(peer_config))
    with pytest.raises(UserError, match=r"score\.weight has shape \[3, 48\].*implies \[1, 48\]"):
        load_scalar_model(tmp_path)


def test_a_classifier_that_lost_its_head_is_refused(tmp_path: Path) -> None:
    """Only a causal directory may get a fresh head silently."""
    save_classifier("llama", tmp_path / "reward")
    save_causal("llama-tied", tmp_path / "causal")
    shutil.copy(tmp_path / "causal/model.safetensors", tmp_path / "reward/model.safetensors")
    with pytest.raises(UserError, match=r"lack score\.weight"):
        load_scalar_model(tmp_path / "reward")


def test_a_reward_model_is_not_a_language_model(tmp_path: Path) -> None:
    save_classifier("llama-tied", tmp_path)
    with pytest.raises(UserError, match=r"hold score\.weight .*another kind of model"):
        load_causal_lm(tmp_path)
