"""A whole RLHF iteration (generate, score, train) against TRL: ``pytest benchmarks/bench_ppo.py``.

Policy, reference, reward model and value model are all of SmolLM2-135M's size, fp32, one epoch, one
minibatch, no gradient clipping, AdamW. Our side runs step 3's own stage functions. PPO needs TRL
1.12, the last with `trl.experimental.ppo`; GRPO runs with whichever TRL is installed. Which numbers
must agree between the sides is in `assert_same_numerics`; each draws its own answers.
"""

from __future__ import annotations

import importlib.util
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks import vowel_reward
from benchmarks.contest import OURS, Outcome, contest
from benchmarks.ending import with_mean_answer
from benchmarks.models import Cost, make_scorer, smollm2
from benchmarks.ppo_product import Iteration, Product, ppo_config
from benchmarks.workload import ragged_lengths, word_prompts
from hybrid_engine.data import PromptExample
from hybrid_engine.engine.rollout import Rollout
from hybrid_engine.models import load_tokenizer
from hybrid_kernels.bench import machine_limits

LEARNING_RATE = 3e-6
ROUNDS = 2  # a round of TRL's takes half a minute


def installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


needs_ppo = pytest.mark.skipif(
    not installed("trl.experimental.ppo"),
    reason="needs trl.experimental.ppo: pip install 'trl==1.12.0' datasets accelerate",
)
needs_grpo = pytest.mark.skipif(
    not installed("trl"), reason="needs TRL: pip install 'trl==1.16.0' datasets accelerate"
)


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_scorer(smollm2(), tmp_path_factory.mktemp("scorer") / "model")


