"""One engine in one process: clipping, schedule, skipped steps, parameter views."""

import math

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from hybrid_engine.config import OptimizerConfig
from hybrid_engine.engine.optim import build_adamw, learning_rate
from hybrid_engine.engine.train_engine import TrainEngine
from hybrid_engine.errors import UserError
from hybrid_engine.models import load_causal_lm, save_model
from hybrid_engine.models.shard_writer import ShardWriter
from tests.tiny import make_tiny_model, make_tiny_tokenizer

STAGES = (0, 1, 2, 3)


def make_engine(stage: int = 0, dtype: torch.dtype = torch.float32, **options) -> TrainEngine:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).to(dtype)
    module[0].bias.requires_grad_(False)
    config = OptimizerConfig(
        **{"learning_rate": 0.1, "schedule": "constant", "warmup_ratio": 0, **options}
    )
    return TrainEngine(module, config, 10, {"zero_optimization": {"stage": stage}}, name="policy")


def backward(engine: TrainEngine, factor: float = 1.0) -> None:
    dtype = next(engine.module.parameters()).dtype
    x = torch.linspace(-1, 1, 12, dtype=dtype).reshape(3, 4)
    engine.backward(engine(x).square().sum() * factor, 3)


def snapshot(engine: TrainEngine) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in engine.gathered_state_dict().items()}


def test_settings_that_follow_from_other_arguments_are_refused():
    """Overriding them silently would train with other numbers than the caller wrote down."""
    module, config = nn.Linear(2, 1), OptimizerConfig(learning_rate=0.1)
    with pytest.raises(UserError, match='deepspeed_config: remove "gradient_clipping"'):
        TrainEngine(module, config, 10, {"gradient_clipping": 0.1})
    with pytest.raises(UserError, match='deepspeed_config: remove "scheduler"'):
        TrainEngine(module, config, 10, {"scheduler": "WarmupLR"})
    automatic = {"train_batch_size": "auto", "zero_optimization": {"stage": 1}, "bf16": "auto"}
    assert TrainEngine(module, config, 10, automatic).zero_stage == 1


