"""The three steps in one run and one by one, and what may be done to results that exist."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from hybrid_engine import train_rlhf
from tests.stages.runs import Trainer, column, files, metrics, summary
from tests.tiny import make_tiny_model


def test_the_output_directory_has_what_its_contract_says(trained):
    for name in ("config.yaml", "run.log", "metrics.jsonl", "summary.json"):
        assert (trained / name).is_file()
    assert {p.name for p in (trained / "rlhf").iterdir()} == {"actor", "critic", "samples.jsonl"}
    assert not list((trained / "checkpoints").glob("*/*"))  # they have done their duty
    assert [(m["stage"], m["iteration"]) for m in metrics(trained)] == [
        (stage, i) for stage in ("sft", "reward", "rlhf") for i in (1, 2, 3)
    ]
    results = json.loads((trained / "summary.json").read_text())
    assert {"heldout_loss_before", "heldout_loss_after", "seconds"} <= results["sft"].keys()
    assert {"heldout_accuracy", "seconds"} <= results["reward"].keys()
    wanted = {"reward_before", "reward_after", "reward_se", "kl", "seconds"}
    assert wanted <= results["rlhf"].keys()


def test_transformers_opens_every_model(trained):
    for name in ("sft", "rlhf/actor"):
        AutoModelForCausalLM.from_pretrained(trained / name)
        AutoTokenizer.from_pretrained(trained / name)
    for name in ("reward", "rlhf/critic"):
        model = AutoModelForSequenceClassification.from_pretrained(trained / name)
        assert model.config.num_labels == 1


def test_training_moves_every_model_and_lowers_the_loss(trained, tiny_model):
    def weights(path):
        state = AutoModelForCausalLM.from_pretrained(path).state_dict()
        return torch.cat([tensor.flatten() for tensor in state.values()])

    start, tuned, final = map(weights, (tiny_model, trained / "sft", trained / "rlhf/actor"))
    assert not torch.equal(start, tuned)
    assert not torch.equal(tuned, final)
    results = summary(trained)["sft"]
    assert results["heldout_loss_after"] < results["heldout_loss_before"]


def test_generation_and_training_agree_exactly_in_every_iteration(trained):
    assert column(metrics(trained, "rlhf"), "first_log_ratio") == [0.0, 0.0, 0.0]
    assert len(set(column(metrics(trained, "rlhf"), "response_length"))) > 1


def test_so_they_do_in_bfloat16(trainer, tmp_path):
    output = trainer.having({"model.dtype": "bfloat16"})(tmp_path)
    assert column(metrics(output, "rlhf"), "first_log_ratio") == [0.0, 0.0, 0.0]
    saved = AutoModelForCausalLM.from_pretrained(output / "rlhf/actor", dtype="auto")
    assert saved.dtype == torch.bfloat16


def test_steps_one_by_one_equal_one_run(trainer, trained, tmp_path):
    for step in ("1", "2", "3"):
        trainer(tmp_path, "--steps", step)
    assert metrics(tmp_path) == metrics(trained)
    assert summary(tmp_path) == summary(trained)
    assert files(tmp_path) == files(trained)


def test_results_are_not_trained_over_unasked(trainer, prepared, tmp_path, capsys):
    output = shutil.copytree(prepared, tmp_path / "output")
    before = {p: p.read_bytes() for p in output.rglob("*") if p.is_file() and p.name != "run.log"}
    trainer(output, "--steps", "2", expect=2)
    message = capsys.readouterr().err
    assert message.startswith(f"error: {output} holds a finished step 2 (reward)")
    assert message.count("\n") == 1
    assert {p: p.read_bytes() for p in before} == before


def test_models_that_are_named_in_vain_are_warned_of(trainer, prepared, tmp_path, capsys):
    """Step 3 starts from what OUTPUT holds, whatever else is named."""
    output = shutil.copytree(prepared, tmp_path / "output")
    other = shutil.copytree(trainer.model, tmp_path / "other")
    capsys.readouterr()
    flags = ["--steps", "3", "--reward-model", str(other)]
    Trainer(other, trainer.data, trainer.settings)(output, *flags)
    said = capsys.readouterr()
    shown = said.out + said.err
    assert f"--actor-model {other} is not what step 3 starts from: {output / 'sft'} is" in shown
    assert f"there, made from {trainer.model};" in shown
    assert f"--reward-model {other} is not what step 3 starts from: {output / 'reward'}" in shown
    assert f"rlhf: the policy starts from {output / 'sft'}" in shown
    assert f"rlhf: the reward model is {output / 'reward'}" in shown
    assert f"rlhf: the critic starts from {output / 'reward'}\n" in shown


def test_the_models_of_the_earlier_run_are_named_without_a_warning(
    trainer, prepared, tmp_path, capsys
):
    output = shutil.copytree(prepared, tmp_path / "output")
    capsys.readouterr()
    trainer(output, "--steps", "3")
    said = capsys.readouterr()
    assert "is not what" not in said.out + said.err


def test_resume_passes_over_finished_steps(trainer, prepared, trained, tmp_path, capsys):
    output = shutil.copytree(prepared, tmp_path / "output")
    trainer(output, "--resume", "--steps", "1", "2", "3")
    shown = capsys.readouterr().out
    assert "step 1 is done already" in shown
    assert "step 2 is done already" in shown
    assert metrics(output) == metrics(trained)
    assert files(output) == files(trained)


def test_overwrite_trains_anew(trainer, trained, tmp_path):
    output = shutil.copytree(trained, tmp_path / "output")
    trainer.having({"sft.max_steps": 2, "seed": 3})(output, "--steps", "1", "2", "--overwrite")
    assert [(m["stage"], m["iteration"]) for m in metrics(output)] == [
        *(("rlhf", i) for i in (1, 2, 3)),
        *(("sft", i) for i in (1, 2)),
        *(("reward", i) for i in (1, 2, 3)),
    ]
    assert metrics(output, "rlhf") == metrics(trained, "rlhf")
    assert files(output)["sft/model.safetensors"] != files(trained)["sft/model.safetensors"]


def test_overwriting_leaves_no_models_of_the_old_run(trainer, trained, tmp_path):
    output = shutil.copytree(trained, tmp_path / "output")
    grouped = {"rlhf.advantage": "rloo", "rlhf.generation.samples_per_prompt": 2}
    trainer.having(grouped)(output, "--steps", "3", "--overwrite")
    assert {p.name for p in (output / "rlhf").iterdir()} == {"actor", "samples.jsonl"}


def test_an_interrupted_overwriting_run_resumes_with_its_own_steps(
    trainer, trained, tmp_path, capsys, monkeypatch
):
    """Steps 2 and 3 of the run before must not pass for those of the run that replaces it."""

    def interrupt(*_):
        raise KeyboardInterrupt

    output = shutil.copytree(trained, tmp_path / "output")
    anew = trainer.having({"seed": 5})
    with monkeypatch.context() as patched:
        patched.setattr("hybrid_engine.stages.reward.train_step", interrupt)
        anew(output, "--overwrite", expect=130)
    assert capsys.readouterr().err.strip().startswith("interrupted; --resume continues")
    anew(output, "--resume")
    assert metrics(output) == metrics(anew(tmp_path / "fresh"))
    assert files(output) == files(tmp_path / "fresh")


def test_resume_and_overwrite_together_are_refused(trainer, tmp_path, capsys):
    trainer(tmp_path / "output", "--resume", "--overwrite", expect=2)
    assert "contradict" in capsys.readouterr().err
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("steps", ["2", "3"])
def test_a_step_alone_starts_from_the_named_models(trainer, prepared, tmp_path, steps, capsys):
    reward = [] if steps == "2" else ["--reward-model", str(prepared / "reward")]
    capsys.readouterr()
    trainer(tmp_path, "--steps", steps, *reward)
    started = "reward: starts" if steps == "2" else "rlhf: the policy starts"
    assert f"{started} from {trainer.model}\n" in capsys.readouterr().out


def test_one_pass_over_the_prompts_ends_with_a_short_rollout(trainer, prepared, tmp_path):
    output = shutil.copytree(prepared, tmp_path / "output")
    few = trainer.having({"rlhf.iterations": 0, "data.max_rows": 50, "rlhf.minibatches": 8})
    few(output, "--steps", "3")
    assert all(m["first_log_ratio"] == 0.0 for m in metrics(output, "rlhf"))


def test_the_written_settings_repeat_the_run(trained, tmp_path):
    again = ["--config", str(trained / "config.yaml"), "--output-dir", str(tmp_path)]
    assert train_rlhf.main(again) == 0
    assert metrics(tmp_path) == metrics(trained)
    assert files(tmp_path) == files(trained)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "opt", "gpt2"])
def test_every_native_family_takes_all_steps(preferences, tmp_path, family):
    model = make_tiny_model(tmp_path / "model", family)
    output = Trainer(model, preferences)(tmp_path / "output")
    assert column(metrics(output, "rlhf"), "first_log_ratio") == [0.0, 0.0, 0.0]
    sft = metrics(output, "sft")
    assert sft[-1]["loss"] < sft[0]["loss"]
    AutoModelForCausalLM.from_pretrained(output / "rlhf/actor")
    AutoModelForSequenceClassification.from_pretrained(output / "rlhf/critic")


def test_a_deepspeed_file_is_obeyed(trainer, trained, tmp_path, capsys):
    settings = tmp_path / "ds.json"
    settings.write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    output = trainer(tmp_path / "output", "--deepspeed", str(settings), "--steps", "1")
    ours, theirs = metrics(output, "sft"), metrics(trained, "sft")
    assert column(ours, "loss") == pytest.approx(column(theirs, "loss"), rel=1e-5)
    trainer(tmp_path / "other", "--deepspeed", str(settings), "--zero-stage", "2", expect=2)
    assert "--zero-stage is 2 but" in capsys.readouterr().err


def test_leftovers_of_a_killed_save_go(trainer, tmp_path):
    leftover = tmp_path / ".sft.partial-1"
    leftover.mkdir(parents=True)
    trainer(tmp_path, "--steps", "1")
    assert not leftover.exists()


def test_nothing_held_out_measures_nothing(trainer, tiny_model, tmp_path):
    """null, not a number that looks like a result."""
    few = tmp_path / "few.jsonl"
    row = {"prompt": "film is", "chosen": " good", "rejected": " bad"}
    few.write_text(json.dumps(row) + "\n")
    splits = {"1": "1,0,0", "2": "0,1,0", "3": "0,0,1"}
    for step, split in splits.items():
        lone = Trainer(tiny_model, few).having({"data.split": split})
        lone(tmp_path / "output", "--steps", step)
    results = summary(tmp_path / "output")
    assert results["sft"]["heldout_loss_after"] is None
    assert results["reward"]["heldout_accuracy"] is None
    assert results["rlhf"]["reward_after"] is None
    assert results["rlhf"]["heldout_prompts"] == 0
