"""Responses as they come in, some passes after they were drawn."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hybrid_engine.engine.request import Request
from hybrid_engine.engine.rollout import TOKEN_COLUMNS

from .draws import Drawn


@dataclass
class Response:
    """Every draw of a sample. Those behind the first ``length`` came before the host knew that the
    response had ended.
    """

    drawn: list[Drawn] = field(default_factory=list)
    length: int = 0
    reason: str = ""


class Responses:
    """Of all samples of a request.

    Args:
        limits: longest response of each prompt.
    """

    def __init__(self, request: Request, limits: list[int]) -> None:
        self._request, self._limits = request, limits
        self._all = [Response() for _ in request.rows]
        self.tokens = self.done = self.draft_accepted = 0
        # (tokens taken in, all of them the draft's) of each sample in the last `take`.
        self.taken: dict[int, tuple[int, bool]] = {}

    def __len__(self) -> int:
        return len(self._all)

    def token(self, sample: int, position: int) -> int:
        """What is fed at a place of a response: what was drawn there, else what the draft has."""
        drawn = self._all[sample].drawn
        return drawn[position].token if position < len(drawn) else self._drafted(sample, position)

    def latest(self, sample: int) -> int:
        """The last token that is here."""
        return self._all[sample].drawn[-1].token

    def ended(self, sample: int, draws: int) -> bool:
        """Whether a sample is known to have ended, or has with its first ``draws`` draws."""
        return bool(self._all[sample].reason) or draws == self._limit(sample)

    def take(self, draws: list[Drawn]) -> None:
        """The draws of one pass. Of a draft's rows, up to the first token that is not the draft's:
        the rows behind it saw another sequence than the response has become.
        """
        self.taken = {}
        for drawn in draws:
            count, on_draft = self.taken.get(drawn.sample, (0, True))
            response = self._all[drawn.sample]
            if count and not (on_draft and not response.reason):
                continue
            self._append(response, drawn)
            on_draft = self._drafted(drawn.sample, drawn.position) == drawn.token
            self.draft_accepted += on_draft
            self.taken[drawn.sample] = count + 1, on_draft

    def columns(self) -> dict[str, Any]:
        """One list a sample, and why each ended."""
        ended = [response.drawn[: response.length] for response in self._all]
        columns: dict[str, Any] = {
            name: [[drawn.values[i] for drawn in response] for response in ended]
            for i, name in enumerate(TOKEN_COLUMNS)
        }
        return {**columns, "finish_reasons": [response.reason for response in self._all]}

    def _append(self, response: Response, drawn: Drawn) -> None:
        if drawn.token < 0:
            raise ValueError(
                f"generate: the logits for token {drawn.position} of sample {drawn.sample} are no "
                "distribution (NaN or infinite): the weights have diverged"
            )
        response.drawn.append(drawn)
        if response.reason:
            return
        response.length += 1
        self.tokens += 1
        if self._request.on_token is not None:
            self._request.on_token(drawn.sample, drawn.token)
        if drawn.stops or response.length == self._limit(drawn.sample):
            response.reason = "stop" if drawn.stops else "length"
            self.done += 1

    def _limit(self, sample: int) -> int:
        return self._limits[sample // self._request.params.n]

    def _drafted(self, sample: int, position: int) -> int:
        if not self._request.drafts:
            return -1
        draft = self._request.drafts[sample]
        return draft[position] if position < len(draft) else -1
