"""Adapters go to PEFT and come from it with the same logits."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from hybrid_engine.errors import UserError
from hybrid_engine.models import (
    LoRAConfig,
    adapted_linears,
    last_rows,
    load_causal_lm,
    load_scalar_model,
    pack,
    save_adapter,
    save_model,
)

from .peers import CONTEXT, ragged, save_causal, save_classifier, worst_logit_gap

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

FAMILIES = ("llama-tied", "llama-biases", "mistral", "qwen2", "qwen3", "opt", "opt-350m", "gpt2")
# Sizes of the logits are around 1 to 5, and those of the adapters' part of them around 1.
CLOSE, FAR = 1e-5, 0.05

ALL = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "opt": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
}
SOME = {"llama": ["q_proj", "v_proj", "up_proj"], "opt": ["k_proj", "fc2"], "gpt2": ["c_attn"]}


def kin(layout: str) -> str:
    name = layout.split("-")[0]
    return name if name in ALL else "llama"


def randomise(pairs: Sequence[torch.Tensor], seed: int = 1) -> None:
    """Values as after training: B starts at zero, which would hide every mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in pairs:
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.15)


def ours_with_adapter(base: Path, config: LoRAConfig):
    model = load_causal_lm(base, lora=config)
    for _, linear in adapted_linears(model):
        named = [f for f in (linear.lora_a, linear.lora_b) if f is not None]
        present = linear.lora_a.chunk(len(linear.lora_splits))
        kept = [bool(a.any()) for a in present]
        randomise(named)
        with torch.no_grad():  # parts that have no adapter keep having none
            for keep, a, b in zip(
                kept, present, linear.lora_b.split(linear.lora_splits), strict=True
            ):
                if not keep:
                    a.zero_()
                    b.zero_()
    return model


def theirs_with_adapter(base: Path, **settings):
    kind = AutoModelForCausalLM
    if settings.get("task_type") == "SEQ_CLS":
        kind = AutoModelForSequenceClassification
    model = peft.get_peft_model(kind.from_pretrained(base), peft.LoraConfig(**settings))
    randomise([p for n, p in sorted(model.named_parameters()) if p.requires_grad])
    return model.eval()


def in_peft(base: Path, adapter: Path):
    with warnings.catch_warnings():
        # Of settings or tensors that it does not know, say; transformers has some of its own.
        warnings.simplefilter("error", UserWarning)
        return peft.PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base), adapter
        ).eval()


def gap(a, b) -> float:
    batch = pack(ragged())
    with torch.no_grad():
        return float((a.logits(batch) - b.logits(batch)).abs().max())


@pytest.mark.parametrize("rslora", [False, True], ids=["plain", "rslora"])
@pytest.mark.parametrize("targets", [None, SOME], ids=["all", "some"])
@pytest.mark.parametrize("layout", FAMILIES)
def test_our_adapter_in_peft(layout: str, targets, rslora: bool, tmp_path: Path) -> None:
    save_causal(layout, tmp_path / "base")
    names = tuple(targets[kin(layout)]) if targets else ("all-linear",)
    model = ours_with_adapter(
        tmp_path / "base", LoRAConfig(5, 7.5, target_modules=names, use_rslora=rslora)
    )
    assert gap(model, load_causal_lm(tmp_path / "base")) > FAR
    save_adapter(model, tmp_path / "adapter")

    peer = in_peft(tmp_path / "base", tmp_path / "adapter")
    for side in ("left", "right"):
        assert worst_logit_gap(model, peer, ragged(), side) < CLOSE
    chosen = (targets or ALL)[kin(layout)]
    assert set(peer.peft_config["default"].target_modules) == set(chosen)
    again = load_causal_lm(tmp_path / "adapter")
    assert gap(model, again) == 0.0
    assert again.adapter.places == model.adapter.places


