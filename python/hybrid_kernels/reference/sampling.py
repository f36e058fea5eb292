"""Scoring and sampling in plain torch: what the kernels are held to, usable in float64."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF
_BLOCK = 64  # tokens of one block of the vocabulary
_BLOCK_STREAM, _TOKEN_STREAM = 0, 1 << 31  # Philox streams of the clocks of blocks and of tokens


def token_logprobs(
    logits: Tensor, targets: Tensor, temperature: float, thresholds: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and entropy of ``softmax(logits / temperature)``.

    Args:
        logits: [N, V]; ``-inf`` marks an impossible token.
        targets: [N] int64.
        temperature: > 0, rounded to float32 as the kernels take it.
        thresholds: [N] or None: only logits at or above them exist, and the target's.

    Returns:
        ``(logprob [N], entropy [N] in nats)`` in the dtype of ``logits``. Differentiable by
        autograd.
    """
    if thresholds is not None:
        own = logits.detach().gather(-1, targets.unsqueeze(-1))
        logits = logits.masked_fill(logits < own.minimum(thresholds.unsqueeze(-1)), float("-inf"))
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A draw from each row's truncated distribution by two races of exponential clocks.

    Same arguments and results as :func:`hybrid_kernels.ops.sampling.sample`, as a plain tuple.
    """
    greedy = temperature == 0
    scale = 1.0 if greedy else as_float32(temperature)
    truncation = (0, 1.0) if greedy else (top_k, as_float32(top_p))
    wide = logits.double()
    threshold = kept_threshold(wide, scale, *truncation)
    weight = (wide / scale).softmax(-1)
    weight = weight.masked_fill(wide < threshold.unsqueeze(-1), 0.0)
    token = logits.argmax(-1) if greedy else _race(weight, seed, sample_ids, positions)
    logprob, entropy = token_logprobs(logits, token, scale)
    kept_mass = weight.sum(-1).to(logits.dtype)
    threshold = threshold.to(logits.dtype)
    kept_logprob, _ = token_logprobs(logits, token, scale, threshold)
    return token, logprob, entropy, kept_mass, threshold, kept_logprob


def _race(weight: Tensor, seed: int, sample_ids: Tensor, positions: Tensor) -> Tensor:
    """Token of each row, drawn with probability proportional to ``weight [N, V]``: [N].

    A clock of rate w rings at -log(u) / w. First the blocks race, then the winner's tokens.
    """
    rows, vocab = weight.shape
    blocks = -(-vocab // _BLOCK)
    padded = torch.nn.functional.pad(weight, (0, blocks * _BLOCK - vocab))
    by_block = padded.view(rows, blocks, _BLOCK)
    tokens = []
    for row, sample, position in zip(
        range(rows), sample_ids.tolist(), positions.tolist(), strict=True
    ):
        uniform = philox_uniforms(seed, sample, position, _BLOCK_STREAM, 0, blocks)
        block = _first_to_ring(by_block[row].sum(-1), uniform)
        begin = block * _BLOCK
        uniform = philox_uniforms(seed, sample, position, _TOKEN_STREAM, begin, begin + _BLOCK)
        tokens.append(begin + _first_to_ring(by_block[row, block], uniform))
    return torch.tensor(tokens, dtype=torch.int64, device=weight.device)


def _first_to_ring(rate: Tensor, uniform: Tensor) -> int:
    return int((-uniform.log().to(rate.device) / rate).argmin())


def philox(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    """Philox4x32-10 of a 128-bit counter and a 64-bit key, 32-bit words (Salmon et al., 2011)."""
    words = _philox([np.array([word], dtype=np.uint64) for word in counter], key)
    return tuple(int(word[0]) for word in words)


def _philox(counter: list[np.ndarray], key: tuple[int, int]) -> list[np.ndarray]:
    """Many counters at once: four arrays of words in uint64."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    mask, half = np.uint64(_MASK32), np.uint64(32)
    for _ in range(10):
        product0, product1 = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (
            (product1 >> half) ^ c1 ^ np.uint64(k0),
            product1 & mask,
            (product0 >> half) ^ c3 ^ np.uint64(k1),
            product0 & mask,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _MASK32, (k1 + 0xBB67AE85) & _MASK32
    return [c0, c1, c2, c3]


def philox_uniforms(
    seed: int, sample: int, position: int, stream: int, begin: int, end: int
) -> Tensor:
    """Numbers begin to end - 1 of a token's stream: float64 in (0, 1) with 52 random bits.

    Counter words are (position, stream + number // 2, sample low, sample high); the key is the
    seed, low word first. One counter gives two numbers. ``begin`` is even.
    """
    count = -(-(end - begin) // 2)
    streams = np.arange(count, dtype=np.uint64) + np.uint64(stream + begin // 2)
    fixed = (position & _MASK32, sample & _MASK32, (sample >> 32) & _MASK32)
    place, low, high = (np.full(count, word, dtype=np.uint64) for word in fixed)
    words = _philox([place, streams, low, high], (seed & _MASK32, (seed >> 32) & _MASK32))
    bits = [(words[i] << np.uint64(32) | words[i + 1]) >> np.uint64(12) for i in (0, 2)]
    pairs = np.stack(bits, axis=1).reshape(-1)[: end - begin]
    return torch.from_numpy((pairs.astype(np.float64) + 0.5) * 2.0**-52)
