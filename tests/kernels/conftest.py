from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def require_native(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernel tests test kernels: a missing one is a failure, not a reason to test the reference."""
    monkeypatch.setenv("HYBRID_KERNELS_REQUIRE_NATIVE", "1")


@pytest.fixture
def threads():
    """A function that sets torch's thread count; the old count returns afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