@pytest.mark.parametrize("layout", ["llama-tied", "opt", "gpt2"])
def test_a_bfloat16_adapter_in_peft(layout: str, tmp_path: Path) -> None:
    """Its numbers are the same on both sides; on a base in float32 so are the sums."""
    save_causal(layout, tmp_path / "base")
    model = load_causal_lm(tmp_path / "base", "bfloat16", LoRAConfig(4, 8.0, use_rslora=True))
    randomise([p for p in model.parameters() if p.requires_grad])
    save_adapter(model, tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
    assert gap(model, load_causal_lm(tmp_path / "adapter", "bfloat16")) == 0.0
    ours = load_causal_lm(tmp_path / "adapter")
    peer = in_peft(tmp_path / "base", tmp_path / "adapter")
    assert worst_logit_gap(ours, peer, ragged(), "left") < CLOSE
    assert gap(ours, load_causal_lm(tmp_path / "base")) > FAR


def test_a_regular_expression_is_pefts(tmp_path: Path) -> None:
    save_causal("llama", tmp_path / "base")
    expression = r"model\.layers\.[02]\..*(q_proj|up_proj)"
    model = ours_with_adapter(tmp_path / "base", LoRAConfig(2, 4.0, target_modules=(expression,)))
    peer = theirs_with_adapter(
        tmp_path / "base", task_type="CAUSAL_LM", r=2, target_modules=expression
    )
    adapted = {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.default")
        for name, _ in peer.named_modules()
        if name.endswith(".lora_A.default")
    }
    assert adapted == {place.module for place in model.adapter.places}


@pytest.mark.parametrize("targets", [ALL, SOME], ids=["all", "some"])
@pytest.mark.parametrize("layout", FAMILIES)
def test_an_adapter_of_pefts(layout: str, targets, tmp_path: Path) -> None:
    save_causal(layout, tmp_path / "base")
    peer = theirs_with_adapter(
        tmp_path / "base",
        task_type="CAUSAL_LM",
        r=3,
        lora_alpha=9,
        use_rslora=layout == "qwen2",
        target_modules=targets[kin(layout)],
    )
    peer.save_pretrained(tmp_path / "adapter")
    with pytest.warns(UserWarning, match="records no hash of its base") as caught:
        model = load_causal_lm(tmp_path / "adapter")
    assert len(caught) == 1
    assert worst_logit_gap(model, peer, ragged(), "left") < CLOSE
    assert gap(model, load_causal_lm(tmp_path / "base")) > FAR
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(name.endswith(("lora_a", "lora_b")) for name in trained)


def test_some_layers_alone(tmp_path: Path) -> None:
    """A regular expression, and layers by number: what PEFT can say, the tensors' names say too."""
    save_causal("gpt2", tmp_path / "base")
    settings = {"task_type": "CAUSAL_LM", "r": 2, "target_modules": r".*h\.[02]\.attn\.c_proj"}
    peer = theirs_with_adapter(tmp_path / "base", **settings)
    peer.save_pretrained(tmp_path / "adapter")
    with pytest.warns(UserWarning, match="no hash"):
        model = load_causal_lm(tmp_path / "adapter")
    assert worst_logit_gap(model, peer, ragged(), "left") < CLOSE
    save_adapter(model, tmp_path / "again")
    back = in_peft(tmp_path / "base", tmp_path / "again")
    assert worst_logit_gap(model, back, ragged(), "left") < CLOSE
    assert set(back.peft_config["default"].target_modules) == {
        f"transformer.h.{i}.attn.c_proj" for i in (0, 2)
    }


def test_peft_trains_our_adapter_further(tmp_path: Path) -> None:
    save_causal("llama", tmp_path / "base")
    model = ours_with_adapter(tmp_path / "base", LoRAConfig(4, 8.0, dropout=0.1))
    save_adapter(model, tmp_path / "ours")
    peer = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"),
        tmp_path / "ours",
        is_trainable=True,
    )
    peer.eval()
    ids = torch.tensor(ragged(lengths=(20,)))
    optimizer = torch.optim.AdamW([p for p in peer.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        peer(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    peer.save_pretrained(tmp_path / "theirs")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # the hash of the base is there still
        trained = load_causal_lm(tmp_path / "theirs")
    assert worst_logit_gap(trained, peer, ragged(), "left") < CLOSE
    assert gap(trained, model) > FAR
    assert trained.adapter.config.dropout == 0.1


def test_dropout_is_pefts(tmp_path: Path) -> None:
    """Layers of one part each draw their zeros in the same order from the same generator."""
    save_causal("llama", tmp_path / "base")
    names = ("o_proj", "down_proj")
    config = LoRAConfig(4, 8.0, dropout=0.3, target_modules=names)
    model = ours_with_adapter(tmp_path / "base", config)
    save_adapter(model, tmp_path / "adapter")
    peer = in_peft(tmp_path / "base", tmp_path / "adapter")
    tokens = ragged(lengths=(31,))
    still = model.eval().logits(pack(tokens)).detach()
    logits = []
    for train in (
        lambda: model.train().logits(pack(tokens)),
        lambda: peer.train()(input_ids=torch.tensor(tokens)).logits[0],
    ):
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(3)
            logits.append(train())
    torch.testing.assert_close(*logits, rtol=0, atol=CLOSE)
    assert (logits[0] - still).abs().max() > FAR


def scores_of(peer, sequences: list[list[int]]) -> list[float]:
    with torch.no_grad():
        return [float(peer(input_ids=torch.tensor([s])).logits[0, 0]) for s in sequences]


@pytest.mark.parametrize("layout", ["llama", "opt", "gpt2"])
def test_classifiers_take_their_score_along(layout: str, tmp_path: Path) -> None:
    save_classifier(layout, tmp_path / "base")
    batch = pack(ragged())
    model = load_scalar_model(tmp_path / "base", lora=LoRAConfig(4, 8.0))
    randomise([p for p in model.parameters() if p.requires_grad])
    with torch.no_grad():
        ours = model(batch, last_rows(batch))
    save_adapter(model, tmp_path / "adapter")
    kind = AutoModelForSequenceClassification
    peer = peft.PeftModel.from_pretrained(
        kind.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    ).eval()
    torch.testing.assert_close(ours, torch.tensor(scores_of(peer, ragged())), rtol=0, atol=CLOSE)
    peer = theirs_with_adapter(
        tmp_path / "base", task_type="SEQ_CLS", r=3, target_modules=SOME[kin(layout)]
    )
    peer.save_pretrained(tmp_path / "theirs")
    with pytest.warns(UserWarning, match="no hash"), torch.no_grad():
        again = load_scalar_model(tmp_path / "theirs")(batch, last_rows(batch))
    torch.testing.assert_close(again, torch.tensor(scores_of(peer, ragged())), rtol=0, atol=CLOSE)
    with pytest.raises(UserError, match="adapter of a sequence classifier, not of a language"):
        load_causal_lm(tmp_path / "adapter")


def test_a_classifiers_adapter_on_a_language_model(tmp_path: Path) -> None:
    """As step 2 trains it: the base has no score, the adapter has."""
    save_causal("llama", tmp_path / "base")
    model = load_scalar_model(tmp_path / "base", lora=LoRAConfig(4, 8.0), seed=5)
    save_adapter(model, tmp_path / "adapter")
    again = load_scalar_model(tmp_path / "adapter")
    assert torch.equal(model.score.weight, again.score.weight)
    policy = ours_with_adapter(tmp_path / "base", LoRAConfig(4, 8.0))
    save_adapter(policy, tmp_path / "policy")
    fresh = load_scalar_model(tmp_path / "policy", seed=5)  # a value model from a policy's adapter
    assert torch.equal(fresh.score.weight, model.score.weight)
    ours = dict(adapted_linears(policy))
    for name, linear in adapted_linears(fresh):
        assert torch.equal(linear.lora_b, ours[name].lora_b)


# --- the base ---


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    save_causal("llama", tmp_path / "base")
    save_adapter(ours_with_adapter(tmp_path / "base", LoRAConfig(2, 4.0)), tmp_path / "adapter")
    return tmp_path / "adapter"


def edit(adapter: Path, **settings) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def test_another_base_is_refused(adapter: Path, tmp_path: Path) -> None:
    save_causal("llama", tmp_path / "other", seed=1)
    with pytest.raises(UserError, match="adapter was trained on another base.*other have"):
        load_causal_lm(adapter, base=tmp_path / "other")
    save_causal("qwen3", tmp_path / "qwen3")
    with pytest.raises(UserError, match="was trained on another base"):
        load_causal_lm(adapter, base=tmp_path / "qwen3")


def test_the_base_may_move_and_be_cut_otherwise(adapter: Path, tmp_path: Path) -> None:
    before = load_causal_lm(adapter)
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(UserError, match="base of this adapter cannot be had.*base: no such model"):
        load_causal_lm(adapter)
    assert gap(before, load_causal_lm(adapter, base=tmp_path / "moved")) == 0.0
    save_model(load_causal_lm(tmp_path / "moved"), tmp_path / "shards", max_shard_bytes=20_000)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    assert gap(before, load_causal_lm(adapter, base=tmp_path / "shards")) == 0.0
    save_model(load_causal_lm(tmp_path / "moved", "bfloat16"), tmp_path / "rounded")
    with pytest.raises(UserError, match="another base"):
        load_causal_lm(adapter, base=tmp_path / "rounded")


def test_a_base_that_cannot_be(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a whole model; only an adapter takes a base"):
        load_causal_lm(tmp_path / "base", base=tmp_path / "base")
    with pytest.raises(UserError, match="an adapter, where a whole model is needed"):
        load_causal_lm(adapter, base=adapter)
    edit(adapter, revision="v2")
    with pytest.raises(UserError, match="at revision v2; download that"):
        load_causal_lm(adapter)
    load_causal_lm(adapter, base=tmp_path / "base")
    edit(adapter, base_model_name_or_path=None, revision=None)
    with pytest.raises(UserError, match="names no base model; give one"):
        load_causal_lm(adapter)


def test_a_model_without_an_adapter_has_none_to_save(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="new: this model has no adapter to save"):
        save_adapter(load_causal_lm(tmp_path / "base"), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_an_adapter_is_trained_as_it_is(adapter: Path) -> None:
    for other in ({"lora": LoRAConfig(2)}, {"trainable_layers": 1}):
        with pytest.raises(UserError, match="is an adapter, which is trained as it is"):
            load_causal_lm(adapter, **other)


# --- what is not understood ---

REFUSED = {
    "peft_type": "IA3",
    "task_type": "TOKEN_CLS",
    "use_dora": True,
    "bias": "lora_only",
    "lora_bias": True,
    "rank_pattern": {"q_proj": 4},
    "alpha_pattern": {"q_proj": 4},
    "modules_to_save": ["lm_head"],
    "init_lora_weights": "pissa",
    "trainable_token_indices": [1],
    "something_new": 1,
}


@pytest.mark.parametrize("key", REFUSED)
def test_settings_that_change_the_numbers_are_refused(adapter: Path, key: str) -> None:
    edit(adapter, **{key: REFUSED[key]})
    with pytest.raises(UserError, match=f"adapter_config.json: (sets )?{key} ") as caught:
        load_causal_lm(adapter)
    assert "\n" not in str(caught.value)


def test_files_that_do_not_fit(adapter: Path) -> None:
    from safetensors.torch import save_file

    path = adapter / "adapter_model.safetensors"
    whole = load_file(path)
    first = min(whole)
    embedding = "base_model.model.model.embed_tokens.weight"
    wrong = {
        "lacks": {n: t for n, t in whole.items() if n != first},
        "holds": {**whole, embedding: torch.zeros(101, 48)},
        "has shape": {**whole, first: torch.zeros(3, 48)},
        "holds no LoRA factors": {embedding: torch.zeros(101, 48)},
    }
    for words, tensors in wrong.items():
        save_file(tensors, path)
        with pytest.raises(UserError, match=words):
            load_causal_lm(adapter)
    path.write_bytes(b"damaged")
    with pytest.raises(UserError, match="damaged safetensors file"):
        load_causal_lm(adapter)
    path.unlink()
    with pytest.raises(UserError, match=r"no adapter_model\.safetensors"):
        load_causal_lm(adapter)
    edit(adapter, r="many")
    with pytest.raises(UserError, match="r and lora_alpha must be numbers"):
        load_causal_lm(adapter)


def test_longest_sequences_still_fit(adapter: Path) -> None:
    model = load_causal_lm(adapter)
    model.logits(pack(ragged(lengths=(CONTEXT,))))
