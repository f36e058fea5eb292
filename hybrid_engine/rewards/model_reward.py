"""A reward model of one's own, from a Hugging Face sequence-classification directory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from hybrid_engine.errors import UserError
from hybrid_engine.rewards.sample import Sample, checked_scores

TOKENS_PER_PASS = 4096


class ModelReward:
    """Scores prompt + answer at the last token: the model's end token, if the answer finished.

    The model reads text with its own tokenizer, which need not be the policy's. Raises UserError
    for a directory without a trained score head.
    """

    def __init__(self, directory: Path, device: str = "cpu") -> None:
        from hybrid_engine.models import (
            load_scalar_model,
            load_tokenizer,
        )  # slow to import, and not always needed

        check_has_score(
            directory,
            f"reward {str(directory)!r}",
            "give the directory of a reward model, such as OUTPUT/reward",
        )
        self.name = directory.resolve().name
        self._source = repr(str(directory))
        self._device = device
        self._model = load_scalar_model(directory, dtype=torch.float32).eval().to(device)
        self._tokenizer = load_tokenizer(directory)

    @torch.no_grad()
    def __call__(self, samples: Sequence[Sample]) -> list[float | None]:
        from hybrid_engine.models import last_rows, pack

        scores: list[float] = []
        for group in within_budget([self._tokens(sample) for sample in samples], TOKENS_PER_PASS):
            batch = pack(group).to(self._device)
            scores += self._model(batch, last_rows(batch)).float().tolist()
        return checked_scores(scores, samples, self._source)

    def _tokens(self, sample: Sample) -> list[int]:
        tokenizer = self._tokenizer
        # A rendered chat template starts with BOS already.
        has_bos = bool(tokenizer.bos_token) and sample.prompt.startswith(tokenizer.bos_token)
        text = sample.prompt + sample.answer
        tokens = tokenizer(text, add_special_tokens=not has_bos, verbose=False)["input_ids"]
        end = tokenizer.eos_token_id
        if end is not None and sample.finished and tokens[-1:] != [end]:
            tokens = [*tokens, end]
        if not tokens:
            raise UserError(
                f"reward {self._source} was given an empty text; give prompts, or let answers "
                "have a token"
            )
        return tokens


def check_has_score(directory: Path, subject: str, advice: str) -> None:
    """Refuses a directory whose scores would be those of a new, random head.

    Raises:
        UserError: `subject` (who names the directory), what is there, and `advice`.
    """
    from hybrid_engine.models.adapter_files import AdapterFile
    from hybrid_engine.models.checkpoint_files import (
        CONFIG,
        architectures,
        has_score_head,
        is_adapter,
    )

    if is_adapter(directory):
        if not AdapterFile.read(directory).classifier:
            raise UserError(f"{subject} is a language model's adapter, without a score; {advice}")
        return
    if not (directory / CONFIG).is_file():
        raise UserError(f"{subject}: no {CONFIG} in this directory; {advice}")
    if not has_score_head(directory):
        kind = ", ".join(architectures(directory)) or "model of unknown kind"
        raise UserError(f"{subject} is a {kind} without a score head; {advice}")


def within_budget(sequences: list[list[int]], budget: int) -> Iterator[list[list[int]]]:
    """Consecutive groups of at most ``budget`` tokens together, or of one longer sequence."""
    group: list[list[int]] = []
    size = 0
    for sequence in sequences:
        if group and size + len(sequence) > budget:
            yield group
            group, size = [], 0
        group.append(sequence)
        size += len(sequence)
    if group:
        yield group
