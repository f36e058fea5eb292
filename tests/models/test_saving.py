"""What we save, transformers reopens: the same bytes, names, config, tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hybrid_engine.errors import UserError
from hybrid_engine.models import load_causal_lm, load_tokenizer, save_model
from tests.tiny import make_tiny_model

from .peers import LAYOUTS, padded, ragged, save_causal


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return {k: v for path in directory.glob("*.safetensors") for k, v in load_file(path).items()}


def assert_same_weights(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert torch.equal(tensor, right[name]), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_round_trip_keeps_every_byte_of_the_weights(layout: str, tmp_path: Path) -> None:
    save_causal(layout, tmp_path / "in")
    save_model(load_causal_lm(tmp_path / "in"), tmp_path / "out")
    assert_same_weights(weights(tmp_path / "in"), weights(tmp_path / "out"))


@pytest.mark.parametrize("layout", ["llama", "opt-350m", "gpt2"])
def test_transformers_reopens_changed_weights(layout: str, tmp_path: Path) -> None:
    peer = save_causal(layout, tmp_path / "in", seed=0)
    other = save_causal(layout, tmp_path / "other", seed=1)
    model, target = load_causal_lm(tmp_path / "in"), load_causal_lm(tmp_path / "other")
    model.load_state_dict(target.state_dict())
    save_model(model, tmp_path / "out")
    reopened, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    inputs = padded(ragged(), "right")
    with torch.no_grad():
        logits = reopened(**inputs).logits
        # the same weights, perhaps at other alignments
        torch.testing.assert_close(logits, other(**inputs).logits, rtol=0, atol=1e-5)
        assert not torch.allclose(logits, peer(**inputs).logits, atol=1e-2)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_config_generation_config_and_tokenizer_are_handed_on(family: str, tmp_path: Path) -> None:
    source = make_tiny_model(tmp_path / "in", family)
    config = json.loads((source / "config.json").read_text())
    config["a_field_of_tomorrow"] = {"kept": [1, 2]}
    (source / "config.json").write_text(json.dumps(config))
    save_model(load_causal_lm(source), tmp_path / "out")

    assert json.loads((tmp_path / "out/config.json").read_text()) == config
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    before, after = AutoTokenizer.from_pretrained(source), load_tokenizer(tmp_path / "out")
    chat = [{"role": "user", "content": "Née?"}]
    assert after.apply_chat_template(chat, tokenize=False) == before.apply_chat_template(
        chat, tokenize=False
    )
    assert after.encode("un café\n") == before.encode("un café\n")


def test_a_given_tokenizer_replaces_the_files(tmp_path: Path) -> None:
    source = make_tiny_model(tmp_path / "in")
    tokenizer = load_tokenizer(source)
    tokenizer.chat_template = "{{ messages[0]['content'] }}!"
    save_model(load_causal_lm(source), tmp_path / "out", tokenizer)
    reopened = load_tokenizer(tmp_path / "out")
    assert reopened.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "x!"


def test_bfloat16_is_saved_as_bfloat16(tmp_path: Path) -> None:
    save_causal("llama-tied", tmp_path / "in")
    save_model(load_causal_lm(tmp_path / "in", "bfloat16"), tmp_path / "out")
    expected = {k: v.bfloat16() for k, v in weights(tmp_path / "in").items()}
    assert_same_weights(weights(tmp_path / "out"), expected)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_large_models_are_sharded_and_come_back(tmp_path: Path) -> None:
    save_causal("qwen3", tmp_path / "in")
    model = load_causal_lm(tmp_path / "in")
    save_model(model, tmp_path / "out", max_shard_bytes=40_000)
    shards = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 3
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert_same_weights(weights(tmp_path / "in"), weights(tmp_path / "out"))
    again = load_causal_lm(tmp_path / "out")
    assert_same_weights(dict(model.named_parameters()), dict(again.named_parameters()))
    _, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"]


def test_a_failed_save_leaves_the_previous_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_causal("gpt2", tmp_path / "in")
    model = load_causal_lm(tmp_path / "in")
    save_model(model, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hybrid_engine.models.saving.write_tokenizer", full)
    with pytest.raises(UserError, match="out: cannot write the model .*No space left"):
        save_model(model, tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_the_previous_directory_returns_when_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_causal("gpt2", tmp_path / "in")
    model = load_causal_lm(tmp_path / "in")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/precious").write_text("weights")
    rename = Path.rename

    def refuse_the_last(self: Path, target: Path) -> Path:
        if ".partial-" in self.name:
            raise PermissionError(13, "Permission denied")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse_the_last)
    with pytest.raises(UserError, match="cannot write the model .*Permission denied"):
        save_model(model, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_saving_over_an_existing_directory_replaces_it_whole(tmp_path: Path) -> None:
    save_causal("gpt2", tmp_path / "in")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/stale.safetensors").write_bytes(b"x")
    save_model(load_causal_lm(tmp_path / "in"), tmp_path / "out")
    assert not (tmp_path / "out/stale.safetensors").exists()
    assert (tmp_path / "out/model.safetensors").exists()


def test_a_model_may_be_saved_onto_its_own_source(tmp_path: Path) -> None:
    source = make_tiny_model(tmp_path / "model")
    before = weights(source)
    save_model(load_causal_lm(source), source)
    assert_same_weights(weights(source), before)
    assert load_tokenizer(source).eos_token_id == 257
