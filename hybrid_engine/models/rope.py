"""Rotary frequencies and their cos/sin tables, for the training module and the C++ program."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from .spec import RopeSpec

_FIRST_TABLE = 4096  # positions; a 128k-context model should not pay 64 MiB for short prompts


def inverse_frequencies(rope: RopeSpec) -> Tensor:
    """Angle per position of every rotated pair, fp32 ``[rotary_dim / 2]``.

    default: theta^(-2i/d) (Su et al. 2021, arXiv:2104.09864); linear: divided by the factor
    (Chen et al. 2023, arXiv:2306.15595); llama3: only long wavelengths are stretched (Llama 3.1
    model card); yarn: a ramp over the dimensions (Peng et al. 2023, arXiv:2309.00071).
    """
    exponent = torch.arange(0, rope.rotary_dim, 2, dtype=torch.float32) / rope.rotary_dim
    inv_freq = 1.0 / (rope.theta**exponent)
    if rope.kind == "linear":
        return inv_freq / rope.factor
    if rope.kind == "llama3":
        return _llama3(inv_freq, rope)
    if rope.kind == "yarn":
        return _yarn(inv_freq, rope)
    return inv_freq


def _llama3(inv_freq: Tensor, rope: RopeSpec) -> Tensor:
    turns = rope.original_max_positions * inv_freq / (2 * math.pi)  # in the original context
    span = rope.high_freq_factor - rope.low_freq_factor
    keep = ((turns - rope.low_freq_factor) / span).clamp(0.0, 1.0)
    return keep * inv_freq + (1 - keep) * inv_freq / rope.factor


def _yarn(inv_freq: Tensor, rope: RopeSpec) -> Tensor:
    def dimension_turning(times: float) -> float:
        """The pair index whose wavelength fits ``times`` turns into the original context."""
        period = rope.original_max_positions / (times * 2 * math.pi)
        return rope.rotary_dim * math.log(period) / (2 * math.log(rope.theta))

    low, high = dimension_turning(rope.beta_fast), dimension_turning(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.rotary_dim - 1)
    if low == high:
        high += 0.001  # a step instead of a ramp, without dividing by zero
    pair = torch.arange(rope.rotary_dim // 2, dtype=torch.float32)
    stretch = ((pair - low) / (high - low)).clamp(0.0, 1.0)
    return inv_freq / rope.factor * stretch + inv_freq * (1 - stretch)


def yarn_attention_factor(factor: float, mscale: float = 0.0, mscale_all_dim: float = 0.0) -> float:
    """YaRN's temperature on cos and sin: 0.1 ln(s) + 1, or DeepSeek's quotient of two of them."""

    def magnitude(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    if mscale and mscale_all_dim:
        return magnitude(mscale) / magnitude(mscale_all_dim)
    return magnitude(1.0)


@lru_cache(maxsize=16)
def _table(rope: RopeSpec, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):  # a cached inference tensor could not be saved for backward
        positions = torch.arange(length, dtype=torch.float32)
        angles = positions[:, None] * inverse_frequencies(rope)
        scale = rope.attention_factor
        return (angles.cos() * scale).to(device), (angles.sin() * scale).to(device)


def rope_tables(
    rope: RopeSpec, length: int, max_positions: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """cos and sin, fp32 ``[P, rotary_dim / 2]`` with ``length <= P <= max(length, max_positions)``.

    P grows by doubling and the tables are cached, so all models of a process share one copy.
    The rows do not depend on P.
    """
    size = _FIRST_TABLE
    while size < length:
        size *= 2
    return _table(rope, max(length, min(size, max_positions)), torch.device(device))
