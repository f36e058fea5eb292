"""Families without a table: transformers' own module behind our interface, padded inside.

Slower and without the C++ program, LoRA or a shared trunk, but the same numbers.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hybrid_engine.errors import UserError
from hybrid_kernels import ops

from .checkpoint_files import GENERATION_CONFIG, Source, has_score_head
from .heads import TokenScores
from .packing import PackedBatch, unpack
from .tokenizers import scoring_pad_token, write_tokenizer
from .trunk import Trunk


class ForeignModel(nn.Module):
    """What the causal and the scalar wrapper share. ``hf_model`` is transformers' module."""

    native = False
    hf_model: Any

    def __init__(self, hf_model: nn.Module, directory: Path) -> None:
        super().__init__()
        self.hf_model, self.directory = hf_model.eval(), directory

    def train(self, mode: bool = True) -> ForeignModel:
        """Mark the wrapper only: transformers' module stays in evaluation, so dropout stays off."""
        self.training = mode
        return self

    @property
    def gradient_checkpointing(self) -> bool:
        """Always off: transformers recomputes only in training mode, which has dropout."""
        return False

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, on: bool) -> None:
        if on:
            raise UserError("gradient checkpointing needs a family with a native decoder")

    def padded(self, batch: PackedBatch) -> tuple[dict[str, Any], Tensor]:
        """Right-padded model inputs ``[B, L]``, and the flat index ``[T]`` of every packed row."""
        ids = nn.utils.rnn.pad_sequence(unpack(batch.input_ids, batch), batch_first=True)
        columns = torch.arange(ids.shape[1], device=ids.device)
        mask = columns[None, :] < batch.lengths[:, None]
        inputs = {"input_ids": ids, "attention_mask": mask.long(), "use_cache": False}
        return inputs, batch.at_rows(mask.flatten().nonzero().squeeze(1))

    def save(self, target: Path, tokenizer: Any | None) -> None:
        """Write a Hugging Face directory through transformers."""
        pad_id = self.hf_model.config.pad_token_id if isinstance(self, ForeignScalarModel) else None
        with quiet_transformers():
            self.hf_model.save_pretrained(target)
        write_tokenizer(target, self.directory, tokenizer, pad_id)
        generation = self.directory / GENERATION_CONFIG
        if generation.is_file():
            (target / GENERATION_CONFIG).write_bytes(generation.read_bytes())


class ForeignCausalLM(ForeignModel):
    """The interface of ``CausalLM`` over ``AutoModelForCausalLM``."""

    def forward(
        self,
        batch: PackedBatch,
        rows: Tensor,
        targets: Tensor,
        temperature: float = 1.0,
        trunk: Trunk | None = None,
        thresholds: Tensor | None = None,
    ) -> TokenScores:
        """Score ``targets [N]`` after packed rows ``rows [N]``; holds the batch's full logits."""
        _no_trunk(trunk)
        logits = self.logits(batch).index_select(0, rows).float()
        return TokenScores(*ops.token_logprobs(logits, targets, temperature, thresholds))

    def logits(self, batch: PackedBatch) -> Tensor:
        """Next-token logits of every packed row ``[T, V]``."""
        inputs, index = self.padded(batch)
        return self.hf_model(**inputs).logits.flatten(0, 1).index_select(0, index)


class ForeignScalarModel(ForeignModel):
    """The interface of ``ScalarModel`` over ``AutoModelForSequenceClassification``."""

    def forward(self, batch: PackedBatch, rows: Tensor, trunk: Trunk | None = None) -> Tensor:
        """Scores of packed rows ``rows [N]`` -> ``[N]``."""
        _no_trunk(trunk)
        inputs, index = self.padded(batch)
        hidden = self.hf_model.base_model(**inputs).last_hidden_state
        chosen = hidden.flatten(0, 1).index_select(0, index.index_select(0, rows))
        return self.hf_model.score(chosen).squeeze(-1)


def load_causal_lm(directory: Path, dtype: torch.dtype, reason: str) -> ForeignCausalLM:
    """Load through transformers, and say so once."""
    from transformers import AutoModelForCausalLM

    _warn(reason)
    return ForeignCausalLM(_load(AutoModelForCausalLM, directory, dtype), directory)


def load_scalar_model(
    directory: Path, dtype: torch.dtype, reason: str, seed: int
) -> ForeignScalarModel:
    """Load a one-label classifier through transformers; a missing ``score`` is drawn afresh."""
    from transformers import AutoModelForSequenceClassification

    from .checkpoint_io import init_score

    _warn(reason)
    torch.manual_seed(seed)
    hf_model, report = _load(
        AutoModelForSequenceClassification,
        directory,
        dtype,
        num_labels=1,
        output_loading_info=True,
    )
    if not isinstance(getattr(hf_model, "score", None), nn.Linear):
        raise UserError(f"{directory}: {type(hf_model).__name__} has no linear 'score' head")
    if "score.weight" in report["missing_keys"]:
        if has_score_head(directory):
            raise UserError(f"{directory}: the weight files lack score.weight")
        init_score(hf_model.score.weight, seed)
    source = Source.read(directory)
    hf_model.config.pad_token_id = scoring_pad_token(source.config, directory, None)
    return ForeignScalarModel(hf_model, directory)


def _load(auto_class: Any, directory: Path, dtype: torch.dtype, **options: Any) -> Any:
    try:
        with quiet_transformers():
            return auto_class.from_pretrained(
                directory, dtype=dtype, trust_remote_code=False, **options
            )
    except Exception as error:  # transformers' loaders raise many types
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{directory}: transformers cannot load it ({reason})") from error


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Neither progress bars nor reports on keys: a new head is missing from a checkpoint by
    design.
    """
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _warn(reason: str) -> None:
    """Names the family and no directory: a run that loads five models of it warns once."""
    warnings.warn(
        f"no native decoder for {reason}; running it through transformers: "
        "as correct, but slower, without LoRA, top-layer training and the C++ generator",
        stacklevel=1,  # one place for all models, so that Python, too, takes them for one warning
    )


def _no_trunk(trunk: Trunk | None) -> None:
    if trunk is not None:
        raise ValueError("a model that runs through transformers has no shared trunk")
