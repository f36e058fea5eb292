"""Planned against measured peaks of whole runs, phase by phase, on models of three families whose
rows are as long as the settings allow: within 10 %.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from tests.stages.runs import Trainer, environment
from tests.tiny import make_tiny_tokenizer, tiny_config

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not Path("/proc/self/clear_refs").exists(), reason="peaks are read from Linux's /proc"
    ),
]

PROMPT, ANSWER = 224, 32  # few answers of a random model end before that
SETTINGS = {
    "data.max_length": PROMPT + ANSWER,
    "data.max_prompt_tokens": PROMPT,
    "data.heldout_fraction": 0.2,
    "sft.max_steps": 4,  # DeepSpeed first records what a pass keeps
    "sft.batch_size": 8,
    "sft.max_tokens_per_pass": 1024,
    "reward.max_steps": 2,
    "reward.batch_size": 4,
    "reward.max_tokens_per_pass": 1024,
    "rlhf.iterations": 2,
    "rlhf.prompts_per_iteration": 16,
    "rlhf.epochs": 1,
    "rlhf.minibatches": 2,
    "rlhf.max_tokens_per_pass": 1024,
    "rlhf.eval_prompts": 8,
    "rlhf.generation.max_new_tokens": ANSWER,
}
WIDTHS = {  # some 45 to 75 million parameters
    "llama": {"hidden_size": 640, "num_hidden_layers": 10, "num_attention_heads": 10,
              "num_key_value_heads": 5, "intermediate_size": 1920},
    "opt": {"hidden_size": 768, "word_embed_proj_dim": 768, "num_hidden_layers": 10,
            "num_attention_heads": 12, "ffn_dim": 3072},
    "gpt2": {"n_embd": 640, "n_layer": 12, "n_head": 10, "n_inner": 2560},
}  # fmt: skip


RANKS = {
    "alone": [],
    "two ranks, ZeRO-2": ["--num-gpus", "2", "--zero-stage", "2"],
    "two ranks, ZeRO-3": ["--num-gpus", "2", "--zero-stage", "3"],
}


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("family", WIDTHS)
def test_every_phase_takes_what_was_planned(family: str, ranks: str, tmp_path: Path) -> None:
    model = _model(tmp_path / "model", family)
    answers = _rows(tmp_path / "answers.jsonl", 3)  # a pair has its prompt once
    prompts = _rows(tmp_path / "prompts.jsonl", PROMPT)
    for rows, steps in ((answers, ["1", "2"]), (prompts, ["3"])):
        arguments = Trainer(model, rows, SETTINGS).arguments(tmp_path / "out")
        command = [sys.executable, "-m", "hybrid_engine.train_rlhf", *arguments, *RANKS[ranks]]
        subprocess.run([*command, "--steps", *steps], check=True, env=environment())
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    figures = {
        (step, phase): peaks
        for step in ("sft", "reward", "rlhf")
        for phase, peaks in summary[step]["phase_gigabytes"].items()
        if phase != "checkpoint"
    }
    print(family, ranks, *figures.items(), sep="\n")
    assert len(figures) == 2 + 2 + 5
    off = {
        where: peaks
        for where, peaks in figures.items()
        if peaks["planned"] != pytest.approx(peaks["measured"], rel=0.1)
    }
    assert not off


def _model(directory: Path, family: str) -> Path:
    tokenizer = make_tiny_tokenizer()
    config: PretrainedConfig = type(tiny_config(family, tokenizer)).from_dict(
        tiny_config(family, tokenizer).to_dict() | {"head_dim": None} | WIDTHS[family]
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def _rows(path: Path, prompt: int) -> Path:
    """Rows of PROMPT + ANSWER tokens."""
    answer = PROMPT + ANSWER - prompt
    rows = [
        {"prompt": f"{i:03}".rjust(prompt, "p"), "chosen": "c" * answer, "rejected": "r" * answer}
        for i in range(320)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path
