"""What one call of generate() brings back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

FinishReason = Literal["stop", "length"]


@dataclass
class Rollout:
    """Responses of P prompts, n to each: sample i of the B = P * n belongs to prompt i // n.

    Attributes:
        prompts: P token lists.
        tokens: B responses, the token that ended one ("stop") included. Never empty.
        logprobs: of each response token, in nats, over the whole vocabulary at the sampling
            temperature (at 1 when greedy).
        entropies: of the distribution that each token was drawn from, before truncation.
        finish_reasons: "stop" at an end token, "length" at the limit.
        kept_mass: probability of the set that top-k and top-p left; 1 without them.
        n: samples of each prompt.
        counters: work done: tokens and seconds of prefill, decode and sampling, KV blocks.
    """

    prompts: list[list[int]]
    tokens: list[list[int]]
    logprobs: list[list[float]]
    entropies: list[list[float]]
    finish_reasons: list[FinishReason]
    kept_mass: list[list[float]]
    n: int = 1
    counters: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        samples = len(self.prompts) * self.n
        for name in ("tokens", "logprobs", "entropies", "finish_reasons", "kept_mass"):
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

    @property
    def truncated_fraction(self) -> float:
        """Share of responses that were cut at the limit; 0 for an empty rollout."""
        return self.finish_reasons.count("length") / len(self) if len(self) else 0.0

    def mask(self) -> Tensor:
        """True on response tokens, bool ``[B, T]`` with T the longest response."""
        lengths = self.lengths
        longest = int(lengths.max()) if len(lengths) else 0
        return torch.arange(longest)[None, :] < lengths[:, None]

    def padded_logprobs(self) -> Tensor:
        """fp32 ``[B, T]``, zero beyond each response."""
        return self._padded(self.logprobs)

    def padded_entropies(self) -> Tensor:
        """fp32 ``[B, T]``, zero beyond each response."""
        return self._padded(self.entropies)

    def padded_tokens(self, pad_id: int) -> Tensor:
        """int64 ``[B, T]``, ``pad_id`` beyond each response."""
        out = torch.full(self.mask().shape, pad_id, dtype=torch.int64)
        return out.masked_scatter_(self.mask(), torch.tensor(_flat(self.tokens), dtype=torch.int64))

    def samples_of(self, prompt: int) -> range:
        """Indices of a prompt's samples."""
        return range(prompt * self.n, (prompt + 1) * self.n)

    def select(self, prompts: Sequence[int]) -> Rollout:
        """The part of some prompts, in the order given. The counters stay with the whole."""
        samples = [i for prompt in prompts for i in self.samples_of(prompt)]
        return Rollout(
            prompts=[self.prompts[p] for p in prompts],
            tokens=[self.tokens[i] for i in samples],
            logprobs=[self.logprobs[i] for i in samples],
            entropies=[self.entropies[i] for i in samples],
            finish_reasons=[self.finish_reasons[i] for i in samples],
            kept_mass=[self.kept_mass[i] for i in samples],
            n=self.n,
        )

    def _padded(self, values: list[list[float]]) -> Tensor:
        mask = self.mask()
        return torch.zeros(mask.shape).masked_scatter_(mask, torch.tensor(_flat(values)))


def _flat(rows: list[list[int]] | list[list[float]]) -> list[int] | list[float]:
    return [value for row in rows for value in row]
