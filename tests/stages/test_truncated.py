"""Step 3 with top-k and top-p: the policy that is trained is the one that was sampled from."""

from __future__ import annotations

import math
import shutil

import pytest

from tests.stages.runs import column, metrics


@pytest.mark.parametrize("top_k, top_p", [(30, 1.0), (0, 0.9)])
def test_the_first_ratio_is_one(trainer, prepared, tmp_path, top_k, top_p):
    """One step a rollout, so that every ratio is a first one, and would be the kept mass if
    training took the whole vocabulary.
    """
    output = shutil.copytree(prepared, tmp_path / "output")
    sampling = {"rlhf.generation.top_k": top_k, "rlhf.generation.top_p": top_p}
    trainer.having({**sampling, "rlhf.minibatches": 1})(output, "--steps", "3")
    lines = metrics(output, "rlhf")
    assert all(0 < mass < 0.99 for mass in column(lines, "kept_mass"))
    assert column(lines, "first_log_ratio") == [0.0] * 3
    assert column(lines, "ratio_max") == [1.0] * 3
    assert column(lines, "approx_kl") == [0.0] * 3
    if top_k:
        assert all(0 < entropy <= math.log(top_k) for entropy in column(lines, "entropy"))
    kl = column(lines, "kl_k3")  # of the whole distributions: truncation is no distance
    assert kl[0] == 0.0 < kl[-1]


def test_several_minibatches_learn(trainer, prepared, tmp_path):
    output = shutil.copytree(prepared, tmp_path / "output")
    sampling = {"rlhf.generation.top_k": 20, "rlhf.generation.temperature": 0.8}
    trainer.having({**sampling, "rlhf.epochs": 2, "rlhf.entropy_coef": 0.01})(
        output, "--steps", "3"
    )
    lines = metrics(output, "rlhf")
    assert column(lines, "first_log_ratio") == [0.0] * 3
    assert all(0 < kl < 1 for kl in column(lines, "approx_kl"))
