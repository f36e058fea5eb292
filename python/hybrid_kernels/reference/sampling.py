"""Scoring and sampling in plain torch: what the kernels are held to, usable in float64."""

from __future__ import annotations

import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF


def token_logprobs(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and entropy of ``softmax(logits / temperature)``.

    Args:
        logits: [N, V]; ``-inf`` marks an impossible token.
        targets: [N] int64.
        temperature: > 0, rounded to float32 as the kernels take it.

    Returns:
        ``(logprob [N], entropy [N] in nats)`` in the dtype of ``logits``. Differentiable by
        autograd.
    """
    log_p = (logits / as_float32(temperature)).log_softmax(-1)
    logprob = log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    entropy = -(log_p.exp() * log_p.masked_fill(log_p == float("-inf"), 0.0)).sum(-1)
    return logprob, entropy


def as_float32(x: float) -> float:
    """``x`` rounded to float32."""
    return float(torch.tensor(x, dtype=torch.float32))


def kept_threshold(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Least logit that top-k, then top-p on the renormalised top-k distribution, keep: [N].

    Every logit equal to the threshold is kept, so ties may keep more than ``top_k`` tokens.
    ``-inf`` without truncation.
    """
    rows, vocab = logits.shape
    threshold = logits.new_full((rows,), float("-inf"))
    if 0 < top_k < vocab:
        threshold = logits.topk(top_k, dim=-1).values[:, -1]
    if top_p < 1:
        kept = logits.masked_fill(logits < threshold.unsqueeze(-1), float("-inf"))
        ordered = kept.sort(dim=-1, descending=True, stable=True).values
        mass = (ordered / temperature).softmax(-1).cumsum(-1)
        enough = (mass < top_p).sum(-1, keepdim=True).clamp(max=vocab - 1)
        threshold = ordered.gather(-1, enough).squeeze(-1)
    return threshold


def sample(
    logits: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    sample_ids: Tensor,
    positions: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Inverse-transform draw from each row's truncated distribution, one Philox uniform a row.

    Same arguments and results as :func:`hybrid_kernels.ops.sampling.sample`, as a plain tuple. The
    cumulative sum runs in float64 in vocabulary order.
    """
    greedy = temperature == 0
    scale = 1.0 if greedy else as_float32(temperature)
    truncation = (0, 1.0) if greedy else (top_k, as_float32(top_p))
    wide = logits.double()
    threshold = kept_threshold(wide, scale, *truncation)
    weight = (wide / scale).softmax(-1)
    weight = weight.masked_fill(wide < threshold.unsqueeze(-1), 0.0)
    cumulative = weight.cumsum(-1)
    if greedy:
        token = logits.argmax(-1)
    else:
        uniform = philox_uniform(seed, sample_ids, positions).to(cumulative.device)
        aim = uniform.unsqueeze(-1) * cumulative[:, -1:]
        token = torch.searchsorted(cumulative, aim, right=True).squeeze(-1)
    logprob, entropy = token_logprobs(logits, token, scale)
    kept_mass = cumulative[:, -1].to(logits.dtype)
    return token, logprob, entropy, kept_mass, threshold.to(logits.dtype)


def philox(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    """Philox4x32-10 of a 128-bit counter and a 64-bit key, 32-bit words (Salmon et al., 2011)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (
            (product1 >> 32) ^ c1 ^ k0,
            product1 & _MASK32,
            (product0 >> 32) ^ c3 ^ k1,
            product0 & _MASK32,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _MASK32, (k1 + 0xBB67AE85) & _MASK32
    return c0, c1, c2, c3


def philox_uniform(seed: int, sample_ids: Tensor, positions: Tensor) -> Tensor:
    """One uniform in (0, 1) with 52 random bits for each (sample, position): [N] float64.

    Counter words are (position, 0, sample low, sample high); the key is the seed, low word first.
    """
    key = (seed & _MASK32, (seed >> 32) & _MASK32)
    uniforms = []
    for sample, position in zip(sample_ids.tolist(), positions.tolist(), strict=True):
        words = philox((position & _MASK32, 0, sample & _MASK32, (sample >> 32) & _MASK32), key)
        uniforms.append((((words[0] << 32 | words[1]) >> 12) + 0.5) * 2.0**-52)
    return torch.tensor(uniforms, dtype=torch.float64)
