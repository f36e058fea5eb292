"""One row of logits to a token, and tokens back to log-probabilities, by the same arithmetic.

Sampling and scoring share the row function of ``csrc/sampling``: equal logits give equal bits,
whatever else is in the batch and however many threads run.

On CUDA the logits may be float16 or bfloat16. Targets and rows are not checked there, since looking
at them would wait for the device: a bad row gives token -1 and NaN, a bad target NaN.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from hybrid_kernels.ops._dispatch import register, use_native
from hybrid_kernels.reference import sampling as reference


def token_logprobs(
    logits: Tensor, targets: Tensor, temperature: float = 1.0, thresholds: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and entropy of ``softmax(logits / temperature)``.

    With ``thresholds`` both are of the distribution that truncated sampling draws from: over the
    logits of a row that are at least its threshold, renormalised. The threshold that :func:`sample`
    reported gives its ``kept_logprob`` back, bit for bit, from equal logits. A target whose logit
    has fallen below lowers the threshold to itself. The gradient flows through the kept logits
    alone.

    Args:
        logits: ``[N, V]`` float32; ``-inf`` marks an impossible token.
        targets: ``[N]`` int64 in [0, V).
        temperature: finite, at least 1e-6.
        thresholds: ``[N]`` float32, -inf for the whole vocabulary; None stands for that.

    Returns:
        ``(logprob, entropy)``, each ``[N]`` float32, in nats. Blocks of 64 exponentials are summed
        in float32, the blocks in float64, and the log-probability is rounded once. Rows with NaN or
        +inf give NaN. The backward keeps the logits, not their softmax.

    Raises:
        ValueError: wrong shapes or dtypes, a target outside the vocabulary, a bad temperature, a
            threshold that is NaN.
    """
    if not use_native("token_logprobs", logits):
        return reference.token_logprobs(logits, targets, temperature, thresholds)
    logprob, entropy, _, _ = torch.ops.hybrid_kernels.token_logprobs(
        logits, targets, temperature, thresholds
    )
    return logprob, entropy


class Sample(NamedTuple):
    """What :func:`sample` drew, one entry a row."""

    token: Tensor  # [N] int64
    logprob: Tensor  # [N] float32, over the whole vocabulary at the temperature, before truncation
    entropy: Tensor  # [N] float32, of the same distribution
    kept_mass: Tensor  # [N] float32, probability of the set that top-k and top-p kept
    threshold: Tensor  # [N] float32, least logit kept: the kept set is {logit >= threshold}
    kept_logprob: Tensor  # [N] float32, over the kept set: what the token was drawn with


def sample(
    logits: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    sample_ids: Tensor,
    positions: Tensor,
) -> Sample:
    """Draws one token a row, exactly, as the winner of a race of exponential clocks.

    The order is temperature, top-k, then top-p on what top-k left, renormalised. Both keep every
    logit at or above a threshold, so a tie at the threshold is kept whole. The clocks' uniforms are
    keyed by (seed, sample id, position): a sample's randomness depends on neither its batch nor its
    rank. They belong to the tokens of the vocabulary, so the same key gives the same token under
    distributions that differ little.

    Args:
        logits: ``[N, V]`` float32; ``-inf`` marks an impossible token.
        temperature: at least 1e-6; or 0 for the argmax (lowest index on ties), which ignores
            ``top_k`` and ``top_p`` and reports its log-probability at temperature 1.
        top_k: 0 keeps all.
        top_p: in (0, 1]; the smallest set of most likely tokens with at least this mass. 1 keeps
            all.
        seed: 64 bits.
        sample_ids: ``[N]`` int64, global numbers of the samples.
        positions: ``[N]`` int64, place of the new token in its sample; below 2^32.

    Raises:
        ValueError: wrong shapes, dtypes or parameters; a row that holds NaN or +inf, or nothing but
            -inf.
    """
    if not use_native("sample", logits):
        return Sample(
            *reference.sample(logits, temperature, top_k, top_p, seed, sample_ids, positions)
        )
    return Sample(
        *torch.ops.hybrid_kernels.sample(
            logits, temperature, top_k, top_p, seed, sample_ids, positions
        )
    )


def _score_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, targets, temperature, _ = inputs
    _, entropy, lse, threshold = output
    ctx.mark_non_differentiable(lse, threshold)
    ctx.save_for_backward(logits, targets, entropy, lse, threshold)
    ctx.temperature = temperature


def _score_backward(
    ctx: Any, grad_logprob: Tensor, grad_entropy: Tensor, *_: Tensor
) -> tuple[Tensor | None, ...]:
    grad = torch.ops.hybrid_kernels.token_logprobs_backward(
        grad_logprob, grad_entropy, *ctx.saved_tensors, ctx.temperature
    )
    return grad, None, None, None


def _row(logits: Tensor) -> Tensor:
    return logits.new_empty(logits.shape[:1], dtype=torch.float32)


register(
    "token_logprobs",
    lambda logits, targets, temperature, thresholds: (
        _row(logits),
        _row(logits),
        _row(logits).double(),
        _row(logits),
    ),
    setup_context=_score_setup,
    backward=_score_backward,
    half_on_cuda=True,
)
register(
    "token_logprobs_backward",
    lambda grad_logprob, grad_entropy, logits, *_: torch.empty_like(
        logits, memory_format=torch.contiguous_format
    ),
)
register(
    "sample",
    lambda logits, temperature, top_k, top_p, seed, sample_ids, positions: (
        sample_ids.new_empty(logits.shape[:1]),
        *(_row(logits) for _ in range(5)),
    ),
    half_on_cuda=True,
)
