"""A rollout that one step takes whole: the critic's scoring forward is the step's own."""

import shutil

import pytest

from hybrid_engine.stages import scoring
from hybrid_engine.stages.update import Updater
from tests.stages.runs import files, metrics

WHOLE = {"rlhf.minibatches": 1, "rlhf.epochs": 2, "rlhf.max_tokens_per_pass": 4096}


@pytest.fixture
def reused(monkeypatch):
    """Of every pass of the critic in training: whether its forward had been made."""
    seen = []
    critic_pass = Updater._critic_pass

    def watched(self, *arguments):
        seen.append(arguments[-1] is not None)
        critic_pass(self, *arguments)

    monkeypatch.setattr(Updater, "_critic_pass", watched)
    return seen


@pytest.mark.parametrize("settings", [{}, {"model.trainable_layers": 1}, {"zero_stage": 3}])
def test_keeping_the_graph_changes_no_bit(
    trainer, prepared, tmp_path, monkeypatch, reused, settings
):
    flags = ["--steps", "3"]
    if "zero_stage" in settings:
        flags += ["--zero-stage", str(settings["zero_stage"])]
        settings = {}
    whole = trainer.having({**WHOLE, **settings})
    kept = whole(shutil.copytree(prepared, tmp_path / "kept"), *flags)
    assert reused == [True, False] * 3  # two epochs of three iterations
    reused.clear()

    score = scoring.score_with_models
    monkeypatch.setattr(
        scoring, "score_with_models", lambda *arguments, for_update: score(*arguments)
    )
    again = whole(shutil.copytree(prepared, tmp_path / "again"), *flags)
    assert reused == [False] * 6
    assert metrics(kept, "rlhf") == metrics(again, "rlhf")
    assert files(kept) == files(again)


@pytest.mark.parametrize("settings", [{"rlhf.minibatches": 2}, {"rlhf.max_tokens_per_pass": 64}])
def test_several_steps_or_passes_keep_none(trainer, prepared, tmp_path, reused, settings):
    output = shutil.copytree(prepared, tmp_path / "output")
    trainer.having({**WHOLE, **settings, "rlhf.iterations": 1})(output, "--steps", "3")
    assert reused
    assert not any(reused)
