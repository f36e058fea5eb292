"""The cost model against what can be counted: tensors, products, and what the documents say."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from hybrid_kernels import cost, native_module, ops, reference

ROOT = Path(__file__).resolve().parents[2]
ROWS, WIDTH = 96, 1024
COSTS_OF_PRODUCTS = (
    "linear",
    "linear_activation",
    "linear_token_logprobs",
    "linear_sample",
    "triton linear",
)


class CountsBytes(TorchDispatchMode):
    """Bytes of all tensors that go into and come out of one operator of ours."""

    def __init__(self, op: str) -> None:
        super().__init__()
        self.op, self.calls, self.bytes = op, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ == self.op and "hybrid_kernels" in str(func):
            self.calls += 1
            tensors = [x for x in tree_leaves((args, result)) if isinstance(x, torch.Tensor)]
            self.bytes += sum(x.nbytes for x in tensors)
        return result


def grad(function: Callable[..., Any], *leaves: torch.Tensor) -> Callable[[], Any]:
    leaves = tuple(leaf.requires_grad_() for leaf in leaves)

    def run() -> None:
        out = function(*leaves)
        out = out if isinstance(out, torch.Tensor) else out[0]
        torch.autograd.grad(out, leaves, torch.ones_like(out))

    return run


def calls() -> dict[str, tuple[Callable[[], Any], dict[str, int]]]:
    """A call of each operator, float32, and its sizes."""
    n, s = ROWS * WIDTH, 4
    x, y, w, b = (torch.randn(*size) for size in [(ROWS, WIDTH)] * 2 + [(WIDTH,)] * 2)
    mask, lengths = torch.ones(ROWS, WIDTH, dtype=torch.bool), torch.full((ROWS,), WIDTH)
    wide = torch.randn(ROWS, 2 * WIDTH)
    targets, ids = torch.zeros(ROWS, dtype=torch.int64), torch.arange(ROWS)
    q, k = torch.randn(ROWS, 12, 64), torch.randn(ROWS, 4, 64)
    cos, sin = torch.randn(2, 8, 32)
    positions = torch.zeros(ROWS, dtype=torch.int32)
    cu_seqlens = torch.tensor([0, ROWS], dtype=torch.int32)
    heads = {"T": ROWS, "H": 12, "KH": 4, "D": 64, "s": s}
    few, weight = torch.randn(2, 512), torch.randn(1024, 512)
    e, v = {"n": n, "s": s}, {"V": WIDTH, "M": ROWS, "s": s}
    head = {"M": 2, "V": 1024, "K": 512, "s": s}
    return {
        "rms_norm": (lambda: ops.rms_norm(x, w, 1e-5), e),
        "add_rms_norm": (lambda: ops.add_rms_norm(x, y, w, 1e-5), e),
        "rms_norm_backward": (grad(lambda a, c: ops.rms_norm(a, c, 1e-5), x, w), e),
        "layer_norm": (lambda: ops.layer_norm(x, w, b, 1e-5), e),
        "add_layer_norm": (lambda: ops.add_layer_norm(x, y, w, b, 1e-5), e),
        "layer_norm_backward": (
            grad(lambda a, c, d: ops.layer_norm(a, c, d, 1e-5), x, w, b), e
        ),
        "bias_activation": (lambda: ops.bias_activation(x, b, "silu"), e),
        "bias_activation_backward": (
            grad(lambda a, c: ops.bias_activation(a, c, "silu"), x, b), e
        ),
        "gated_activation": (lambda: ops.gated_activation(wide, "silu"), e),
        "gated_activation_backward": (
            grad(lambda a: ops.gated_activation(a, "silu"), wide), e
        ),
        "lora_merge": (
            lambda: ops.lora_merge(x, torch.randn(1, WIDTH), torch.randn(ROWS, 1), 1.0, [ROWS]), e
        ),
        "linear": (lambda: ops.linear(few, weight), {"N": 1024, "K": 512, "M": 2, "s": s}),
        "linear_activation": (
            lambda: ops.linear_activation(few, weight, None, "silu", True),
            {"N": 1024, "K": 512, "M": 2, "s": s},
        ),
        "linear_token_logprobs": (
            lambda: ops.linear_token_logprobs(few, weight, targets[:2]), head
        ),
        "linear_sample": (
            lambda: ops.linear_sample(few, weight, 1.0, 0, 1.0, 0, ids[:2], ids[:2]), head
        ),
        "attention": (lambda: ops.attention(q, k, k, cu_seqlens, 1.0), heads),
        "attention_backward": (
            grad(lambda a, c, d: ops.attention(a, c, d, cu_seqlens, 1.0), q, k, k.clone()), heads
        ),
        "rope": (
            lambda: ops.rope(q, k, cos, sin, positions), {"n": q.numel() + k.numel(), "s": s}
        ),
        "token_logprobs": (lambda: ops.token_logprobs(x, targets), v),
        "token_logprobs_backward": (grad(lambda a: ops.token_logprobs(a, targets), x), v),
        "sample": (lambda: ops.sample(x, 1.0, 0, 1.0, 0, ids, ids), v),
        "gae": (lambda: ops.gae(x, y, lengths, 1.0, 0.95), {"n": n}),
        "masked_whiten": (lambda: ops.masked_whiten(x, mask, ops.masked_moments(x, mask)), e),
        "ppo_policy_loss": (lambda: ops.ppo_policy_loss(x, y, x, mask, 0.2, 0.2), e),
        "ppo_value_loss": (lambda: ops.ppo_value_loss(x, y, x, mask, 0.2), e),
    }  # fmt: skip


@pytest.mark.parametrize("name", sorted(calls()))
def test_bytes_are_those_of_the_tensors(name: str) -> None:
    """Up to vectors and statistics, which the formulas leave out: 3 % here, far less in use."""
    call, sizes = calls()[name]
    counter = CountsBytes(name)
    with counter:
        call()
    assert counter.calls == 1
    assert counter.bytes == pytest.approx(cost.COSTS[name].bytes(sizes), rel=0.03)


def test_products_are_those_of_plain_torch() -> None:
    x, weight = torch.randn(5, 32), torch.randn(48, 32)
    with FlopCounterMode(display=False) as counter:
        reference.linear(x, weight, None, None, None, 1.0, [])
    sizes = {"M": 5, "N": 48, "K": 32, "V": 48, "s": 4}
    for name in COSTS_OF_PRODUCTS:
        assert cost.COSTS[name].flops(sizes) == counter.get_total_flops(), name
    q, k, v = torch.randn(6, 1, 16), torch.randn(6, 40, 16), torch.randn(6, 40, 16)
    with FlopCounterMode(display=False) as counter:  # one query of 6 heads, 40 keys
        (q @ k.transpose(1, 2)).softmax(-1) @ v
    sizes = {"D": 16, "H": 6, "KH": 2, "keys": 40, "T": 1}
    for name in ("paged_attention", "attention"):
        assert cost.COSTS[name].flops(sizes) == counter.get_total_flops(), name


def test_the_documents_state_the_formulas() -> None:
    rows = (ROOT / "docs" / "kernels.md").read_text().splitlines()
    for name, kernel in cost.COSTS.items():
        if name.startswith("triton "):
            continue
        found = [row for row in rows if row.startswith("|") and f"`{name}`" in row]
        assert found, f"docs/kernels.md has no row for {name}"
        assert any(kernel.moved in row for row in found), f"{name}: {kernel.moved}"


def test_the_triton_kernels_head_states_the_formulas() -> None:
    folder = ROOT / "python" / "hybrid_kernels" / "triton_kernels"
    linear = (folder / "linear.py").read_text()
    assert "bytes: (M K + N K + M N) sizeof(T)" in linear
    assert "flops: 2 M N K" in linear


def test_every_cuda_operator_has_a_cost() -> None:
    assert native_module()
    registered = re.findall(
        r'm\.impl\("(\w+)"', "".join(p.read_text() for p in ROOT.glob("csrc/*/*_cuda_op.cpp"))
    )
    # In place, beside another, or what decides nothing.
    beside = {"lora_merge_", "lora_unmerge_", "masked_moments", "matmul", "unshard_"}
    missing = set(registered) - set(cost.COSTS) - beside
    assert not missing, f"hybrid_kernels/cost.py has no formula for {sorted(missing)}"


def test_the_table_is_labelled_a_bound() -> None:
    lines = cost.table().splitlines()
    assert "Bounds" in lines[0]
    assert "nothing was measured" in lines[0]
    assert len(lines) == 2 + len(cost.CASES)
    h100 = next(gpu for gpu in cost.GPUS if gpu.name == "H100")
    norm = {"n": 1e9, "s": 2}
    assert h100.bound(cost.COSTS["rms_norm"], norm) == pytest.approx(4e9 / 3350e9)
    product = {"M": 8192, "N": 8192, "K": 8192, "s": 2}
    assert h100.bound(cost.COSTS["triton linear"], product) == pytest.approx(2 * 8192**3 / 989.4e12)
