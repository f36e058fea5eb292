"""Heads on the decoder: next-token scores, and one scalar a row (reward, value)."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from hybrid_kernels import ops
from hybrid_kernels.nn import Linear

from .checkpoint_files import Base, Source
from .decoder import Decoder
from .packing import PackedBatch
from .spec import DecoderSpec
from .trunk import Trunk

if TYPE_CHECKING:
    from .lora import Adapter


class TokenScores(NamedTuple):
    """Of N scored tokens, both fp32 ``[N]``, in nats, after division by the temperature."""

    logprobs: Tensor
    entropies: Tensor


class LMHead(nn.Module):
    """Vocabulary projection without bias. It may own the embedding's parameter (tied).

    Scoring and logits both run inside ``forward``, where ZeRO-3 has the weight gathered.
    """

    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__()
        self.weight: Tensor = nn.Parameter(torch.empty(vocab_size, width))

    def forward(
        self,
        hidden: Tensor,
        targets: Tensor | None = None,
        temperature: float = 1.0,
        thresholds: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """(logprobs, entropies) of ``targets [N]``; without targets (logits ``[N, V]``,)."""
        if targets is None:
            return (ops.linear(hidden, self.weight),)
        return ops.linear_token_logprobs(hidden, self.weight, targets, temperature, thresholds)


class NativeModel(nn.Module):
    """A decoder that has a head: what the causal and the scalar model share."""

    native = True  # the C++ program knows this decoder

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.spec = spec
        self.decoder = Decoder(spec)
        self.source: Source | None = None  # set by the loader, read by save_model
        self.adapter: Adapter | None = None  # set where low-rank factors are added
        self.base: Base | None = None  # what they were added to, if it was loaded for that

    @property
    def device(self) -> torch.device:
        """Where its parameters are. Arguments may come from elsewhere, and results go back."""
        return next(self.parameters()).device

    @property
    def gradient_checkpointing(self) -> bool:
        """Recompute each trainable block's activations in the backward pass."""
        return self.decoder.gradient_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, on: bool) -> None:
        self.decoder.gradient_checkpointing = on


class CausalLM(NativeModel):
    """A language model over packed batches. Its adapters alone may have dropout."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__(spec)
        self.head = LMHead(spec.vocab_size, spec.embed_dim)
        self.tie_head()

    def tie_head(self) -> None:
        """Make the head's parameter the embedding's own, where the spec says so."""
        if self.spec.tied_head:
            self.head.weight = self.decoder.embed_tokens.weight

    def forward(
        self,
        batch: PackedBatch,
        rows: Tensor,
        targets: Tensor,
        temperature: float = 1.0,
        trunk: Trunk | None = None,
        thresholds: Tensor | None = None,
    ) -> TokenScores:
        """Score ``targets [N]`` as the tokens that follow packed rows ``rows [N]``.

        With ``thresholds [N]`` the scores are over the logits that reach them: the distribution
        that truncated sampling drew from. Full logits never exist.
        """
        device, home = self.device, rows.device
        hidden = self.decoder(batch.to(device), trunk, rows.to(device))
        thresholds = None if thresholds is None else thresholds.to(device)
        scores = self.head(hidden, targets.to(device), temperature, thresholds)
        return TokenScores(*(values.to(home) for values in scores))

    def logits(self, batch: PackedBatch) -> Tensor:
        """Next-token logits of every row ``[T, V]``: for tests and chat, not for training."""
        (logits,) = self.head(self.decoder(batch.to(self.device)))
        return logits


class ScalarModel(NativeModel):
    """A number for any row: a reward at the last token, or a value at every token.

    Saved, it is ``AutoModelForSequenceClassification`` with one label.
    """

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__(spec)
        self.score = Linear(spec.embed_dim, 1, bias=False)

    def forward(self, batch: PackedBatch, rows: Tensor, trunk: Trunk | None = None) -> Tensor:
        """Scores of packed rows ``rows [N]`` -> ``[N]``."""
        device = self.device
        hidden = self.decoder(batch.to(device), trunk, rows.to(device))
        return self.score(hidden).squeeze(-1).to(rows.device)
