"""What would otherwise come to light hours into a run, looked at before its first step."""

from __future__ import annotations

import torch

from hybrid_engine.config import RunConfig
from hybrid_engine.errors import UserError
from hybrid_engine.rewards import build_judge, build_rewards
from hybrid_engine.run import Run
from hybrid_kernels import native_available


def check(run: Run) -> None:
    """Looks at what the later steps will ask for.

    Raises:
        UserError: a file or package that is missing, or a setting that this machine cannot serve.
    """
    if torch.cuda.is_available():
        run.reporter.warn("this version trains and generates on the CPU: the GPU stays idle")
    check_dtype(run.config)
    zero_stage = run.zero_stage  # reads the DeepSpeed file
    if 3 in run.config.steps:
        check_step_3(run, zero_stage)


def check_step_3(run: Run, zero_stage: int) -> None:
    config = run.config
    if zero_stage == 3 and not native_available():
        raise UserError(
            "generating under ZeRO-3 needs the native kernels (see the warning above); use ZeRO "
            "stage 0, 1 or 2"
        )
    needs_reward_model = build_rewards(config.judge).needs_model or config.rlhf.uses_critic
    if needs_reward_model and 2 not in config.steps:
        run.trained_reward_model()
    if config.judge.unseen_judge != "none":
        build_judge(config.judge.unseen_judge, config.seed)


def check_dtype(config: RunConfig) -> None:
    dtype = config.model.dtype
    if dtype == "float32":
        return
    if dtype == "float16":
        raise UserError("--dtype float16 cannot be trained on a CPU; give float32 or bfloat16")
    if 3 in config.steps:
        raise UserError(
            f"--dtype {dtype}: step 3 generates with float32 weights on a CPU; give float32, or "
            "run steps 1 and 2 alone"
        )
