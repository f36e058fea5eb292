"""One call of generate(), checked: what every generator is given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hybrid_engine.engine.sampling import SamplingParams
from hybrid_engine.errors import UserError

OnProgress = Callable[[int, int, int], None]  # finished samples, all samples, tokens so far
OnToken = Callable[[int, int], None]  # sample, token


@dataclass(frozen=True)
class Request:
    """Sample i, of prompt i // params.n, has the random stream ``sample_ids[i]``."""

    prompts: list[list[int]]
    params: SamplingParams
    stop_tokens: list[int]
    sample_ids: list[int]
    max_batch: int = 64
    kv_bytes: int = 0  # 0: as much as max_batch sequences can use
    expected_lengths: Sequence[float] = ()  # one a prompt, or none
    max_new_tokens: Sequence[int] = ()  # one a prompt, or none: limits below that of params
    drafts: Sequence[Sequence[int]] = ()  # one a sample, or none: tokens to try
    on_progress: OnProgress | None = None
    on_token: OnToken | None = None

    def __post_init__(self) -> None:
        samples = len(self.prompts) * self.params.n
        _check_count("expected_lengths", self.expected_lengths, len(self.prompts), "prompt")
        _check_count("max_new_tokens", self.max_new_tokens, len(self.prompts), "prompt")
        _check_count("drafts", self.drafts, samples, "sample")
        if low := [limit for limit in self.max_new_tokens if limit < 1]:
            raise UserError(f"max_new_tokens has {low[0]}; a response needs at least one token")

    def response_limit(self, sample: int) -> int:
        """Longest response of a sample, apart from what the context leaves."""
        limit = self.params.max_new_tokens
        if self.max_new_tokens:
            limit = min(limit, self.max_new_tokens[sample // self.params.n])
        return limit

    @property
    def rows(self) -> list[list[int]]:
        """The prompt of every sample."""
        return [prompt for prompt in self.prompts for _ in range(self.params.n)]


def _check_count(name: str, values: Sequence[object], expected: int, what: str) -> None:
    if len(values) not in (0, expected):
        raise UserError(
            f"{name} has {len(values)} entries; give one a {what} ({expected}), or none"
        )


def check_prompts(prompts: list[list[int]], vocab_size: int, context: float) -> None:
    """Raises UserError for a prompt that cannot be served, naming its index."""
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(f"prompt {i} is empty; a response needs at least one token before it")
        if len(prompt) >= context:
            raise UserError(
                f"prompt {i} has {len(prompt)} tokens, which leaves no room for a response in "
                f"the model's context of {context}; shorten it"
            )
        if bad := [token for token in prompt if not 0 <= token < vocab_size]:
            raise UserError(
                f"prompt {i} has token id {bad[0]}, outside the model's vocabulary of "
                f"{vocab_size}; was it encoded with another tokenizer?"
            )
