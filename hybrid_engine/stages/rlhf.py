"""Step 3, reinforcement learning from human feedback: generate, score, train (Ouyang et al.,
2022).
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import asdict

import torch

from hybrid_engine.config import PPOConfig, RunConfig
from hybrid_engine.data import Batches, PromptExample, SFTExample
from hybrid_engine.distributed.collectives import all_gather_json, all_reduce_moments, is_main
from hybrid_engine.engine.rollout import Rollout
from hybrid_engine.rewards import build_judge, build_rewards
from hybrid_engine.rl.ema import EMA
from hybrid_engine.rl.group import zero_std_groups
from hybrid_engine.rl.kl import make_kl_controller
from hybrid_engine.rl.metrics import Averages, explained_variance, response_statistics
from hybrid_engine.rl.moments import moments_of
from hybrid_engine.run import Run
from hybrid_engine.stages.cast import STAGE, Cast, Schedule, assemble, both_training
from hybrid_engine.stages.heldout import Heldout, compare, measure, write_samples
from hybrid_engine.stages.loop import Component, StageLoop, local_share
from hybrid_engine.stages.rollouts import Rollouts
from hybrid_engine.stages.scoring import Scored, Scorer
from hybrid_engine.stages.update import Updater, hash_seed


def train_rlhf(run: Run) -> None:
    """Trains the policy against the rewards and writes OUTPUT/rlhf/{actor,critic,actor_ema}."""
    config = run.config.rlhf
    source = run.policy_source(STAGE)
    tokenizer = run.tokenizer(source)
    data = run.load_data(STAGE, source, tokenizer)
    batches = prompt_batches(len(data.train), run.config)
    mix = build_rewards(run.config.judge)
    steps = optimizer_steps(len(batches), config)
    # All data is read before the loop below forgets earlier results.
    demonstrations = (
        demonstration_batches(run, source, tokenizer, steps.actor) if config.ptx_coef else None
    )
    with run.phase("load"):
        cast = assemble(run, source, tokenizer, steps, mix.needs_model)
    scorer = Scorer(cast, mix, make_kl_controller(config.kl), config)
    ema = EMA(cast.policy.local_parameters(), config.ema_decay) if config.ema_decay else None
    engines = {"actor": cast.policy} | ({"critic": cast.critic} if cast.critic else {})
    components: dict[str, Component] = {"kl": scorer.kl, "score_moments": scorer.moments}

    heldout = [data.heldout[i] for i in range(min(config.eval_prompts, len(data.heldout)))]
    unseen = run.config.judge.unseen_judge
    judge = build_judge(unseen, run.config.seed) if unseen != "none" else None

    def evaluate() -> Heldout:
        with run.phase("evaluate"):
            return measure(cast, heldout, scorer.mix, judge, run.config)

    averages = cast.policy.parts(ema.averages) if ema else None
    loop = StageLoop(run, STAGE, batches, config.save_steps, engines, components, averages)
    rollouts = Rollouts(run, cast, data.train)
    updater = Updater(cast, config, demonstrations)
    with run.reporter.stage(STAGE, loop.total, loop.start, loop.spent):
        before = Heldout(**loop.remember(lambda: asdict(evaluate())))
        for iteration, indices in loop:
            prompts = [data.train[i] for i in local_share(indices)]
            rollout, scored, values = iterate(
                run, rollouts, scorer, updater, prompts, indices, iteration
            )
            if ema is not None:
                ema.update(cast.policy.local_parameters())
            if trains_policy(iteration, config):
                scorer.kl.update(values["kl"], len(indices) * config.generation.samples_per_prompt)
            if loop.due(config.eval_steps, iteration):
                values |= {f"heldout_{name}": value for name, value in evaluate().means().items()}
            run.reporter.log(STAGE, iteration, values)
            show_sample(run, cast, rollout, scored, iteration)
        after = evaluate()
        save(run, cast, ema)
    if is_main():
        write_samples(run.output / "rlhf" / "samples.jsonl", heldout, before, after)
        show_pairs(run, heldout, before, after)
    run.finish(STAGE, {**compare(before, after), "iterations": len(batches)})


def iterate(
    run: Run,
    rollouts: Rollouts,
    scorer: Scorer,
    updater: Updater,
    prompts: list[PromptExample],
    indices: list[int],
    iteration: int,
) -> tuple[Rollout, Scored, dict[str, float]]:
    """Generate, score, train: one rollout of the prompts `indices`, of which `prompts` are this
    rank's.
    """
    cast, config = scorer.cast, run.config.rlhf
    places, total = sample_places(len(indices), config.generation.samples_per_prompt)
    with run.phase("generate"), cast.actor.generation():
        rollout = rollouts(indices, iteration)
    with run.phase("score"):
        scored = scorer(rollout, prompts)
    with run.phase("train"), both_training(cast):
        updates = updater(
            scored.experience,
            hash_seed(run.config.seed, iteration),
            places,
            total,
            train_policy=trains_policy(iteration, config),
            critic_pass=scored.critic_pass,
        )
    measured = rollout_metrics(rollout, scored, config)
    return rollout, scored, {**measured, "kl_coef": scorer.kl.coef, **updates}


def trains_policy(iteration: int, config: PPOConfig) -> bool:
    """Whether iteration 1, 2, ... comes after the critic's warm-up. Until then the KL is that of a
    policy at rest, which says nothing about its penalty.
    """
    return iteration > config.critic_warmup


def optimizer_steps(iterations: int, config: PPOConfig) -> Schedule:
    """How many steps actor and critic make in all.

    Raises:
        UserError: the critic's warm-up takes all iterations.
    """
    config.check_policy_trains(iterations)
    updates = config.epochs * config.minibatches
    return Schedule((iterations - config.critic_warmup) * updates, iterations * updates)


def prompt_batches(count: int, config: RunConfig) -> Batches:
    """Prompts of each iteration: one pass over all of them, or as many as the iterations take."""
    ppo = config.rlhf
    epochs = 0.0 if ppo.iterations else 1.0
    return Batches(count, ppo.prompts_per_iteration, config.seed, epochs, ppo.iterations)


def sample_places(num_prompts: int, n: int) -> tuple[list[int], int]:
    """The places of this rank's samples in a rollout of all ranks, n to a prompt, and how many
    there are.
    """
    mine = local_share(range(num_prompts))
    return [place * n + k for place in mine for k in range(n)], num_prompts * n


def rollout_metrics(rollout: Rollout, scored: Scored, config: PPOConfig) -> dict[str, float]:
    """What the rollout looked like, over all ranks: reward, KL, entropy, lengths, the critic's
    foresight.
    """
    averages, samples, experience = Averages(), len(rollout), scored.experience
    averages.add("reward", math.fsum(scored.raw.total), samples)
    for name, part in scored.raw.parts.items():
        given = [score for score in part if score is not None]
        averages.add(f"reward/{name}", math.fsum(given), len(given))
    averages.add("shaped_reward", scored.shaped.scores.sum(), samples)
    averages.add("score_clip_fraction", scored.shaped.clipped, samples)
    averages.add("kl", scored.kl.sum(), samples)
    averages.add("kl_per_token", scored.kl.sum(), experience.num_tokens)
    averages.add("kl_k3", scored.kl_k3.sum(), experience.num_tokens)
    averages.add(
        "rollout_entropy", math.fsum(map(math.fsum, rollout.entropies)), experience.num_tokens
    )
    if config.generation.truncated:
        kept = math.fsum(map(math.fsum, rollout.kept_mass))
        averages.add("kept_mass", kept, experience.num_tokens)
    finished = torch.tensor([reason == "stop" for reason in rollout.finish_reasons])
    for name, (total, weight) in response_statistics(rollout.lengths, finished).items():
        averages.add(name, total, weight)
    if config.generation.samples_per_prompt > 1:
        flat, groups = zero_std_groups(
            torch.tensor(scored.raw.total), config.generation.samples_per_prompt
        )
        averages.add("zero_std_groups", flat, groups)
    values = averages.result(all_gather_json)
    reward_moments = all_reduce_moments(moments_of(torch.tensor(scored.raw.total)))
    values["reward_std"] = math.sqrt(
        float(reward_moments[2]) / max(float(reward_moments[0]) - 1, 1)
    )
    if experience.values is not None and experience.returns is not None:
        returns = experience.returns[experience.mask]
        errors = returns - experience.values[experience.mask]
        values["explained_variance"] = explained_variance(
            all_reduce_moments(moments_of(errors)), all_reduce_moments(moments_of(returns))
        )
    return values


def demonstration_batches(
    run: Run, source: str, tokenizer: object, steps: int
) -> Callable[[int], list[SFTExample]]:
    """Step-1 rows for PPO-ptx: this rank's share for a step of the policy's optimizer, by its
    number, of `steps`. Each takes as many rows as a minibatch has samples.
    """
    ppo = run.config.rlhf
    data = run.load_data("sft", source, tokenizer)
    size = ppo.samples_per_iteration // ppo.minibatches
    batches = Batches(len(data.train), size, run.config.seed, 0.0, steps)

    def rows(step: int) -> list[SFTExample]:
        return [data.train[i] for i in local_share(batches.batch(step))]

    return rows


def save(run: Run, cast: Cast, ema: EMA | None) -> None:
    """Writes the models; those of an overwritten run that this one does not have go."""
    directory = run.output / "rlhf"
    run.save_model(cast.policy, directory / "actor", cast.tokenizer)
    if cast.critic is not None:
        run.save_model(cast.critic, directory / "critic", cast.tokenizer)
    if ema is not None:
        run.save_model(cast.policy, directory / "actor_ema", cast.tokenizer, ema.averages)
    for name, present in (("critic", cast.critic), ("actor_ema", ema)):
        if present is None and is_main():
            shutil.rmtree(directory / name, ignore_errors=True)


def show_sample(run: Run, cast: Cast, rollout: Rollout, scored: Scored, iteration: int) -> None:
    every = run.config.rlhf.sample_steps
    if every and len(rollout) and iteration % every == 0:
        prompt, answer = rollout.prompts[0], rollout.tokens[0]
        decode = cast.tokenizer.decode
        run.reporter.sample(
            decode(prompt),
            decode(answer, skip_special_tokens=True),
            scored.raw.total[0],
            f"iteration {iteration}",
        )


def show_pairs(
    run: Run, prompts: list[PromptExample], before: Heldout, after: Heldout, count: int = 3
) -> None:
    """A few held-out prompts with the answers of before and after."""
    for i in range(min(count, len(prompts))):
        run.reporter.sample(prompts[i].text, before.answers[i], before.reward[i], "before")
        run.reporter.sample(prompts[i].text, after.answers[i], after.reward[i], "after")
