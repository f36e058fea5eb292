"""ZeRO-3 on two CPU ranks: a tied head, recomputed blocks and adapters train as on one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hybrid_engine.distributed.exit import end_process
from hybrid_engine.models import (
    CausalLM,
    LoRAConfig,
    PackedBatch,
    load_causal_lm,
    pack,
    response_rows,
    save_adapter,
    save_model,
)

from .peers import grouped, save_causal

pytestmark = [pytest.mark.multi_process, pytest.mark.slow]

STEPS, RATE = 3, 0.1
LORA = {"llama-tied": None, "gpt2": LoRAConfig(r=2)}


def batch_loss(model, batch: PackedBatch) -> torch.Tensor:
    rows, targets = response_rows(batch, [1] * batch.num_sequences)
    return -model(batch, rows, targets).logprobs.mean()


def make(layout: str, directory: Path) -> CausalLM:
    model = load_causal_lm(directory, lora=LORA[layout])
    model.gradient_checkpointing = True
    return model


def one_rank(model: CausalLM, batch: PackedBatch) -> list[float]:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = batch_loss(model, batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def rank_of_two(layout: str, directory: Path) -> None:
    import deepspeed

    deepspeed.init_distributed("gloo")
    model = make(layout, directory)
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "optimizer": {"type": "SGD", "params": {"lr": RATE}},
        "zero_allow_untested_optimizer": True,
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    engine = deepspeed.initialize(model=model, model_parameters=trained, config=settings)[0]
    batch, losses = pack(*grouped()), []
    for _ in range(STEPS):
        loss = batch_loss(engine, batch)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    save_model(model, directory / "trained")
    if model.adapter is not None:
        save_adapter(model, directory / "adapter")
    if torch.distributed.get_rank() == 0:
        (directory / "losses.json").write_text(json.dumps(losses))
    torch.distributed.barrier()


def run_two_ranks(layout: str, directory: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    root = Path(__file__).parents[2]
    common = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(root), str(root / "python"), *sys.path]),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": "2",
        "LOCAL_SIZE": "2",
    }
    command = [sys.executable, "-m", "tests.models.test_zero3", layout, str(directory)]
    ranks = [
        subprocess.Popen(
            command,
            cwd=root,
            env={**common, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in ("0", "1")
    ]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    for process, output in zip(ranks, outputs, strict=True):
        assert process.returncode == 0, output[-4000:]


@pytest.mark.parametrize("layout", LORA)
def test_two_ranks_equal_one(layout: str, tmp_path: Path) -> None:
    save_causal(layout, tmp_path)
    run_two_ranks(layout, tmp_path)
    model, batch = make(layout, tmp_path), pack(*grouped())
    losses = one_rank(model, batch)
    assert losses[-1] < losses[0] - 0.1
    # both ranks have the same batch, so the averaged gradient is one rank's
    assert json.loads((tmp_path / "losses.json").read_text()) == pytest.approx(losses, abs=1e-5)
    with torch.no_grad():
        gathered = load_causal_lm(tmp_path / "trained").logits(batch)
        torch.testing.assert_close(gathered, model.logits(batch), rtol=0, atol=1e-4)
        if model.adapter is not None:
            unmerged = load_causal_lm(tmp_path / "adapter").logits(batch)
            torch.testing.assert_close(unmerged, gathered, rtol=0, atol=1e-5)


if __name__ == "__main__":
    rank_of_two(sys.argv[1], Path(sys.argv[2]))
    end_process(0)
