"""Step 1, supervised fine-tuning: maximise the likelihood of answers given prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from hybrid_engine.data import Batches, SFTExample
from hybrid_engine.distributed.collectives import all_reduce_sums
from hybrid_engine.engine.passes import span_passes
from hybrid_engine.engine.train_engine import TrainEngine
from hybrid_engine.run import Run
from hybrid_engine.stages.loop import StageLoop, local_share

STAGE = "sft"
LARGEST_LOG = 700.0  # the exponential of more is no float


def train_sft(run: Run) -> None:
    """Fine-tunes the actor on the answers of step 1's rows and writes OUTPUT/sft."""
    config = run.config.sft
    source = run.policy_source(STAGE)
    tokenizer = run.tokenizer(source)
    data = run.load_data(STAGE, source, tokenizer)
    batches = Batches(
        len(data.train), config.batch_size, run.config.seed, config.epochs, config.max_steps
    )
    engine = run.train_engine(
        run.load_policy(source, dropout=True), config.optimizer, len(batches), "policy"
    )
    loop = StageLoop(run, STAGE, batches, config.save_steps, {"policy": engine})

    def measure() -> dict[str, float]:
        with run.phase("evaluate"):
            return evaluate(engine, data.heldout, config.max_tokens_per_pass)

    with run.reporter.stage(STAGE, loop.total, loop.start, loop.spent):
        before = loop.remember(measure)
        for step, indices in loop:
            with run.phase("train"):
                values = train_step(
                    engine,
                    [data.train[i] for i in local_share(indices)],
                    config.max_tokens_per_pass,
                )
            if loop.due(config.eval_steps, step):
                values |= {f"heldout_{name}": value for name, value in measure().items()}
            run.reporter.log(STAGE, step, values)
        after = measure()
        run.save_start(engine, run.output / "sft", tokenizer)
    run.finish(
        STAGE,
        {
            **{f"heldout_{name}_before": value for name, value in before.items()},
            **{f"heldout_{name}_after": value for name, value in after.items()},
            "heldout_rows": len(data.heldout),
            "rows": len(data.train),
            "steps": loop.total,
        },
    )


def train_step(
    engine: TrainEngine, examples: Sequence[SFTExample], max_tokens: int
) -> dict[str, float]:
    """One optimizer step on this rank's share of a batch.

    The loss is the sum of -log p over the assistant's tokens, divided by their number in the whole
    batch over all ranks: a mean of per-pass means would weigh short answers more (see
    huggingface/trl#2175).
    """
    tokens, spans = [e.tokens for e in examples], [e.spans for e in examples]
    targets = sum(e.num_targets for e in examples)
    sums = all_reduce_sums({"targets": targets, "tokens": sum(map(len, tokens))})
    engine.module.train()
    loss = 0.0
    for part in span_passes(tokens, spans, max_tokens):
        nll = -engine(part.batch, part.rows, part.targets).logprobs.sum()
        engine.backward(nll, max(sums["targets"], 1))
        loss += float(nll.detach())
    lr = engine.lr
    grad_norm = engine.step()
    loss = all_reduce_sums({"loss": loss})["loss"]
    return {
        "loss": loss / max(sums["targets"], 1),
        "grad_norm": grad_norm,
        "lr": lr,
        "tokens": sums["tokens"],
    }


@torch.no_grad()
def evaluate(
    engine: TrainEngine, examples: Sequence[SFTExample], max_tokens: int
) -> dict[str, float]:
    """Mean negative log-likelihood of an answer token on held-out rows, in nats, and its
    exponential; nan where no row is held out.
    """
    share = [examples[i] for i in local_share(range(len(examples)))]
    tokens, spans = [e.tokens for e in share], [e.spans for e in share]
    engine.module.eval()
    sums = {"nll": 0.0, "targets": 0.0}
    for part in span_passes(tokens, spans, max_tokens):
        logprobs = engine(part.batch, part.rows, part.targets).logprobs
        sums["nll"] -= float(logprobs.double().sum())
        sums["targets"] += len(part.targets)
    sums = all_reduce_sums(sums)
    loss = sums["nll"] / sums["targets"] if sums["targets"] else math.nan
    return {"loss": loss, "perplexity": math.inf if loss > LARGEST_LOG else math.exp(loss)}
