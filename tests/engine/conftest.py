"""Tiny seeded models with large weights: an untrained initialisation is nearly uniform."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hybrid_engine.data.demo import ensure_demo_model
from hybrid_engine.models import CausalLM, LoRAConfig, load_causal_lm
from tests.tiny import make_tiny_model

FAMILIES = ("llama", "qwen3", "opt", "gpt2")


@pytest.fixture(scope="session")
def tiny_directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tiny")
    return {family: make_tiny_model(root / family, family, seed=3) for family in FAMILIES}


def load_sharpened(directory: Path, lora: LoRAConfig | None = None) -> CausalLM:
    """The model with its matrices scaled up, and adapters that do something."""
    model = load_causal_lm(directory, lora=lora)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_b"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
            elif parameter.dim() == 2 and not name.endswith("lora_a"):
                parameter.mul_(6.0)
            elif name.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


@pytest.fixture(scope="session", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(family: str, tiny_directories: dict[str, Path]) -> CausalLM:
    return load_sharpened(tiny_directories[family])


@pytest.fixture
def llama(tiny_directories: dict[str, Path]) -> CausalLM:
    return load_sharpened(tiny_directories["llama"])


@pytest.fixture
def lora_model(family: str, tiny_directories: dict[str, Path]) -> CausalLM:
    return load_sharpened(tiny_directories[family], LoRAConfig(r=3, alpha=6.0))


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The directory named by HYBRID_ENGINE_SMOLLM2, or the demo model where it has been made."""
    named = os.environ.get("HYBRID_ENGINE_SMOLLM2")
    return Path(named) if named else Path(ensure_demo_model())