def iteration_flops(
    cost: Cost, prompts: Sequence[int], responses: Sequence[int], n: int = 1
) -> int:
    """Generate, score with reference, reward model and critic, train policy and critic (a backward
    is two forwards). The policy's old log-probabilities are those of generating.
    """
    lengths = [prompts[i // n] + length for i, length in enumerate(responses)]
    language, scalar = (cost.forward_flops(lengths, rows) for rows in (sum(responses), 0))
    generating = cost.generate_flops(list(prompts), list(responses), n)
    return generating + language + 2 * scalar + 3 * (language + scalar)


def group_flops(cost: Cost, prompts: Sequence[int], responses: Sequence[int], n: int) -> int:
    """The same without reward model and critic; a prompt's rows are needed once for its n answers,
    in scoring and training too.
    """
    lengths = [prompts[i // n] + length for i, length in enumerate(responses)]
    repeated = cost.forward_flops(list(prompts), 0) * (n - 1)
    language = cost.forward_flops(lengths, sum(responses)) - repeated
    return cost.generate_flops(list(prompts), list(responses), n) + 4 * language


class Side:
    """A contender that remembers what its calls made."""

    def __init__(self, run: Any) -> None:
        self.run = run
        self.answers: list[int] = []  # lengths, over all rounds

    def __call__(self) -> Outcome:
        seconds, lengths = self.run()
        self.answers += lengths
        return Outcome(sum(lengths), seconds)


def iteration_info(name: str, flops: int, samples: int) -> dict[str, Any]:
    limits = machine_limits()
    return {
        "kind": "iteration",
        "iteration": name,
        "samples": samples,
        "flops": flops,
        "limit_seconds": flops / (limits.gflop_per_s * 1e9),
    }


@needs_ppo
def bench_ppo_fixed(benchmark: Any, scorer: Path, tmp_path: Path) -> None:
    """16 prompts of 32 tokens, 32 new ones each."""
    from benchmarks.peers.trl_ppo import TrlPPO

    model, new_tokens = smollm2(), 32
    prompts = word_prompts(load_tokenizer(model), [32] * 16)
    config = ppo_config(prompts=16, new_tokens=new_tokens, learning_rate=LEARNING_RATE)
    product = Product(model, tmp_path / "ours", config, scorer=scorer, eos_ends=False)
    peer = TrlPPO(model, scorer, prompts, new_tokens, LEARNING_RATE, tmp_path / "trl")
    assert_same_numerics(product, peer())
    flops = iteration_flops(Cost.of(model), [32] * 16, [new_tokens] * 16)
    run_ppo(benchmark, product, peer, prompts, iteration_info("PPO, fixed lengths", flops, 16))


@needs_ppo
def bench_ppo_ragged(benchmark: Any, scorer: Path, tmp_path: Path) -> None:
    """16 prompts of 8 to 64 tokens whose answers end by themselves, on average at about a third of
    the limit of 64.
    """
    from benchmarks.peers.trl_ppo import TrlPPO

    source, new_tokens = smollm2(), 64
    mean = new_tokens / 3
    prompts = word_prompts(load_tokenizer(source), ragged_lengths(16, 8, 64))
    model = with_mean_answer(source, prompts, new_tokens, mean, tmp_path / "policy")
    config = ppo_config(prompts=16, new_tokens=new_tokens, learning_rate=LEARNING_RATE)
    product = Product(model, tmp_path / "ours", config, scorer=scorer)
    (end,) = product.cast.actor.eos_token_ids
    peer = TrlPPO(model, scorer, prompts, new_tokens, LEARNING_RATE, tmp_path / "trl", end)
    product(prompts), peer()  # warm
    lengths = [len(prompt) for prompt in prompts]
    flops = iteration_flops(Cost.of(model), lengths, [round(mean)] * 16)
    info = iteration_info("PPO, ragged", flops, 16)
    run_ppo(benchmark, product, peer, prompts, info, same_tokens=False)


def run_ppo(
    benchmark: Any,
    product: Product,
    peer: Any,
    prompts: list[list[int]],
    info: dict[str, Any],
    same_tokens: bool = True,
) -> None:
    from trl import __version__

    def mine() -> tuple[dict[str, float], list[int]]:
        iteration = product(prompts)
        return iteration.seconds, iteration.rollout.lengths.tolist()

    def theirs() -> tuple[dict[str, float], list[int]]:
        outcome = peer()
        return outcome.seconds, [len(response) for response in outcome.responses]

    ours, trl = Side(mine), Side(theirs)
    try:
        contest(
            benchmark,
            ours,
            {f"TRL {__version__}": trl},
            rounds=ROUNDS,
            info=info,
            same_tokens=same_tokens,
        )
    finally:
        product.close()
    assert_like_lengths(ours.answers, trl.answers)
    benchmark.extra_info["mean_answer"] = {
        OURS: statistics.fmean(ours.answers),
        f"TRL {__version__}": statistics.fmean(trl.answers),
    }


def assert_like_lengths(ours: Sequence[int], theirs: Sequence[int]) -> None:
    """Both draw from one distribution: the means differ by less than four standard errors."""
    spread = sum(statistics.pvariance(side) / len(side) for side in (ours, theirs))
    assert abs(statistics.fmean(ours) - statistics.fmean(theirs)) <= 4 * math.sqrt(spread)


def assert_same_numerics(product: Product, theirs: Any) -> None:
    """For the answers of TRL's first iteration, before anything was trained, our forward passes and
    shaping give its statistics: the policy's log-probabilities, the reward model's scores, and
    values with returns (KL penalty and GAE included) through the value loss.
    """
    prompts, responses = theirs.prompts, theirs.responses
    sequences = [p + r for p, r in zip(prompts, responses, strict=True)]
    logprobs = product.cast.actor.token_logprobs(sequences, [len(p) for p in prompts])
    scores = [row.tolist() for row in logprobs]
    rollout = Rollout(
        prompts=prompts,
        tokens=responses,
        logprobs=scores,
        entropies=[[0.0] * len(r) for r in responses],
        finish_reasons=["length"] * len(responses),
        kept_mass=[[1.0] * len(r) for r in responses],
        thresholds=[[-math.inf] * len(r) for r in responses],
        kept_logprobs=scores,
    )
    scored = product.scorer(rollout, [PromptExample(p, "", {}) for p in prompts])
    experience = scored.experience
    assert experience.values is not None
    assert experience.returns is not None
    squared = (experience.values - experience.returns)[experience.mask] ** 2
    ours = {
        "objective/scores": statistics.fmean(scored.raw.total),
        "objective/entropy": -sum(float(row.sum()) for row in logprobs) / len(logprobs),
        "loss/value_avg": 0.5 * float(squared.mean()),
    }
    assert ours == pytest.approx({name: theirs.metrics[name] for name in ours}, rel=1e-3, abs=1e-4)


@needs_grpo
def bench_grpo(benchmark: Any, tmp_path: Path) -> None:
    """4 prompts of 32 tokens, 4 answers of 32 to each, group-relative advantages, a reference."""
    from trl import __version__

    from benchmarks.peers.trl_grpo import TrlGRPO

    model, n, new_tokens = smollm2(), 4, 32
    tokenizer = load_tokenizer(model)
    prompts = word_prompts(tokenizer, [32] * 4)
    config = ppo_config(
        prompts=4,
        new_tokens=new_tokens,
        learning_rate=LEARNING_RATE,
        samples_per_prompt=n,
        advantage="grpo",
    )
    rewards = (f"{vowel_reward.__file__}:vowels",)
    product = Product(model, tmp_path / "ours", config, rewards=rewards, eos_ends=False)
    texts = tokenizer.batch_decode(prompts)
    peer = TrlGRPO(
        model, texts, n, new_tokens, LEARNING_RATE, vowel_reward.vowels, tmp_path / "trl"
    )

    def mine() -> Outcome:
        iteration: Iteration = product(prompts)
        return Outcome(int(iteration.rollout.lengths.sum()), iteration.seconds)

    def theirs() -> Outcome:
        seconds, tokens = peer()
        return Outcome(tokens, seconds)

    mine(), theirs()  # warm
    flops = group_flops(Cost.of(model), [32] * 4, [new_tokens] * 4 * n, n)
    info = iteration_info("GRPO, 4 prompts x 4 samples", flops, 4 * n)
    try:
        contest(benchmark, mine, {f"TRL {__version__}": theirs}, rounds=ROUNDS, info=info)
    finally:
        product.close()
