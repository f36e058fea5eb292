"""What a rollout becomes once it is scored: the data of a policy update."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from hybrid_engine.rl.padding import length_mask


@dataclass(frozen=True)
class Experience:
    """B scored responses. Tensors are float32 [B, T] with zeros past each row's length.

    Index t of a row is the response's token t: its log-probs, the value of the state *before* it,
    the reward it earned. EOS is a token like any other; a row's last token is its EOS or its cut.
    `old_logprobs` are of the distributions that the tokens were drawn from: with truncated sampling
    those over the logits from `thresholds` up, which are None without it.
    `values` and `returns` are None for methods without a critic. `trunks` holds what the frozen
    bottom of the network made of each row's prompt and response, [len(prompt) + len(response), h],
    where there is one.
    """

    prompts: list[list[int]]
    tokens: list[list[int]]
    lengths: Tensor  # int64 [B]
    old_logprobs: Tensor
    ref_logprobs: Tensor
    rewards: Tensor
    advantages: Tensor
    values: Tensor | None = None
    returns: Tensor | None = None
    thresholds: Tensor | None = None
    trunks: list[Tensor] | None = None

    def __post_init__(self) -> None:
        shape = self.old_logprobs.shape
        assert len(shape) == 2, "old_logprobs must be [B, T]"
        assert len(self.prompts) == len(self.tokens) == shape[0], "B differs"
        assert self.lengths.tolist() == [len(row) for row in self.tokens], (
            "lengths differ from tokens"
        )
        assert len(self) == 0 or int(self.lengths.max()) <= shape[1], (
            "T is below the longest response"
        )
        for name, tensor in self._padded().items():
            assert tensor.shape == shape, (
                f"{name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}"
            )

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def mask(self) -> Tensor:
        """Bool [B, T]: the sampled tokens, EOS included."""
        return length_mask(self.lengths, self.old_logprobs.shape[1])

    @property
    def sequences(self) -> list[list[int]]:
        """Prompt and response of each row, end to end."""
        return [prompt + tokens for prompt, tokens in zip(self.prompts, self.tokens, strict=True)]

    @property
    def prompt_lengths(self) -> list[int]:
        return [len(prompt) for prompt in self.prompts]

    @property
    def flat_thresholds(self) -> Tensor | None:
        """One a sampled token, row after row; None without truncation."""
        return None if self.thresholds is None else self.thresholds[self.mask]

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum())

    def select(self, indices: Sequence[int]) -> Experience:
        """The given rows, in the given order, cut to the longest of them."""
        rows = torch.tensor(list(indices), dtype=torch.int64)
        lengths = self.lengths[rows]
        width = int(lengths.max()) if len(rows) else 0
        return replace(
            self,
            prompts=[self.prompts[i] for i in indices],
            tokens=[self.tokens[i] for i in indices],
            lengths=lengths,
            trunks=None if self.trunks is None else [self.trunks[i] for i in indices],
            **{name: tensor[rows, :width] for name, tensor in self._padded().items()},
        )

    def minibatches(
        self, count: int, seed: int, places: Sequence[int] | None = None, total: int = 0
    ) -> Iterator[Experience]:
        """`count` disjoint parts, drawn with a seed; sizes differ by one at most. Within a part
        rows keep their order, so that answers to one prompt stay neighbours.

        Where ranks share a rollout of `total` responses, `places` are the numbers of this rank's
        rows in it. The whole is then parted, and this rank yields its share of each part: a
        minibatch consists of the same responses whatever the number of ranks, though a rank may
        have more of one part than of another.
        """
        places = range(len(self)) if places is None else places
        total = total or len(self)
        row_at = {place: row for row, place in enumerate(places)}
        order = torch.randperm(total, generator=torch.Generator().manual_seed(seed)).tolist()
        for part in range(count):
            own = sorted(order[part * total // count : (part + 1) * total // count])
            yield self.select([row_at[place] for place in own if place in row_at])

    def _padded(self) -> dict[str, Tensor]:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {n: v for n, v in values.items() if isinstance(v, Tensor) and v.dim() == 2}
