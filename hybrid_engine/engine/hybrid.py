"""One module that both trains and generates, from one set of weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from hybrid_kernels import native_available
from torch import Tensor

from hybrid_engine.config import OptimizerConfig
from hybrid_engine.distributed.collectives import rank
from hybrid_engine.engine.end_tokens import end_token_ids
from hybrid_engine.engine.foreign_generate import foreign_generate
from hybrid_engine.engine.program import ProgramBuilder, run_program
from hybrid_engine.engine.reference_generate import reference_generate
from hybrid_engine.engine.rollout import Rollout
from hybrid_engine.engine.sampling import SamplingParams
from hybrid_engine.engine.train_engine import TrainEngine
from hybrid_engine.errors import UserError
from hybrid_engine.models import (
    CausalLM,
    ForeignCausalLM,
    LoRAConfig,
    load_causal_lm,
    load_tokenizer,
    save_model,
)
from hybrid_engine.engine.passes import passes

OnProgress = Callable[[int, int, int], None]  # finished samples, all samples, tokens so far
OnToken = Callable[[int, int], None]  # sample, token

_SAMPLE_IDS_PER_RANK = 1 << 40


class HybridEngine:
    """Generates with, scores with and trains one language model.

    Generation reads the very storage that training writes: a step of the optimizer is seen by the next
    rollout without a byte copied.

    Args:
        model: from `load_causal_lm`.
        tokenizer: for end tokens and saving; may be None.
        train_engine: trains `model`; None for inference only.
        max_batch: sequences decoded together.
        kv_bytes: budget of the KV cache in bytes; 0 takes as much as `max_batch` sequences can use.
        score_tokens: tokens in one pass of the scoring forward.
    """

    def __init__(
        self,
        model: CausalLM | ForeignCausalLM,
        tokenizer: Any | None,
        train_engine: TrainEngine | None = None,
        *,
        max_batch: int = 64,
        kv_bytes: int = 0,
        score_tokens: int = 8192,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.train_engine = train_engine
        self.max_batch = max_batch
        self.kv_bytes = kv_bytes
        self.score_tokens = score_tokens
        self.eos_token_ids = end_token_ids(model, tokenizer)
        self._phase: str | None = None
        self._builder = ProgramBuilder(model) if model.native else None
        self._program: Any | None = None  # built at the first rollout: it may compile the library

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        dtype: str = "float32",
        lora: LoRAConfig | None = None,
        deepspeed_config: Mapping[str, Any] | None = None,
        *,
        optimizer: OptimizerConfig | None = None,
        total_steps: int = 1,
        **options: Any,
    ) -> HybridEngine:
        """Load a Hugging Face directory or hub name.

        A ``deepspeed_config`` (it may be empty) makes the engine trainable; ``optimizer`` and
        ``total_steps`` are those of `TrainEngine`, by default a constant learning rate, for which the
        number of steps does not matter. ``options`` as in the constructor.
        """
        model = load_causal_lm(path, dtype, lora)
        train_engine = None
        if deepspeed_config is not None:
            optimizer = optimizer or OptimizerConfig(schedule="constant", warmup_ratio=0.0)
            train_engine = TrainEngine(model, optimizer, total_steps, deepspeed_config)
        return cls(model, load_tokenizer(path), train_engine, **options)

    # Phases

    @contextmanager
    def generation(self) -> Iterator[None]:
        """Rollouts happen inside. Under ZeRO-3 the parameters are whole from beginning to end.

        They are gathered once, here; generating needs no message between ranks, so ranks may generate
        unequally much and long.
        """
        with self._enter("generation"):
            whole = self.train_engine.full_parameters() if self.train_engine else nullcontext()
            with whole:
                try:
                    yield
                finally:
                    if self._program is not None:
                        self._program.unbind()  # or it would keep gathered parameters alive
                        self._program.release_cache()

    @contextmanager
    def training(self) -> Iterator[None]:
        """Optimizer steps happen inside: the module is in training mode, and nothing generates."""
        with self._enter("training"):
            self.model.train()
            try:
                yield
            finally:
                self.model.eval()

    @contextmanager
    def _enter(self, phase: str) -> Iterator[None]:
        if self._phase is not None:
            raise RuntimeError(f"HybridEngine.{phase}() inside {self._phase}(): phases do not nest")
        self._phase = phase
        try:
            yield
        finally:
            self._phase = None

    # Generating

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | None = None,
        sample_ids: Sequence[int] | None = None,
        on_progress: OnProgress | None = None,
        expected_lengths: Sequence[float] | None = None,
        on_token: OnToken | None = None,
    ) -> Rollout:
        """Sample ``params.n`` responses to each prompt.

        Args:
            prompts: token ids; each at least one, and shorter than the model's context.
            sample_ids: one a sample, naming its random stream. A sample depends on its id, the seed and
                the prompt alone: not on the batch, the order or the rank. By default this call's samples
                are numbered from zero, on every rank in a range of its own.
            on_progress: called now and then with (finished samples, all samples, tokens so far).
            expected_lengths: one a prompt, for example of its last responses: the longest are started
                first, which leaves fewer slots idle at the end. The results do not depend on it.
            on_token: called with (sample, token) for every token as soon as it is drawn; what it raises
                ends the call. Families without a native decoder stream a lone sample only, and report
                those of a batch at its end.

        Raises:
            UserError: a prompt that cannot be served, naming its index.
        """
        params = params or SamplingParams()
        prompts = [list(prompt) for prompt in prompts]
        self._check_prompts(prompts)
        if sample_ids is None:
            first = rank() * _SAMPLE_IDS_PER_RANK
            sample_ids = range(first, first + len(prompts) * params.n)
        if self._phase == "generation":
            result = self._sample(prompts, params, list(sample_ids), on_progress, on_token, expected_lengths)
        else:
            with self.generation():
                result = self._sample(prompts, params, list(sample_ids), on_progress, on_token, expected_lengths)
        if not self.model.native:
            result |= self._scores_of(prompts, params, result["tokens"])
        return Rollout(prompts=prompts, n=params.n, **result)

    def _sample(
        self,
        prompts: list[list[int]],
        params: SamplingParams,
        sample_ids: list[int],
        on_progress: OnProgress | None,
        on_token: OnToken | None,
        expected_lengths: Sequence[float] | None,
    ) -> dict[str, Any]:
        stop_tokens = sorted({*params.stop_token_ids, *(() if params.ignore_eos else self.eos_token_ids)})
        if self._builder is not None and native_available():
            if self._program is None:
                self._program = self._builder.build()
            context = self.model.spec.max_positions
            longest = max((len(prompt) for prompt in prompts), default=0) + params.max_new_tokens
            self._builder.bind(self._program, min(longest, context))
            try:
                return run_program(
                    self._program,
                    prompts,
                    params,
                    stop_tokens,
                    sample_ids=sample_ids,
                    expected_new=list(expected_lengths or ()),
                    max_batch=self.max_batch,
                    kv_bytes=self.kv_bytes,
                    keep_cache=True,  # until generation() ends
                    on_progress=on_progress,
                    on_token=on_token,
                )
            except ValueError as error:
                raise UserError(str(error)) from error
        self._refuse_zero3()
        plain = reference_generate if self.model.native else foreign_generate
        return plain(self.model, prompts, params, stop_tokens, sample_ids, self.max_batch, on_progress, on_token)

    def _check_prompts(self, prompts: list[list[int]]) -> None:
        vocab, context = self._limits()
        for i, prompt in enumerate(prompts):
            if not prompt:
                raise UserError(f"prompt {i} is empty; a response needs at least one token before it")
            if len(prompt) >= context:
                raise UserError(
                    f"prompt {i} has {len(prompt)} tokens, which leaves no room for a response in the "
                    f"model's context of {context}; shorten it"
                )
            if bad := [token for token in prompt if not 0 <= token < vocab]:
                raise UserError(
                    f"prompt {i} has token id {bad[0]}, outside the model's vocabulary of {vocab}; "
                    "was it encoded with another tokenizer?"
                )

    @property
    def context_length(self) -> int | float:
        """Longest sequence, prompt and response together; infinite where the model states none."""
        return self._limits()[1]

    def _limits(self) -> tuple[int, float]:
        """Size of the vocabulary, and longest sequence."""
        if self.model.native:
            return self.model.spec.vocab_size, self.model.spec.max_positions
        config = self.model.hf_model.config.get_text_config()
        return config.vocab_size, getattr(config, "max_position_embeddings", float("inf"))

    def _refuse_zero3(self) -> None:
        if self.train_engine is not None and self.train_engine.zero_stage == 3:
            raise UserError(
                "generating under ZeRO-3 needs the native program (a compiler, and a family with a native "
                "decoder); use ZeRO stage 0, 1 or 2"
            )

    # Scoring

    def token_logprobs(
        self,
        sequences: Sequence[Sequence[int]],
        prompt_lengths: Sequence[int],
        temperature: float = 1.0,
    ) -> list[Tensor]:
        """Log-probabilities of the tokens after each prompt, by the training forward.

        Returns:
            One fp32 tensor a sequence, of its length minus its prompt length. With several ranks every
            rank must call this.
        """
        return self._score(sequences, prompt_lengths, temperature)[0]

    @torch.no_grad()
    def _score(
        self, sequences: Sequence[Sequence[int]], prompt_lengths: Sequence[int], temperature: float
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Log-probabilities and entropies of every response."""
        if self._phase == "generation" and self.train_engine is not None and self.train_engine.zero_stage == 3:
            raise RuntimeError("token_logprobs runs the training forward: call it outside generation()")
        forward = self.train_engine or self.model
        logprobs: list[Tensor] = [torch.empty(0)] * len(sequences)
        entropies: list[Tensor] = [torch.empty(0)] * len(sequences)
        lists = [list(sequence) for sequence in sequences]
        for part in passes(lists, prompt_lengths, self.score_tokens):
            scores = forward(part.batch, part.rows, part.targets, temperature)
            sizes = [len(lists[i]) - max(prompt_lengths[i], 1) for i in part.samples]
            for i, logprob, entropy in zip(
                part.samples, scores.logprobs.split(sizes), scores.entropies.split(sizes), strict=True
            ):
                logprobs[i], entropies[i] = logprob, entropy
        return logprobs, entropies

    def _scores_of(
        self, prompts: list[list[int]], params: SamplingParams, tokens: list[list[int]]
    ) -> dict[str, list[list[float]]]:
        sequences = [prompts[i // params.n] + response for i, response in enumerate(tokens)]
        lengths = [len(prompts[i // params.n]) for i in range(len(tokens))]
        logprobs, entropies = self._score(sequences, lengths, params.scoring_temperature)
        return {
            "logprobs": [values.tolist() for values in logprobs],
            "entropies": [values.tolist() for values in entropies],
        }

    # Saving

    def save_pretrained(self, directory: str | Path) -> None:
        """Write a Hugging Face directory that transformers opens; with several ranks all must call."""
        save_model(self.model, directory, self.tokenizer)
