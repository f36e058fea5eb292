"""Step 2, the reward model: score preferred answers above rejected ones (Bradley-Terry)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hybrid_engine.config import RewardConfig
from hybrid_engine.data import Batches, PairExample
from hybrid_engine.distributed.collectives import all_gather_json, all_reduce_sums
from hybrid_engine.engine.passes import passes
from hybrid_engine.engine.train_engine import TrainEngine
from hybrid_engine.run import Run
from hybrid_engine.stages.loop import StageLoop, local_share

STAGE = "reward"


def train_reward(run: Run) -> None:
    """Trains a scalar head on the fine-tuned policy with step 2's pairs and writes
    OUTPUT/reward.
    """
    config = run.config.reward
    source = run.reward_source()
    run.reporter.note(f"{STAGE}: starts from {source}")
    tokenizer = run.tokenizer(source)
    data = run.load_data(STAGE, source, tokenizer)
    batches = Batches(
        len(data.train), config.batch_size, run.config.seed, config.epochs, config.max_steps
    )
    engine = run.train_engine(
        run.load_scalar(source, run.config.model.reward_trainable_layers, dropout=True),
        config.optimizer,
        len(batches),
        "reward model",
    )
    loop = StageLoop(run, STAGE, batches, config.save_steps, {"reward": engine})

    def measure() -> dict[str, float]:
        with run.phase("evaluate"):
            return {
                f"heldout_{name}": value
                for name, value in evaluate(engine, data.heldout, config).items()
            }

    with run.reporter.stage(STAGE, loop.total, loop.start, loop.spent):
        for step, indices in loop:
            with run.phase("train"):
                values = train_step(engine, [data.train[i] for i in local_share(indices)], config)
            if loop.due(config.eval_steps, step):
                values |= measure()
            run.reporter.log(STAGE, step, values)
        after = measure()
        run.save_start(engine, run.output / "reward", tokenizer)
    run.finish(
        STAGE,
        {
            **after,
            "heldout_pairs": len(data.heldout),
            "pairs": len(data.train),
            "steps": loop.total,
        },
    )


def pair_loss(chosen: Tensor, rejected: Tensor, margin: Tensor, centering: float) -> Tensor:
    """Sum over pairs of -log sigmoid(chosen - rejected - margin) + centering * (chosen +
    rejected)^2.

    Margin: Touvron et al., 2023 (arXiv:2307.09288), 3.2.2; centering: Eisenstein et al., 2023
        (arXiv:2312.09244).
    Scores and margin are [P]; a scalar comes back.
    """
    ranking = -F.logsigmoid(chosen - rejected - margin)
    return (ranking + centering * (chosen + rejected) ** 2).sum()


def train_step(
    engine: TrainEngine, examples: Sequence[PairExample], config: RewardConfig
) -> dict[str, float]:
    """One optimizer step on this rank's share of a batch; the loss is the mean over the pairs of
    the whole batch.
    """
    sequences = interleave(examples)
    sums = all_reduce_sums({"pairs": len(examples), "tokens": sum(map(len, sequences))})
    engine.module.train()
    partial = {"loss": 0.0, "correct": 0.0, "gap": 0.0}
    prompts = prompt_lengths(examples)
    for part in passes(sequences, prompts, config.max_tokens_per_pass, group=2):
        chosen, rejected = engine(part.batch, part.last).float().view(-1, 2).unbind(1)
        margins = [config.margin + examples[i // 2].margin for i in part.samples[::2]]
        loss = pair_loss(chosen, rejected, torch.tensor(margins), config.centering)
        engine.backward(loss, max(sums["pairs"], 1))
        partial["loss"] += float(loss.detach())
        partial["correct"] += float((chosen > rejected).sum())
        partial["gap"] += float((chosen - rejected).detach().sum())
    lr = engine.lr
    grad_norm = engine.step()
    totals = all_reduce_sums(partial)
    pairs = max(sums["pairs"], 1)
    return {
        "loss": totals["loss"] / pairs,
        "accuracy": totals["correct"] / pairs,
        "margin": totals["gap"] / pairs,
        "grad_norm": grad_norm,
        "lr": lr,
        "tokens": sums["tokens"],
    }


def interleave(examples: Sequence[PairExample]) -> list[list[int]]:
    return [tokens for e in examples for tokens in (e.chosen, e.rejected)]


def prompt_lengths(examples: Sequence[PairExample]) -> list[int]:
    """Of the interleaved sequences."""
    return [e.prompt_length for e in examples for _ in range(2)]


@torch.no_grad()
def evaluate(
    engine: TrainEngine, examples: Sequence[PairExample], config: RewardConfig
) -> dict[str, float]:
    """What a user must know before trusting a reward model, on held-out pairs.

    Accuracy, mean margin, the scores' distribution, and their correlation with length: a reward
    model that has learned "longer is better" shows it there, before PPO does.
    """
    mine = [examples[i] for i in local_share(range(len(examples)))]
    sequences, prompts = interleave(mine), prompt_lengths(mine)
    engine.module.eval()
    local: list[float] = []
    for part in passes(sequences, prompts, config.max_tokens_per_pass, group=2):
        local.extend(engine(part.batch, part.last).float().tolist())
    scores = torch.tensor([s for rank in all_gather_json(local) for s in rank], dtype=torch.float64)
    lengths = torch.tensor(
        [n for rank in all_gather_json([len(t) for t in sequences]) for n in rank]
    ).double()
    return describe_scores(scores, lengths)


def describe_scores(scores: Tensor, lengths: Tensor) -> dict[str, float]:
    """Summary of interleaved (chosen, rejected) scores [2P] and the lengths [2P] of the texts
    scored; nan where there is no pair.
    """
    chosen, rejected = scores.view(-1, 2).unbind(1)
    std, low, median, high = [math.nan] * 4  # torch warns or fails where there is no score
    if len(scores):
        std = float(scores.std())
        shares = torch.tensor([0.05, 0.5, 0.95], dtype=scores.dtype)
        low, median, high = torch.quantile(scores, shares).tolist()
    return {
        "accuracy": float((chosen > rejected).double().mean()),
        "margin": float((chosen - rejected).mean()),
        "score_mean": float(scores.mean()),
        "score_std": std,
        "score_p05": low,
        "score_median": median,
        "score_p95": high,
        "length_correlation": correlation(scores, lengths),
    }


def correlation(x: Tensor, y: Tensor) -> float:
    """Pearson's r of two vectors; zero where one of them is constant."""
    x, y = x - x.mean(), y - y.mean()
    scale = float(x.norm() * y.norm())
    return float(x @ y) / scale if scale > 0 else 0.0
