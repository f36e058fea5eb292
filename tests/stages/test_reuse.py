"""Prompts that come back: their last answers save work, and change nothing."""

import shutil

import pytest

from hybrid_engine.engine.hybrid import HybridEngine
from tests.stages.runs import files, metrics

# 25 prompts to train on: the third rollout straddles two epochs, the others hold one.
TWO_EPOCHS = {
    "rlhf.iterations": 5,
    "rlhf.prompts_per_iteration": 10,
    "rlhf.save_steps": 3,
    "rlhf.generation.samples_per_prompt": 2,
    "rlhf.actor_optimizer.learning_rate": 1e-5,
}


@pytest.fixture
def rollouts(monkeypatch):
    """(arguments, result) of every rollout of the policy that names its random streams."""
    seen = []
    generate = HybridEngine.generate

    def watched(self, prompts, params, sample_ids, **options):
        result = generate(self, prompts, params, sample_ids, **options)
        if "drafts" in options:  # training's, not those of an evaluation
            seen.append((list(sample_ids), options, result))
        return result

    monkeypatch.setattr(HybridEngine, "generate", watched)
    return seen


def interrupt_at(last):
    def interrupt(*arguments):
        if arguments[-1] == last:
            raise KeyboardInterrupt

    return interrupt


def test_last_answers_are_drafts(trainer, prepared, tmp_path, rollouts, monkeypatch):
    """The same answers again need fewer steps; a resumed run, which knows none, has the same."""
    reusing = trainer.having({**TWO_EPOCHS, "rlhf.generation.reuse_responses": True})
    output = shutil.copytree(prepared, tmp_path / "whole")
    reusing(output, "--steps", "3")
    assert all(len(set(ids)) == 20 for ids, _, _ in rollouts)
    counters = [result.counters for _, _, result in rollouts]
    assert [c["draft_tokens"] > 0 for c in counters] == [False, False, True, True, True]
    assert counters[4]["draft_accepted"] > rollouts[4][2].lengths.sum() / 2
    whole = [result.tokens for _, _, result in rollouts]

    again = shutil.copytree(prepared, tmp_path / "again")
    with monkeypatch.context() as patched:
        patched.setattr("hybrid_engine.stages.rlhf.show_sample", interrupt_at(4))
        reusing(again, "--steps", "3", expect=130)
    rollouts.clear()
    reusing(again, "--steps", "3", "--resume")
    assert [result.tokens for _, _, result in rollouts] == whole[3:]
    assert rollouts[0][2].counters["draft_tokens"] == 0
    assert metrics(again, "rlhf") == metrics(output, "rlhf")
    assert files(again) == files(output)


def test_a_prompt_that_repeats_in_a_rollout_has_a_draft_for_each(
    trainer, prepared, tmp_path, rollouts
):
    """More prompts a rollout than there are: each visit has its own random streams and answers."""
    output = shutil.copytree(prepared, tmp_path / "output")
    repeated = {"rlhf.iterations": 2, "rlhf.prompts_per_iteration": 50}
    settings = {**TWO_EPOCHS, **repeated, "rlhf.generation.reuse_responses": True}
    trainer.having(settings)(output, "--steps", "3")
    assert [len(set(ids)) for ids, _, _ in rollouts] == [100, 100]
    first, second = (result for _, _, result in rollouts)
    assert second.counters["draft_accepted"] > 0.9 * first.lengths.sum()


def test_last_lengths_are_expected(trainer, prepared, tmp_path, rollouts):
    """Random streams are new in every epoch, and the longest answers of the last one go first."""
    output = shutil.copytree(prepared, tmp_path / "output")
    trainer.having(TWO_EPOCHS)(output, "--steps", "3")
    ids = [i for mine, _, _ in rollouts for i in mine]
    assert len(set(ids)) == len(ids) == 5 * 20
    assert [options["expected_lengths"] is None for _, options, _ in rollouts[:2]] == [True, True]
    assert len(set(rollouts[4][1]["expected_lengths"])) > 1
    assert all(options["drafts"] is None for _, options, _ in rollouts)
