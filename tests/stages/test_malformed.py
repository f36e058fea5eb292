"""Mistakes of every kind end in one line on stderr, and take nothing away."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hybrid_engine import preflight, train_rlhf
from tests.stages.runs import Trainer, files, metrics, summary

GOOD_ROW = json.dumps({"prompt": "film is", "chosen": " good", "rejected": " bad"})


def bad_json(trainer: Trainer, scratch: Path) -> tuple[Trainer, list[str], str]:
    data = scratch / "rows.jsonl"
    data.write_text(f'{GOOD_ROW}\n{{"prompt": "film is", "chosen"\n')
    return Trainer(trainer.model, data), [], f"{data}:2: bad JSON"


def missing_column(trainer: Trainer, scratch: Path) -> tuple[Trainer, list[str], str]:
    data = scratch / "rows.jsonl"
    data.write_text(f'{GOOD_ROW}\n{{"prompt": "film is", "chosen": " good"}}\n')
    return Trainer(trainer.model, data), [], f"{data}:2: column 'rejected' is missing"


def empty_file(trainer: Trainer, scratch: Path) -> tuple[Trainer, list[str], str]:
    data = scratch / "rows.jsonl"
    data.write_text("")
    return Trainer(trainer.model, data), [], str(data)


def long_prompts(trainer: Trainer, scratch: Path) -> tuple[Trainer, list[str], str]:
    """The tiny model has a context of 512."""
    return trainer.having({"data.max_length": 2000}), [], "data.max_length (2000) is more than"


def long_prompts_and_a_silent_tokenizer(
    trainer: Trainer, scratch: Path
) -> tuple[Trainer, list[str], str]:
    """Where the tokenizer does not say how long a sequence may be, the model does."""
    model = shutil.copytree(trainer.model, scratch / "model")
    settings = json.loads((model / "tokenizer_config.json").read_text())
    del settings["model_max_length"]
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    return Trainer(model, trainer.data).having({"data.max_length": 2000}), [], "context of 512"


def no_room_for_answers(trainer: Trainer, scratch: Path) -> tuple[Trainer, list[str], str]:
    """Every prompt is longer than what the settings allow."""
    return trainer.having({"data.max_prompt_tokens": 2}), [], "no rows to train on"


def wrong_model_path(trainer: Trainer, scratch: Path) -> tuple[Trainer, list[str], str]:
    return Trainer(scratch / "no-model", trainer.data), [], "no-model: no such model directory"


def unknown_yaml_key(trainer: Trainer, scratch: Path) -> tuple[Trainer, list[str], str]:
    recipe = scratch / "run.yaml"
    recipe.write_text("seed: 1\nrlhf:\n  kl:\n    coeff: 0.1\n")
    return trainer, ["--config", str(recipe)], f"{recipe}:4: unknown key 'rlhf.kl.coeff'"


def non_numeric_split(trainer: Trainer, scratch: Path) -> tuple[Trainer, list[str], str]:
    return trainer, ["--data-split", "two,4,4"], "--data-split"


def truncated_weights(trainer: Trainer, scratch: Path) -> tuple[Trainer, list[str], str]:
    model = shutil.copytree(trainer.model, scratch / "model")
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    return Trainer(model, trainer.data), [], "model.safetensors: damaged safetensors file"


def missing_reward_file(trainer: Trainer, scratch: Path) -> tuple[Trainer, list[str], str]:
    return trainer.having({"judge.rewards": "gone.py:f"}), [], "reward file gone.py does not exist"


def reward_model_that_is_missing(trainer: Trainer, scratch: Path) -> tuple[Trainer, list[str], str]:
    shutil.rmtree(scratch / "output/reward")
    return trainer, ["--steps", "1", "3"], "step 3 needs a reward model and"


def reward_model_without_a_head(trainer: Trainer, scratch: Path) -> tuple[Trainer, list[str], str]:
    """A language model would be given a random head, and PPO would maximise noise."""
    shutil.rmtree(scratch / "output/reward")
    wanted = f"reward model {trainer.model} is a LlamaForCausalLM without a score head; train it in"
    return trainer, ["--steps", "3", "--reward-model", str(trainer.model)], wanted


def other_tokenizer(trainer: Trainer, scratch: Path) -> tuple[Trainer, list[str], str]:
    """Refused before step 1, though it shows in step 3 only."""
    model = shutil.copytree(trainer.model, scratch / "model")
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    wanted = f"{model} has another tokenizer than the policy {trainer.model} (2 tokens differ)"
    return trainer, ["--reward-model", str(model)], wanted


def reward_model_of_short_context(
    trainer: Trainer, scratch: Path
) -> tuple[Trainer, list[str], str]:
    """Prompts of 32 tokens and answers of 12."""
    model = shutil.copytree(trainer.model, scratch / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 43}))
    wanted = f"{model} reads 43 tokens at most, and sequences of the policy {trainer.model} may"
    return trainer, ["--reward-model", str(model)], wanted


def no_demonstrations(trainer: Trainer, scratch: Path) -> tuple[Trainer, list[str], str]:
    """Bare prompts are enough for step 3, but not for the language-modelling loss."""
    data = scratch / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"film {i} is"}) + "\n" for i in range(40)))
    mixed = Trainer(trainer.model, data, {**trainer.settings, "rlhf.ptx_coef": 1.0})
    return mixed, ["--steps", "3"], str(data)


def demonstrations_that_step_2_would_wait_for(
    trainer: Trainer, scratch: Path
) -> tuple[Trainer, list[str], str]:
    mixed, _, wanted = no_demonstrations(trainer, scratch)
    return mixed, ["--steps", "2", "3"], wanted


def too_long_a_warmup(trainer: Trainer, scratch: Path) -> tuple[Trainer, list[str], str]:
    """How many iterations one pass over the prompts takes is known once they are read."""
    settings = {"rlhf.iterations": 0, "rlhf.critic_warmup": 30}
    return trainer.having(settings), ["--steps", "3"], "leaves none of the"


def half_precision_without_gpu(trainer: Trainer, scratch: Path) -> tuple[Trainer, list[str], str]:
    return trainer.having({"dtype": "float16"}), [], "float16 cannot be trained on a CPU"


def ranks_that_do_not_divide(trainer: Trainer, scratch: Path) -> tuple[Trainer, list[str], str]:
    return trainer, ["--inference-tp", "2"], "inference_tp is 2, which does not divide the 1 rank"


def bad_deepspeed_json(trainer: Trainer, scratch: Path) -> tuple[Trainer, list[str], str]:
    settings = scratch / "ds.json"
    settings.write_text('{"zero_optimization": ')
    return trainer, ["--deepspeed", str(settings)], str(settings)


MISTAKES = [
    bad_json,
    missing_column,
    empty_file,
    long_prompts,
    long_prompts_and_a_silent_tokenizer,
    no_room_for_answers,
    wrong_model_path,
    unknown_yaml_key,
    non_numeric_split,
    truncated_weights,
    missing_reward_file,
    reward_model_that_is_missing,
    reward_model_without_a_head,
    other_tokenizer,
    reward_model_of_short_context,
    no_demonstrations,
    demonstrations_that_step_2_would_wait_for,
    too_long_a_warmup,
    half_precision_without_gpu,
    ranks_that_do_not_divide,
    bad_deepspeed_json,
]


def check_one_line(shown: str, wanted: str) -> None:
    lines = shown.strip().splitlines()
    assert len(lines) == 1, shown
    assert lines[0].startswith("error: ")
    assert wanted in lines[0]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_costs_nothing(trainer, trained, tmp_path, capsys, mistake):
    """Even --overwrite leaves finished results alone until what replaces them can begin."""
    output = shutil.copytree(trained, tmp_path / "output")
    mistaken, flags, wanted = mistake(trainer, tmp_path)
    before = files(output)
    mistaken(output, "--overwrite", *flags, expect=2)
    check_one_line(capsys.readouterr().err, wanted)
    assert metrics(output) == metrics(trained)
    assert summary(output) == summary(trained)
    assert files(output) == before


@pytest.mark.parametrize(
    ("native", "wanted"),
    [(True, "attention heads, of which every rank"), (False, "needs the native")],
)
def test_what_ranks_cannot_do_together_is_known_before_step_1(
    trainer, tmp_path, capsys, monkeypatch, native, wanted
):
    """As if there were 64 ranks."""
    monkeypatch.setattr(preflight, "check_divides", lambda size, setting: None)
    monkeypatch.setattr(preflight, "native_available", lambda: native)
    trainer(tmp_path / "output", "--inference-tp", "64", expect=2)
    check_one_line(capsys.readouterr().err, wanted)
    assert not (tmp_path / "output" / "sft").exists()


@pytest.mark.parametrize("below", ["", "/deeper"])
def test_an_unwritable_output(trainer, tmp_path, capsys, below):
    file = tmp_path / "file"
    file.write_text("not a directory")
    trainer(Path(f"{file}{below}"), expect=2)
    check_one_line(capsys.readouterr().err, f"--output-dir {file}{below}: ")
    assert file.read_text() == "not a directory"


REWARDS = """
import math
def nan(prompts, completions): return [1.0, math.nan] * len(prompts)
def broken(prompts, completions): return [1 / 0]
def text(prompts, completions): return ["good"] * len(prompts)
def few(prompts, completions): return [1.0]
"""


@pytest.mark.parametrize(
    "name, wanted",
    [
        ("few", "returned 1 scores for"),
        ("broken", "raised ZeroDivisionError: division by zero at"),
        ("text", "returned a str ('good') for sample 0"),
        ("gone", "has no function 'gone'"),
    ],
)
def test_a_reward_that_does_not_score(trainer, prepared, tmp_path, capsys, name, wanted):
    fail_in_step_3(trainer, prepared, tmp_path, name)
    check_one_line(capsys.readouterr().err, wanted)


def test_a_reward_that_returns_nan(trainer, prepared, tmp_path, capsys):
    rewards = REWARDS.replace("* len(prompts)", "* (len(prompts) // 2)", 1)
    output = fail_in_step_3(trainer, prepared, tmp_path, "nan", rewards)
    check_one_line(capsys.readouterr().err, "returned nan for sample 1 (prompt: ")
    assert metrics(output) == metrics(prepared)
    assert files(output) == files(prepared)


def fail_in_step_3(trainer, prepared, tmp_path, name, rewards=REWARDS) -> Path:
    output = shutil.copytree(prepared, tmp_path / "output")
    (tmp_path / "rewards.py").write_text(rewards)
    settings = {"judge.rewards": f"{tmp_path}/rewards.py:{name}", "rlhf.eval_prompts": 6}
    trainer.having(settings)(output, "--steps", "3", expect=2)
    return output


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """A full disk, as far as files of this process are concerned."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("save_steps", [1, 0])
def test_a_disk_that_fills_up(trainer, trained, tmp_path, capsys, save_steps):
    """While a checkpoint is written, and while the model is; the run resumes when there is room."""
    saving = trainer.having({"sft.save_steps": save_steps})
    with largest_file(100_000):
        saving(tmp_path, "--steps", "1", expect=2)
    check_one_line(capsys.readouterr().err, "File too large")
    saving(tmp_path, "--resume")
    assert metrics(tmp_path) == metrics(trained, "sft")
    model = "sft/model.safetensors"
    assert files(tmp_path)[model] == files(trained)[model]


def test_a_bug_is_one_line_with_the_traceback_in_the_log(trainer, tmp_path, capsys, monkeypatch):
    def fail(*_):
        raise KeyError("a bug")

    monkeypatch.setattr("hybrid_engine.stages.sft.train_step", fail)
    trainer(tmp_path, expect=1)
    log = tmp_path / "run.log"
    wanted = f"internal error: KeyError: 'a bug' (traceback in {log})\n"
    assert capsys.readouterr().err == wanted
    assert "Traceback (most recent call last)" in log.read_text()


def test_help_is_no_error(capsys):
    with pytest.raises(SystemExit) as ended:
        train_rlhf.main(["--help"])
    assert ended.value.code == 0
    assert "--actor-model" in capsys.readouterr().out
