"""Settings of the whole suite: the checkout's own code, in this process and in those it starts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
# pyproject.toml puts these on this process's path; child processes (ranks, commands) need them.
_PATHS = [str(ROOT), str(ROOT / "python"), *filter(None, [os.environ.get("PYTHONPATH")])]
os.environ["PYTHONPATH"] = os.pathsep.join(_PATHS)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same torch seed, so that none depends on its neighbours."""
    torch.manual_seed(0)
