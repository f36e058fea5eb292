"""How responses are sampled."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hybrid_engine.errors import UserError

_MIN_TEMPERATURE = 1e-6  # below it, logits / temperature overflows (csrc/sampling/sampling.h)


@dataclass(frozen=True)
class SamplingParams:
    """The distribution that responses are drawn from, and where they end.

    Attributes:
        n: samples of each prompt; the prompt is computed once for all of them.
        max_new_tokens: longest response. The model's context may end it sooner.
        temperature: divides the logits. 0 takes the most likely token, whose log-probability is
            then reported at temperature 1.
        top_k: only the k most likely tokens are drawn; 0 means all.
        top_p: only the smallest set of most likely tokens with this mass is drawn; 1 means all. A
            rollout has log-probabilities of both, the whole vocabulary and the tokens kept.
        seed: a token's random number belongs to (seed, sample id, place in the response).
        ignore_eos: end-of-sequence tokens do not end a response; `stop_token_ids` still do.
        stop_token_ids: further tokens that end a response. The token that ends it is kept.
    """

    n: int = 1
    max_new_tokens: int = 64
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        _require(self.n >= 1, "n", self.n, "at least 1")
        _require(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "at least 1")
        usable = self.temperature == 0 or _MIN_TEMPERATURE <= self.temperature < math.inf
        _require(
            usable, "temperature", self.temperature, f"0 (greedy) or at least {_MIN_TEMPERATURE}"
        )
        _require(self.top_k >= 0, "top_k", self.top_k, "0 (all tokens) or more")
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "in (0, 1]")
        _require(0 <= self.seed < 2**63, "seed", self.seed, "in [0, 2**63)")
        for token in self.stop_token_ids:
            _require(token >= 0, "stop_token_ids", token, "token ids, 0 or more")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def truncated(self) -> bool:
        """Whether top-k or top-p may leave tokens out."""
        return self.top_k > 0 or self.top_p < 1

    @property
    def scoring_temperature(self) -> float:
        """The temperature at which the log-probabilities of the samples are reported."""
        return self.temperature or 1.0


def _require(ok: bool, name: str, value: object, expected: str) -> None:
    if not ok:
        raise UserError(f"SamplingParams.{name} is {value}; it must be {expected}")
