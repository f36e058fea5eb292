"""Runs of the command line on a tiny model, and what they leave behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import hybrid_engine
import hybrid_kernels
from hybrid_engine import train_rlhf

MEASURED = ("seconds_", "tokens_per_second_", "gigabytes_")  # of the machine, not of the run
# A byte-level model ends an answer once in 260 tokens; with a quarter of all bytes as end tokens,
# answers have all lengths.
STOP_TOKENS = ",".join(map(str, range(0, 256, 4)))
SETTINGS = {
    "data.max_length": 64,
    "data.max_prompt_tokens": 32,
    "data.heldout_fraction": 0.2,
    "sft.epochs": 0,
    "sft.max_steps": 3,
    "sft.batch_size": 8,
    "sft.save_steps": 2,
    "sft.optimizer.learning_rate": 1e-3,
    "reward.epochs": 0,
    "reward.max_steps": 3,
    "reward.batch_size": 8,
    "reward.save_steps": 2,
    "reward.optimizer.learning_rate": 1e-3,
    "rlhf.iterations": 3,
    "rlhf.prompts_per_iteration": 8,
    "rlhf.epochs": 1,
    "rlhf.minibatches": 2,
    "rlhf.max_tokens_per_pass": 128,
    "rlhf.save_steps": 2,
    "rlhf.eval_prompts": 8,
    "rlhf.generation.max_new_tokens": 12,
    "rlhf.generation.stop_token_ids": STOP_TOKENS,
    "rlhf.actor_optimizer.learning_rate": 1e-3,
    "rlhf.critic_optimizer.learning_rate": 1e-3,
}


@dataclass(frozen=True)
class Trainer:
    """``train_rlhf`` with everything but the output directory settled."""

    model: Path
    data: Path
    settings: Mapping[str, Any] = field(default_factory=lambda: SETTINGS)

    def having(self, settings: Mapping[str, Any]) -> Trainer:
        return Trainer(self.model, self.data, {**self.settings, **settings})

    def arguments(self, output: Path, *flags: str) -> list[str]:
        named = [
            "--actor-model",
            str(self.model),
            "--data-path",
            str(self.data),
            "--output-dir",
            str(output),
        ]
        settings = [part for k, v in self.settings.items() for part in (f"--{k}", str(v))]
        return [*named, *settings, *flags]

    def __call__(self, output: Path, *flags: str, expect: int = 0) -> Path:
        """Trains in this process; returns the output directory."""
        code = train_rlhf.main(self.arguments(output, *flags))
        assert code == expect
        return output

    def spawn(self, output: Path, *flags: str, through: str = "hybrid_engine.train_rlhf") -> Any:
        """Trains in a process of its own; the completed process."""
        return subprocess.run(
            [sys.executable, "-m", *through.split(), *self.arguments(output, *flags)],
            cwd=Path(__file__).resolve().parents[2],
            env=environment(),
            capture_output=True,
            text=True,
            timeout=300,
        )


def environment() -> dict[str, str]:
    """For a child that runs the very packages of this process, with as many threads."""
    packages = [Path(p.__file__).parents[1] for p in (hybrid_engine, hybrid_kernels)]
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return {
        **kept,
        "PYTHONPATH": os.pathsep.join([*map(str, packages), kept.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }


def metrics(output: Path, stage: str = "") -> list[dict[str, Any]]:
    """The reproducible part of metrics.jsonl, of one stage or of all."""
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [
        {key: value for key, value in line.items() if not key.startswith(MEASURED)}
        for line in lines
        if stage in ("", line["stage"])
    ]


def summary(output: Path) -> dict[str, dict[str, Any]]:
    """The reproducible part of summary.json."""
    content = json.loads((output / "summary.json").read_text())
    return {
        stage: {
            k: v
            for k, v in values.items()
            if k not in ("seconds", "phase_seconds", "phase_gigabytes")
        }
        for stage, values in content.items()
    }


def files(output: Path) -> dict[str, bytes]:
    """Every file of the models in `output`, with what the run says of its answers."""
    found = [p for p in output.rglob("*") if p.is_file() and "checkpoints" not in p.parts]
    place = str(output.resolve()).encode()  # adapters name their base by its whole path
    return {
        str(p.relative_to(output)): p.read_bytes().replace(place, b"OUTPUT")
        for p in found
        if p.parent != output  # metrics and logs have the time in them
    }


def column(lines: list[dict[str, Any]], key: str) -> list[Any]:
    return [line[key] for line in lines]


EXACT = ("stage", "iteration", "response_length", "eos_rate", "tokens", "epochs")


def check_close(one: Path, other: Path, tolerance: float = 1e-3) -> None:
    """All metrics of two runs within `tolerance` (relative above 1), what counts samples equal."""
    ours, theirs = metrics(one), metrics(other)
    assert len(ours) == len(theirs) > 0
    for line, wanted in zip(ours, theirs, strict=True):
        assert line.keys() == wanted.keys()
        for key, value in wanted.items():
            if key in EXACT:
                assert line[key] == value, key
            else:
                assert abs(line[key] - value) < tolerance * max(1.0, abs(value)), key
