"""Gradients and loss curves do not depend on micro-batch, world size or ZeRO stage."""

import pytest
import torch
from torch import nn

from hybrid_engine.config import OptimizerConfig
from hybrid_engine.distributed.collectives import is_main, rank, world_size
from tests.distributed.ranks import results_of

STAGES = (0, 1, 2, 3)
MICRO_BATCHES = (1, 2, 4)
ROWS = 8
HERE = "tests.distributed.test_gradients"


class Scorer(nn.Module):
    """Ragged rows of tokens to one score each, with a frozen part and parameters of odd sizes."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.embed = nn.Embedding(13, 5)
        self.frozen = nn.Linear(5, 5)
        self.hidden = nn.Linear(5, 7)
        self.head = nn.Linear(7, 1, bias=False)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        self.frozen.requires_grad_(False)

    def forward(self, rows: list[torch.Tensor]) -> torch.Tensor:
        tokens = torch.cat(rows) if rows else torch.zeros(0, dtype=torch.int64)
        return self.head(torch.tanh(self.hidden(self.frozen(self.embed(tokens))))).squeeze(-1)


def data() -> tuple[list[torch.Tensor], int]:
    """8 rows of 1 to 9 tokens: a mean of micro-batch means would weigh them wrongly."""
    generator = torch.Generator().manual_seed(1)
    lengths = [9, 1, 3, 7, 2, 2, 8, 1]
    rows = [torch.randint(13, (n,), generator=generator) for n in lengths]
    return rows, sum(lengths)


def loss_sum(scores: torch.Tensor) -> torch.Tensor:
    return (scores - 0.3).square().sum()


def accumulate(engine, micro_batch: int) -> None:
    """This rank's rows, `micro_batch` at a time; ranks with fewer rows add empty passes."""
    rows, tokens = data()
    mine = (
        rows[:5] if world_size() == 2 and rank() == 0 else rows[5:] if world_size() == 2 else rows
    )
    passes = -(-5 // micro_batch) if world_size() == 2 else -(-ROWS // micro_batch)
    for part in range(passes):
        engine.backward(
            loss_sum(engine(mine[part * micro_batch : (part + 1) * micro_batch])), tokens
        )


def first_gradient(stage: int, micro_batch: int) -> dict[str, list[float]]:
    """The accumulated gradient, as the change that one step of a linearised Adam makes.

    The first AdamW step is lr g / (|g| + eps): with lr = eps = 1e8 it is g to 1e-8.
    """
    from hybrid_engine.engine.train_engine import TrainEngine

    config = OptimizerConfig(
        learning_rate=1e8, eps=1e8, max_grad_norm=0.0, schedule="constant", warmup_ratio=0
    )
    engine = TrainEngine(Scorer(), config, 1, {"zero_optimization": {"stage": stage}})
    before = Scorer().state_dict()
    accumulate(engine, micro_batch)
    found = {"norm": [engine.step()]}
    for name, after in engine.gathered_state_dict().items():
        found[name] = (before[name] - after).flatten().tolist()
    return found


def gradients(directory):
    return {f"{s}/{m}": first_gradient(s, m) for s in STAGES for m in MICRO_BATCHES}


def exact_gradient() -> dict[str, torch.Tensor]:
    """Plain autograd in fp64 over the whole batch at once."""
    module = Scorer().double()
    rows, tokens = data()
    (loss_sum(module(rows)) / tokens).backward()
    return {name: p.grad.flatten() for name, p in module.named_parameters() if p.requires_grad}


def check(found: dict[str, dict[str, list[float]]]) -> None:
    exact = exact_gradient()
    norm = torch.cat(list(exact.values())).norm()
    for case, gradient in found.items():
        assert not any(gradient["frozen.weight"])
        assert gradient["norm"][0] == pytest.approx(norm.item(), rel=1e-5), case
        for name, expected in exact.items():
            error = (torch.tensor(gradient[name], dtype=torch.float64) - expected).norm()
            assert error <= 1e-5 * expected.norm(), f"{name} of stage/micro-batch {case}"


def test_one_process_any_micro_batch_and_stage():
    check(gradients(None))


@pytest.mark.multi_process
def test_two_ranks_any_micro_batch_and_stage(tmp_path):
    first, second = results_of(f"{HERE}:gradients", 2, tmp_path)
    check(first)
    for case, gradient in second.items():
        assert gradient == {"norm": first[case]["norm"]}  # the weights go to rank 0 alone


def loss_curve(stage: int, model: str, steps: int = 6) -> list[float]:
    """Mean token loss of a tiny language model over steps on fixed sequences."""
    from hybrid_engine.distributed.collectives import all_reduce_sums
    from hybrid_engine.engine.passes import passes
    from hybrid_engine.engine.train_engine import TrainEngine
    from hybrid_engine.models import load_causal_lm

    generator = torch.Generator().manual_seed(2)
    lengths = (12, 5, 9, 3)
    sequences = [torch.randint(250, (n,), generator=generator).tolist() for n in lengths]
    config = OptimizerConfig(learning_rate=5e-3)
    engine = TrainEngine(
        load_causal_lm(model), config, steps, {"zero_optimization": {"stage": stage}}
    )
    mine = sequences[rank() :: world_size()]
    targets = sum(lengths) - len(lengths)
    curve = []
    for _ in range(steps):
        total = 0.0
        for part in passes(mine, [1] * len(mine), max_tokens=10):
            nll = -engine(part.batch, part.rows, part.targets).logprobs.sum()
            engine.backward(nll, targets)
            total += float(nll.detach())
        engine.step()
        curve.append(all_reduce_sums({"nll": total})["nll"] / targets)
    return curve


def loss_curves(directory):
    from pathlib import Path

    model = str(Path(directory, "model"))
    curves = {str(stage): loss_curve(stage, model) for stage in (2, 3)}
    return curves if is_main() else None


@pytest.mark.multi_process
def test_loss_curves_of_two_ranks_equal_one(tmp_path):
    from tests.tiny import make_tiny_model

    model = make_tiny_model(tmp_path / "model")
    alone = loss_curve(0, str(model))
    curves, _ = results_of(f"{HERE}:loss_curves", 2, tmp_path)
    assert alone[-1] < 0.7 * alone[0]
    for stage, curve in curves.items():
        assert curve == pytest.approx(alone, abs=1e-3), f"ZeRO-{stage}"
