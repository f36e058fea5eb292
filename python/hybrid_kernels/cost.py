"""What each GPU kernel must move and compute, and how fast a GPU could do that at best.

``python -m hybrid_kernels.cost`` prints, for one layer of a model like Llama-3-8B in bfloat16, the
time that each kernel's bytes take at a GPU's datasheet bandwidth, or its products at the datasheet
rate, whichever is longer. That is a **bound**: no kernel can be faster, and nothing here was
measured on a GPU.

The formulas are those of the kernels' own heads and of ``docs/kernels.md``; a test holds them to
both, and to the bytes of the tensors and the products that an operator really has.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

Sizes = Mapping[str, float]


@dataclass(frozen=True)
class Cost:
    """Formulas of a kernel, as its documentation has them: juxtaposition multiplies.

    Attributes:
        moved: bytes from and to device memory, in `sizes`, of which ``s`` is bytes an element.
        times: what ``moved`` and ``products`` are for each of ("1" where they are for all).
        products: floating-point operations of matrix products; "" where memory is the bound.
        launches: kernels started by one call.
    """

    moved: str
    times: str = "1"
    products: str = ""
    launches: int = 1

    def bytes(self, sizes: Sizes) -> float:
        return evaluate(self.moved, sizes) * evaluate(self.times, sizes)

    def flops(self, sizes: Sizes) -> float:
        return evaluate(self.products or "0", sizes) * evaluate(self.times, sizes)


COSTS: Mapping[str, Cost] = {
    "rms_norm": Cost("2 n s"),
    "add_rms_norm": Cost("4 n s"),
    "rms_norm_backward": Cost("3 n s + n/8", launches=2),
    "layer_norm": Cost("2 n s"),
    "add_layer_norm": Cost("4 n s"),
    "layer_norm_backward": Cost("3 n s + n/4", launches=2),
    "bias_activation": Cost("2 n s"),
    "bias_activation_backward": Cost("3 n s", launches=2),
    "gated_activation": Cost("3 n s"),
    "gated_activation_backward": Cost("5 n s"),
    "lora_merge": Cost("2 n s"),
    "linear": Cost("N K s", products="2 N K M"),
    "linear_activation": Cost("N K s", products="2 N K M"),
    # keys: those that a row attends to, on average
    "attention": Cost("2 (H + KH) D s", times="T", products="4 D H keys"),
    "attention_backward": Cost("4 (H + KH) D s", times="T", products="14 D H keys", launches=3),
    "paged_attention": Cost("2 D s", times="keys KH", products="4 D H/KH", launches=2),
    "rope": Cost("2 n s", launches=2),
    "kv_append": Cost("2 n s"),
    "rope_append": Cost("2 n s"),
    "token_logprobs": Cost("V s", times="M"),
    "token_logprobs_backward": Cost("2 V s", times="M"),
    "sample": Cost("V s", times="M"),
    "linear_token_logprobs": Cost("(M K + V K) s", products="2 M V K", launches=2),
    "linear_sample": Cost("(M K + V K) s", products="2 M V K", launches=2),
    "gae": Cost("16 n"),
    "masked_whiten": Cost("9 n"),
    "ppo_policy_loss": Cost("17 n", launches=2),
    "ppo_value_loss": Cost("17 n", launches=2),
    "triton linear": Cost("(M K + N K + M N) s", products="2 M N K"),
}


def evaluate(formula: str, sizes: Sizes) -> float:
    """A formula's value: numbers, names of sizes, ``+``, ``/``, parentheses.

    Raises:
        KeyError: a name that is no size.
    """
    tokens = re.findall(r"[A-Za-z]+|\d+|[()+/]", formula)
    product: list[str] = []
    for before, token in zip(["", *tokens], tokens):
        if before and before not in "(+/" and token not in ")+/":
            product.append("*")
        product.append(repr(float(sizes[token])) if token.isalpha() else token)
    return float(eval("".join(product), {"__builtins__": {}}))  # numbers and operators only


@dataclass(frozen=True)
class Gpu:
    """Datasheet figures: GB/s of memory, TFLOP/s of dense bfloat16 products with float32 sums."""

    name: str
    bandwidth: float
    products: float

    def bound(self, cost: Cost, sizes: Sizes) -> float:
        """Seconds that no kernel can beat."""
        memory = cost.bytes(sizes) / (self.bandwidth * 1e9)
        return max(memory, cost.flops(sizes) / (self.products * 1e12))


# NVIDIA's datasheets of the SXM modules (A100 80GB, H100, H200), without sparsity.
GPUS = (Gpu("A100", 2039, 312), Gpu("H100", 3350, 989.4), Gpu("H200", 4800, 989.4))

# Llama-3-8B: width 4096, 32 heads over 8, feed-forward 14336; bfloat16.
_MODEL = {"s": 2, "K": 4096, "D": 128, "H": 32, "KH": 8, "V": 128256}
_DECODE = {**_MODEL, "M": 64, "keys": 64 * 2048}  # 64 sequences of 2,048 tokens
_TRAIN = {**_MODEL, "M": 8192, "keys": 8192}

CASES: tuple[tuple[str, str, Sizes], ...] = (
    ("decode 64 x 2048", "add_rms_norm", {**_DECODE, "n": 64 * 4096}),
    ("decode 16, gate|up", "linear_activation", {**_DECODE, "M": 16, "N": 2 * 14336}),
    ("decode 64, gate|up", "triton linear", {**_DECODE, "N": 2 * 14336}),
    ("decode 64 x 2048", "rope_append", {**_DECODE, "n": 64 * 48 * 128}),
    ("decode 64 x 2048", "paged_attention", _DECODE),
    ("decode 64 x 2048", "gated_activation", {**_DECODE, "n": 64 * 14336}),
    ("decode 64 x 2048", "linear_sample", _DECODE),
    ("decode 64 x 2048", "sample", _DECODE),
    ("train 8192", "add_rms_norm", {**_TRAIN, "n": 8192 * 4096}),
    ("train 8192", "rms_norm_backward", {**_TRAIN, "n": 8192 * 4096}),
    ("train 8 x 1024", "attention", {**_TRAIN, "T": 8192, "keys": 512.5}),
    ("train 8 x 1024", "attention_backward", {**_TRAIN, "T": 8192, "keys": 512.5}),
    ("train 8192, gate|up", "triton linear", {**_TRAIN, "N": 2 * 14336}),
    ("train 8192", "gated_activation", {**_TRAIN, "n": 8192 * 14336}),
    ("train 8192", "gated_activation_backward", {**_TRAIN, "n": 8192 * 14336}),
    ("train 8192", "token_logprobs_backward", {**_TRAIN, "M": 256}),
    ("gate|up", "lora_merge", {**_TRAIN, "n": 2 * 14336 * 4096}),
    ("512 x 1024", "gae", {"n": 512 * 1024}),
    ("512 x 1024", "masked_whiten", {"n": 512 * 1024}),
    ("512 x 1024", "ppo_policy_loss", {"n": 512 * 1024}),
    ("512 x 1024", "ppo_value_loss", {"n": 512 * 1024}),
)


def table() -> str:
    lines = [
        "Bounds by datasheet, in microseconds: no kernel can be faster; nothing was measured.",
        f"{'kernel':30} {'case':20} {'MB':>9} {'GFLOP':>9} {'launches':>8}"
        + "".join(f"{gpu.name + ' >=':>11}" for gpu in GPUS),
    ]
    for case, name, sizes in CASES:
        cost = COSTS[name]
        moved, flops = cost.bytes(sizes) / 1e6, cost.flops(sizes) / 1e9
        bounds = "".join(f"{gpu.bound(cost, sizes) * 1e6:>11.2f}" for gpu in GPUS)
        lines.append(f"{name:30} {case:20} {moved:>9.2f} {flops:>9.2f} {cost.launches:>8}{bounds}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
