"""What one call of generate() brings back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

FinishReason = Literal["stop", "length"]
# What a rollout holds one value of for every token.
TOKEN_COLUMNS = ("tokens", "logprobs", "entropies", "kept_mass", "thresholds", "kept_logprobs")


@dataclass
class Rollout:
    """Responses of P prompts, n to each: sample i of the B = P * n belongs to prompt i // n.

    Attributes:
        prompts: P token lists.
        tokens: B responses, the token that ended one ("stop") included. Never empty.
        logprobs: of each response token, in nats, over the whole vocabulary at the sampling
            temperature (at 1 when greedy).
        entropies: of the same distribution.
        finish_reasons: "stop" at an end token, "length" at the limit.
        kept_mass: probability of the set that top-k and top-p left; 1 without them.
        thresholds: the least logit of that set, which is every logit at or above it; -inf without
            them.
        kept_logprobs: over the set, of the distribution that the token was drawn from. The training
            forward gives the same bits from the threshold. Equal to `logprobs` without truncation.
        n: samples of each prompt.
        counters: work done: tokens and seconds of prefill, decode and sampling, KV blocks.
    """

    prompts: list[list[int]]
    tokens: list[list[int]]
    logprobs: list[list[float]]
    entropies: list[list[float]]
    finish_reasons: list[FinishReason]
    kept_mass: list[list[float]]
    thresholds: list[list[float]]
    kept_logprobs: list[list[float]]
    n: int = 1
    counters: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        samples = len(self.prompts) * self.n
        for name in (*TOKEN_COLUMNS, "finish_reasons"):
            if len(getattr(self, name)) != samples:
                got = len(getattr(self, name))
                raise ValueError(f"Rollout.{name} has {got} entries; expected {samples}")

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def lengths(self) -> Tensor:
        """Response lengths, int64 ``[B]``."""
        return torch.tensor([len(tokens) for tokens in self.tokens], dtype=torch.int64)

    @property
    def prompt_lengths(self) -> list[int]:
        """Prompt length of each of the B samples."""
        return [len(prompt) for prompt in self.prompts for _ in range(self.n)]

    @property
    def sequences(self) -> list[list[int]]:
        """Prompt and response of each of the B samples, end to end."""
        return [self.prompts[i // self.n] + tokens for i, tokens in enumerate(self.tokens)]

    def mask(self) -> Tensor:
        """True on response tokens, bool ``[B, T]`` with T the longest response."""
        lengths = self.lengths
        longest = int(lengths.max()) if len(lengths) else 0
        return torch.arange(longest)[None, :] < lengths[:, None]

    def padded_logprobs(self) -> Tensor:
        """fp32 ``[B, T]``, zero beyond each response."""
        return self._padded(self.logprobs)

    def padded_kept_logprobs(self) -> Tensor:
        """fp32 ``[B, T]``, zero beyond each response."""
        return self._padded(self.kept_logprobs)

    def padded_thresholds(self) -> Tensor:
        """fp32 ``[B, T]``, zero beyond each response."""
        return self._padded(self.thresholds)

    def _padded(self, values: list[list[float]]) -> Tensor:
        mask = self.mask()
        flat = torch.tensor([value for row in values for value in row], dtype=torch.float32)
        return torch.zeros(mask.shape).masked_scatter_(mask, flat)
