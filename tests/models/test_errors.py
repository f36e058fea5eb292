"""Wrong paths and damaged checkpoints: one line that names the file and the tensor."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hybrid_engine.errors import UserError
from hybrid_engine.models import (
    LoRAConfig,
    load_causal_lm,
    load_scalar_model,
    load_tokenizer,
    save_model,
)

from .peers import LAYOUTS, ragged, save_causal, worst_logit_gap


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save_causal("llama", tmp_path / "model")
    return tmp_path / "model"


def edit_weights(directory: Path, edit) -> None:
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def edit_config(directory: Path, **values: object) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **values}))


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("load", [load_causal_lm, load_scalar_model, load_tokenizer])
@pytest.mark.parametrize("path", ["/no/such/model", "./missing", "a/b/c"])
def test_a_wrong_path_says_what_was_looked_for(load, path: str) -> None:
    with pytest.raises(UserError, match="no such model directory; give a directory with") as error:
        load(path)
    assert path in one_line(error)


@pytest.mark.parametrize("name", ["nobody/nothing", "plainname"])
def test_an_unreachable_hub_name_is_one_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=f"{name}: neither a local directory nor") as error:
        load_causal_lm(name)
    one_line(error)


def test_a_directory_without_config(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.json"):
        load_causal_lm(tmp_path)


def test_a_config_that_is_not_json(checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text('{"model_type": ')
    with pytest.raises(UserError, match=r"config\.json: not valid JSON") as error:
        load_causal_lm(checkpoint)
    one_line(error)


def test_a_config_that_transformers_refuses(checkpoint: Path) -> None:
    edit_config(checkpoint, model_type="no-such-architecture")
    with pytest.raises(UserError, match=r"config\.json: transformers refuses it") as error:
        load_causal_lm(checkpoint)
    one_line(error)


def test_a_directory_without_weights(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no model\.safetensors"):
        load_causal_lm(checkpoint)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_truncated_file_is_named(checkpoint: Path, keep: int) -> None:
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"model\.safetensors: damaged safetensors file") as error:
        load_causal_lm(checkpoint)
    one_line(error)


def test_a_missing_shard_is_named(tmp_path: Path, checkpoint: Path) -> None:
    save_model(load_causal_lm(checkpoint), tmp_path / "sharded", max_shard_bytes=40_000)
    lost = sorted((tmp_path / "sharded").glob("*-00002-of-*.safetensors"))[0]
    lost.unlink()
    with pytest.raises(UserError, match=f"{lost.name}: the checkpoint's index lists this file"):
        load_causal_lm(tmp_path / "sharded")


def test_missing_tensors_are_named(checkpoint: Path) -> None:
    edit_weights(checkpoint, lambda tensors: tensors.pop("model.layers.1.self_attn.k_proj.weight"))
    with pytest.raises(UserError, match=r"lack layers\.1\.self_attn\.k_proj\.weight"):
        load_causal_lm(checkpoint)


def test_unexpected_tensors_are_named(checkpoint: Path) -> None:
    edit_weights(checkpoint, lambda t: t.update({"model.layers.0.moe.router": torch.ones(2)}))
    with pytest.raises(UserError, match=r"hold model\.layers\.0\.moe\.router \(model\.safetensors"):
        load_causal_lm(checkpoint)


def test_a_wrong_shape_is_named(checkpoint: Path) -> None:
    name = "model.layers.2.mlp.up_proj.weight"
    edit_weights(checkpoint, lambda t: t.update({name: torch.ones(72, 47)}))
    with pytest.raises(UserError, match=rf"{name} has shape \[72, 47\].*implies \[72, 48\]"):
        load_causal_lm(checkpoint)


def test_a_transposed_family_reports_the_checkpoints_shapes(tmp_path: Path) -> None:
    save_causal("gpt2", tmp_path)
    name = "transformer.h.0.mlp.c_fc.weight"
    edit_weights(tmp_path, lambda t: t.update({name: torch.ones(48, 191)}))
    with pytest.raises(UserError, match=r"has shape \[48, 191\].*implies \[48, 192\]"):
        load_causal_lm(tmp_path)


def test_a_second_head_that_differs_from_a_tied_embedding(tmp_path: Path) -> None:
    save_causal("llama-tied", tmp_path)
    edit_weights(tmp_path, lambda t: t.update({"lm_head.weight": torch.ones(101, 48)}))
    with pytest.raises(UserError, match="tie_word_embeddings is true, but lm_head"):
        load_causal_lm(tmp_path)


@pytest.mark.parametrize("keep_embedding", [True, False])
def test_a_tied_matrix_may_be_stored_under_either_name(
    tmp_path: Path, keep_embedding: bool
) -> None:
    peer = save_causal("opt", tmp_path)

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        embedding = tensors["model.decoder.embed_tokens.weight"]
        tensors["lm_head.weight"] = embedding.clone()
        if not keep_embedding:
            del tensors["model.decoder.embed_tokens.weight"]

    edit_weights(tmp_path, edit)
    assert worst_logit_gap(load_causal_lm(tmp_path), peer, ragged(), "right") < 1e-4


@pytest.mark.parametrize("layout", ["gpt2", "opt", "llama-tied"])
def test_checkpoints_of_the_bare_base_model_load(tmp_path: Path, layout: str) -> None:
    """Hub checkpoints of GPT-2 and OPT leave the outer prefix out, and keep mask buffers."""
    peer = save_causal(layout, tmp_path)

    def strip(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.split(".", 1)[1]] = tensors.pop(name)
        if layout == "gpt2":
            tensors["h.0.attn.bias"] = torch.ones(1, 1, 4, 4)

    edit_weights(tmp_path, strip)
    assert worst_logit_gap(load_causal_lm(tmp_path), peer, ragged(), "right") < 1e-4


def test_a_torch_pickle_is_read_with_a_remark_and_without_code(tmp_path: Path) -> None:
    peer = save_causal("gpt2", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    with pytest.warns(UserWarning, match="weights_only=True"):
        model = load_causal_lm(tmp_path)
    assert worst_logit_gap(model, peer, ragged(), "right") < 1e-4

    torch.save({"transformer.wte.weight": Path("code")}, tmp_path / "pytorch_model.bin")
    with (
        pytest.warns(UserWarning, match="weights_only=True"),
        pytest.raises(UserError, match=r"pytorch_model\.bin: not a readable torch weights file"),
    ):
        load_causal_lm(tmp_path)


def test_options_that_contradict_the_model(checkpoint: Path) -> None:
    with pytest.raises(UserError, match="trainable_layers is 4; the model has 3 layers"):
        load_causal_lm(checkpoint, trainable_layers=4)
    with pytest.raises(UserError, match="lora and trainable_layers are both set"):
        load_causal_lm(checkpoint, lora=LoRAConfig(r=2), trainable_layers=1)
    with pytest.raises(UserError, match="dtype 'int8': give float32, bfloat16 or float16"):
        load_causal_lm(checkpoint, "int8")


def test_an_unwritable_output_is_one_line(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the model") as error:
        save_model(load_causal_lm(checkpoint), tmp_path / "file/inside")
    one_line(error)


def test_every_layout_is_described_in_plain_values() -> None:
    """The C++ program reads numbers, strings, booleans and one nested dict."""
    from hybrid_engine.models import spec_from_hf

    for layout in LAYOUTS.values():
        described = spec_from_hf(layout.config()).as_dict()
        rope = described.pop("rope")
        values = [*described.values(), *(rope or {}).values()]
        assert all(type(value) in (int, float, str, bool) for value in values)
