"""Which tensors a native kernel takes, on each device; CUDA's are stand-ins that hold no data."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hybrid_kernels import native_available
from hybrid_kernels.ops import _dispatch

pytestmark = pytest.mark.skipif(not native_available(), reason="there is no native library")


def on_cuda(dtype: torch.dtype) -> Any:
    return SimpleNamespace(
        device=torch.device("cuda"),
        dtype=dtype,
        is_cpu=False,
        is_cuda=True,
        is_floating_point=lambda: dtype.is_floating_point,
    )


@pytest.fixture(autouse=True)
def cuda_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretends that norms and advantages have CUDA kernels, and nothing else."""
    monkeypatch.setattr(_dispatch, "_has_cuda_kernel", lambda op: op in ("rms_norm", "gae"))
    monkeypatch.setattr(_dispatch, "_warn_once", lambda message: None)
    monkeypatch.delenv("HYBRID_KERNELS_REQUIRE_NATIVE", raising=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_half_precision_runs_where_the_kernel_knows_it(dtype: torch.dtype) -> None:
    tensors = [on_cuda(dtype), None, on_cuda(dtype)]
    assert _dispatch.use_native("rms_norm", *tensors)
    assert _dispatch.use_native("gae", *tensors, on_cuda(torch.int64)) == (dtype is torch.float32)


def test_mixed_or_unknown_dtypes_devices_and_operators_run_the_reference() -> None:
    x, half, double = on_cuda(torch.float32), on_cuda(torch.bfloat16), on_cuda(torch.float64)
    assert not _dispatch.use_native("rms_norm", half, x)
    assert not _dispatch.use_native("rms_norm", double)
    assert not _dispatch.use_native("rms_norm", x, torch.zeros(2))
    assert not _dispatch.use_native("attention", x)


def test_on_the_cpu_float32_and_integers_run() -> None:
    x = torch.zeros(2)
    assert _dispatch.use_native("attention", x, torch.zeros(2, dtype=torch.int32))
    assert not _dispatch.use_native("rms_norm", x.half())
    assert not _dispatch.use_native("rms_norm", x, torch.zeros(2, device="meta"))
