"""A tiny model, preference rows, and the trainer over them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.stages.runs import Trainer
from tests.tiny import make_tiny_model


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """A tiny model is slower on several threads, and much slower on busy cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def preferences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of (prompt, chosen, rejected), which serve all three steps, of many lengths."""
    path = tmp_path_factory.mktemp("data") / "preferences.jsonl"
    rows = [
        {
            "prompt": f"{'film ' * (i % 3 + 1)}{i} is",
            "chosen": " " + "good " * (i % 4 + 1),
            "rejected": " " + "bad " * ((i + 2) % 4 + 1),
            "topic": i,
        }
        for i in range(80)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def trainer(tiny_model: Path, preferences: Path) -> Trainer:
    return Trainer(tiny_model, preferences)


@pytest.fixture(scope="session")
def trained(trainer: Trainer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of all three steps in one run. Only to be read."""
    return trainer(tmp_path_factory.mktemp("runs") / "trained")


@pytest.fixture(scope="session")
def prepared(trainer: Trainer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of steps 1 and 2. Only to be copied."""
    return trainer(tmp_path_factory.mktemp("runs") / "prepared", "--steps", "1", "2")
