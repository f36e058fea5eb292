"""What would otherwise come to light hours into a run, looked at before its first step."""

from __future__ import annotations

import torch

from hybrid_engine.config import RunConfig
from hybrid_engine.distributed.collectives import world_size
from hybrid_engine.distributed.subgroup import check_divides
from hybrid_engine.engine.deepspeed_limits import check_supported
from hybrid_engine.engine.slices import slice_decoder
from hybrid_engine.engine.tensor_parallel import NEEDS, SETTING
from hybrid_engine.engine.weights import check_can_stream
from hybrid_engine.errors import UserError
from hybrid_engine.models import UnsupportedFamily
from hybrid_engine.models.checkpoint_io import context_of, spec_of
from hybrid_engine.plan import NOT_PLANNED, RunPlan, checked, plan_run
from hybrid_engine.rewards import build_judge, build_rewards
from hybrid_engine.run import Run
from hybrid_kernels import native_available


def check(run: Run) -> RunPlan | None:
    """Looks at what the later steps will ask for. Returns the plan of their memory, where there
    is one.

    Raises:
        UserError: a file or package that is missing, or a setting that this machine cannot serve.
    """
    if torch.cuda.is_available() and run.config.model.device == "cpu":
        run.reporter.warn("this run is on the CPU and the GPU stays idle: --device cuda uses it")
    check_dtype(run.config)
    check_supported(run.deepspeed_settings(), run.config.model.device)
    zero_stage = run.zero_stage
    if 3 in run.config.steps:
        check_step_3(run, zero_stage)
    elif {1, 2} <= set(run.config.steps):
        check_scorer(run, build_rewards(run.config.judge).needs_model)
    return check_memory(run)


def check_memory(run: Run) -> RunPlan | None:
    """Plans the steps that are still to be run, and says whether they fit.

    Raises:
        UserError: they cannot, and --memory-check is not "warn".
    """
    steps = tuple(step for step in run.config.steps if not run.finished(step))
    plan = plan_run(run.config, world_size(), steps) if steps else None
    if plan is None:
        if steps:
            run.reporter.note(f"memory: not planned: {NOT_PLANNED}")
        return None
    for line in plan.lines():
        run.reporter.note(line)
    run.reporter.planned_bytes = plan.bytes()
    checked(plan, run.config.memory_check, run.reporter.warn)
    return plan


def check_step_3(run: Run, zero_stage: int) -> None:
    config = run.config
    if zero_stage == 3 and not native_available():
        raise UserError(
            "generating under ZeRO-3 needs the native kernels (see the warning above); use ZeRO "
            "stage 0, 1 or 2"
        )
    if config.rlhf.frozen_models == "offload" and config.model.device == "cpu":
        raise UserError(
            "rlhf.frozen_models offload takes models from a GPU into the host's memory, where "
            "--device cpu has them anyhow; leave it out"
        )
    check_inference_tp(run)
    generation = config.rlhf.generation
    if zero_stage == 3 and world_size() > 1 and generation.weight_bytes:
        check_can_stream(generation.merge_adapters)
    needs_reward_model = build_rewards(config.judge).needs_model
    if needs_reward_model and not will_train(run, 2):
        run.trained_reward_model()
    check_scorer(run, needs_reward_model)
    if config.rlhf.ptx_coef and 2 in config.steps and 1 not in config.steps:
        source = planned_policy(run)
        run.load_data("sft", source, run.tokenizer(source))  # read now, not after step 2
    if config.judge.unseen_judge != "none":
        build_judge(config.judge.unseen_judge, config.seed)


def check_inference_tp(run: Run) -> None:
    ranks = run.config.rlhf.generation.inference_tp
    check_divides(ranks, SETTING)
    if ranks == 1:
        return
    if run.config.model.device != "cpu" or not native_available():
        raise UserError(NEEDS)
    try:
        slice_decoder(spec_of(planned_policy(run)), 0, ranks)
    except UnsupportedFamily as error:
        raise UserError(NEEDS) from error


def check_scorer(run: Run, needs_reward_model: bool) -> None:
    """Reward model and critic are given the policy's tokens: they must mean the same to them, and
    fit into their context.
    """
    if not needs_reward_model and not run.config.rlhf.uses_critic:
        return
    scorer = planned_scorer(run, needs_reward_model)
    if scorer is None:  # the policy itself
        return
    policy = planned_policy(run)
    check_same_tokens(run, policy, scorer)
    check_context(run, policy, scorer)


def will_train(run: Run, step: int) -> bool:
    return step in run.config.steps and not run.finished(step)


def planned_policy(run: Run) -> str:
    """What steps 2 and 3 start from, or what step 1 will make that from."""
    return run.policy_source("sft" if will_train(run, 1) else "rlhf")


def planned_scorer(run: Run, needs_reward_model: bool) -> str | None:
    """The model of step 3's scores and values, or what step 2 will make it from; None if that is
    the policy.
    """
    if not will_train(run, 2):
        return run.critic_source(needs_reward_model)
    return run.reward_source() if run.config.model.reward_model else None


def check_same_tokens(run: Run, policy: str, scorer: str) -> None:
    ours, theirs = (run.tokenizer(source).get_vocab() for source in (policy, scorer))
    if ours != theirs:
        differ = len({token for token, _ in ours.items() ^ theirs.items()})
        raise UserError(
            f"{scorer} has another tokenizer than the policy {policy} ({differ} tokens differ), "
            "whose tokens it would be given; take a reward model with the policy's tokenizer"
        )


def check_context(run: Run, policy: str, scorer: str) -> None:
    config = run.config
    longest = config.data.max_prompt_tokens + config.rlhf.generation.max_new_tokens
    needed, context = min(longest, context_of(policy)), context_of(scorer)
    if context < needed:
        raise UserError(
            f"{scorer} reads {context} tokens at most, and sequences of the policy {policy} may "
            f"have {needed}; lower data.max_prompt_tokens or rlhf.generation.max_new_tokens, or "
            "take a reward model with more context"
        )


def check_dtype(config: RunConfig) -> None:
    if config.model.dtype == "float16" and config.model.device == "cpu":
        raise UserError("--dtype float16 cannot be trained on a CPU; give float32 or bfloat16")