@pytest.mark.parametrize("stage", STAGES)
def test_matches_plain_torch_with_clipping(stage):
    """Three clipped steps in which the clip binds, against torch's own AdamW and
    clip_grad_norm_."""
    engine = make_engine(stage, max_grad_norm=0.05, weight_decay=0.1)
    plain = make_engine().module
    optimizer = build_adamw(plain, OptimizerConfig(learning_rate=0.1, weight_decay=0.1))
    x = torch.linspace(-1, 1, 12).reshape(3, 4)
    for _ in range(3):
        backward(engine)
        norm = engine.step()
        (plain(x).square().sum() / 3).backward()
        expected = nn.utils.clip_grad_norm_(plain.parameters(), 0.05)
        optimizer.step()
        optimizer.zero_grad()
        assert norm > 0.05
        assert norm == pytest.approx(float(expected), rel=1e-5)
    # Clip factors differ in the 1e-6 that guards their division; Adam's normalisation cancels most
    # of it.
    for name, tensor in snapshot(engine).items():
        torch.testing.assert_close(tensor, plain.state_dict()[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_a_non_finite_step_changes_nothing(stage, factor):
    engine = make_engine(stage, max_bad_steps=3)
    backward(engine)
    engine.step()
    before = snapshot(engine)
    backward(engine)
    backward(engine, factor)
    assert not math.isfinite(engine.step())
    after = snapshot(engine)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert engine.skipped_steps == 1
    assert engine.steps == 2
    backward(engine)
    assert math.isfinite(engine.step())
    assert not torch.equal(snapshot(engine)["2.weight"], before["2.weight"])


@pytest.mark.parametrize("stage", STAGES)
def test_too_many_in_a_row_end_the_run_with_the_culprit(stage):
    engine = make_engine(stage, max_bad_steps=2)
    backward(engine, math.nan)
    engine.step()
    backward(engine, math.nan)
    with pytest.raises(
        UserError, match="policy: 2 optimizer steps in a row .*the loss was nan on rank 0"
    ):
        engine.step()


def test_a_finite_loss_with_a_bad_gradient_names_the_parameters():
    engine = make_engine(max_bad_steps=2)
    engine.module[2].weight.register_hook(lambda grad: grad * math.inf)
    for _ in range(2):
        backward(engine)
        if engine.skipped_steps == 0:
            engine.step()
    with pytest.raises(UserError, match=r"the gradient of 2\.weight on rank 0"):
        engine.step()


def test_good_steps_in_between_forgive():
    engine = make_engine(max_bad_steps=2)
    for factor in (math.nan, 1.0, math.nan, 1.0, math.nan):
        backward(engine, factor)
        engine.step()
    assert engine.skipped_steps == 3


@pytest.mark.parametrize("stage", STAGES)
def test_bf16_trains(stage):
    engine = make_engine(stage, torch.bfloat16)
    x = torch.linspace(-1, 1, 12, dtype=torch.bfloat16).reshape(3, 4)
    first = float(engine(x).detach().square().sum())
    for _ in range(5):
        backward(engine)
        assert math.isfinite(engine.step())
    assert float(engine(x).detach().square().sum()) < 0.7 * first


@pytest.mark.parametrize("stage", STAGES)
def test_replaced_parameters_are_shown_and_restored(stage):
    engine = make_engine(stage)
    backward(engine)
    engine.step()
    before = snapshot(engine)
    other = {name: torch.full_like(t, 0.5) for name, t in engine.local_parameters().items()}
    with engine.parameters_replaced(other):
        shown = snapshot(engine)
        with engine.full_parameters() as module:
            assert torch.equal(module[0].weight, torch.full((6, 4), 0.5))
    assert torch.equal(shown["0.weight"], torch.full((6, 4), 0.5))
    assert torch.equal(shown["0.bias"], before["0.bias"])
    after = snapshot(engine)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert set(before) == {"0.weight", "0.bias", "2.weight", "2.bias"}


def test_schedule():
    config = OptimizerConfig(
        learning_rate=2.0, schedule="linear", warmup_ratio=0.2, min_lr_ratio=0.1
    )
    rates = [learning_rate(step, 10, config) for step in range(12)]
    assert rates[:3] == pytest.approx([2 / 3, 4 / 3, 2.0])
    assert rates[6] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert rates[10] == rates[11] == pytest.approx(0.2)
    cosine = OptimizerConfig(learning_rate=2.0, schedule="cosine", warmup_ratio=0.0)
    assert [learning_rate(s, 4, cosine) for s in (0, 2, 4)] == pytest.approx([2.0, 1.0, 0.0])
    constant = OptimizerConfig(learning_rate=2.0, schedule="constant", warmup_ratio=0.0)
    assert learning_rate(9, 10, constant) == 2.0


def test_decay_spares_biases_and_norms():
    module = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Embedding(2, 3))
    module[2].requires_grad_(False)
    groups = build_adamw(module, OptimizerConfig(weight_decay=0.1)).param_groups
    assert [(g["weight_decay"], sorted(tuple(p.shape) for p in g["params"])) for g in groups] == [
        (0.1, [(3, 3)]),
        (0.0, [(3,), (3,), (3,)]),
    ]


def test_nothing_to_train_is_explained():
    with pytest.raises(UserError, match="no trainable parameter"):
        TrainEngine(nn.Linear(2, 2).requires_grad_(False), OptimizerConfig(), 1)


def zero3_of(model) -> TrainEngine:
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    return TrainEngine(model, OptimizerConfig(), 1, {"zero_optimization": zero})


def weights(directory):
    return {k: v for path in directory.glob("*.safetensors") for k, v in load_file(path).items()}


def test_export_from_zero3_has_one_module_whole_at_a_time(tmp_path, monkeypatch):
    model = load_causal_lm(make_tiny_model(tmp_path / "in"))
    largest = max(sum(p.numel() for p in m.parameters(recurse=False)) for m in model.modules())
    zero3_of(model)
    assert not any(p.numel() for p in model.parameters())
    add, whole, files = ShardWriter.add, [], set()

    def watched(self, name, tensor):
        whole.append(sum(p.numel() for p in model.parameters()))
        add(self, name, tensor)
        files.update(path.name for path in self._target.iterdir())

    monkeypatch.setattr(ShardWriter, "add", watched)
    save_model(model, tmp_path / "out", max_shard_bytes=100_000)
    assert 0 < max(whole) <= largest
    assert {"shard-0", "shard-1"} <= files  # written as they came
    assert not any(p.numel() for p in model.parameters())
    before, after = weights(tmp_path / "in"), weights(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert (tmp_path / "out/model.safetensors.index.json").is_file()


@pytest.mark.filterwarnings("ignore:no native decoder")
def test_a_foreign_family_is_exported_from_zero3_as_well(tmp_path):
    config = GPTNeoXConfig(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
    )
    GPTNeoXForCausalLM(config).save_pretrained(tmp_path / "in")
    make_tiny_tokenizer().save_pretrained(tmp_path / "in")
    model = load_causal_lm(tmp_path / "in")
    assert not model.native
    zero3_of(model)
    save_model(model, tmp_path / "out")
    before, after = weights(tmp_path / "in"), weights(tmp_path / "out")
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
