"""One module that both trains and generates, from one set of weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor

from hybrid_engine.config import OptimizerConfig
from hybrid_engine.distributed.collectives import rank
from hybrid_engine.distributed.device import use_device
from hybrid_engine.distributed.subgroup import check_divides
from hybrid_engine.engine.device import DeviceGenerator, generator_for
from hybrid_engine.engine.end_tokens import end_token_ids
from hybrid_engine.engine.foreign_generate import foreign_generate
from hybrid_engine.engine.gather import GatherCounters, GatheredWeights
from hybrid_engine.engine.partial import keep_finished
from hybrid_engine.engine.program import NativeGenerator
from hybrid_engine.engine.reference_generate import reference_generate
from hybrid_engine.engine.request import OnProgress, OnToken, Request, check_prompts
from hybrid_engine.engine.rollout import Rollout
from hybrid_engine.engine.sampling import SamplingParams
from hybrid_engine.engine.score import score_responses
from hybrid_engine.engine.tensor_parallel import NEEDS, SETTING, TensorParallel, TogetherGenerator
from hybrid_engine.engine.train_engine import TrainEngine
from hybrid_engine.engine.weights import WeightSource, weights_of
from hybrid_engine.errors import UserError
from hybrid_engine.models import (
    CausalLM,
    ForeignCausalLM,
    LoRAConfig,
    load_causal_lm,
    load_tokenizer,
    placed,
    save_adapter,
    save_model,
)
from hybrid_kernels import native_available

_SAMPLE_IDS_PER_RANK = 1 << 40


class HybridEngine:
    """Generates with, scores with and trains one language model.

    Generation reads the very storage that training writes: a step of the optimizer is seen by the
    next rollout without a byte copied.

    Args:
        model: from `load_causal_lm`.
        tokenizer: for end tokens and saving; may be None.
        train_engine: trains `model`; None for inference only.
        max_batch: sequences decoded together.
        kv_bytes: budget of the KV cache in bytes; 0 takes as much as `max_batch` sequences can use.
        weight_bytes: what gathered weights may take on a rank, under ZeRO-3 with several ranks:
            layers that do not fit are streamed from the other ranks in every pass. 0 takes half of
            the memory that is free when the first phase begins.
        score_tokens: tokens in one pass of the scoring forward.
        merge_adapters: generate with LoRA adapters added into the weights, whose bits come back:
            faster, but its log-probabilities are no longer the training forward's to the bit.
        inference_tp: consecutive ranks, on one host, that generate together, each with a slice of
            every layer. All ranks must then make the same calls of `generate`; tokens and
            log-probabilities stay the same bits.
        on_plan: called once, with a line that says which layers stay gathered and what they take.

    Raises:
        UserError: an ``inference_tp`` that the ranks or the model cannot serve.
    """

    def __init__(
        self,
        model: CausalLM | ForeignCausalLM,
        tokenizer: Any | None,
        train_engine: TrainEngine | None = None,
        *,
        max_batch: int = 64,
        kv_bytes: int = 0,
        weight_bytes: int = 0,
        score_tokens: int = 8192,
        merge_adapters: bool = False,
        inference_tp: int = 1,
        on_plan: Callable[[str], None] | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.train_engine = train_engine
        self.max_batch = max_batch
        self.kv_bytes = kv_bytes
        self.weight_bytes = weight_bytes
        self.score_tokens = score_tokens
        self.merge_adapters = merge_adapters
        self.inference_tp = inference_tp
        self._on_plan = on_plan
        self._check_inference_tp()
        self.eos_token_ids = end_token_ids(model, tokenizer)
        self._phase: str | None = None
        # Both at the first rollout: they may compile.
        self._weights: WeightSource | None = None
        self._together: TensorParallel | None = None
        self._native: NativeGenerator | DeviceGenerator | TogetherGenerator | None = None

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
        base: str | Path | None = None,
        device: str = "cpu",
        verify_frozen: bool = False,
        base_bits: int = 0,
        **options: Any,
    ) -> HybridEngine:
        """Load a model or a PEFT adapter (on the base that it names, or ``base``), local or hub's.

        A ``deepspeed_config`` (it may be empty) makes the engine trainable; ``optimizer``,
        ``total_steps`` and ``verify_frozen`` are those of `TrainEngine`, by default a constant
        learning rate, for which the number of steps does not matter. ``base_bits`` 4 or 8 quantizes
        what lies under an adapter. ``device`` is ``"cpu"``, or ``"cuda"`` for this rank's GPU; one
        process keeps to one. ``options`` as in the constructor.
        """
        use_device(device)
        model = placed(load_causal_lm(path, dtype, lora, base=base, base_bits=base_bits))
        train_engine = None
        if deepspeed_config is not None:
            optimizer = optimizer or OptimizerConfig(schedule="constant", warmup_ratio=0.0)
            train_engine = TrainEngine(
                model, optimizer, total_steps, deepspeed_config, verify_frozen=verify_frozen
            )
        return cls(model, load_tokenizer(path, base), train_engine, **options)

    # Phases

    @contextmanager
    def generation(self) -> Iterator[None]:
        """Rollouts happen inside. Under ZeRO-3 every rank must enter, with or without prompts.

        Its weights are gathered once a phase, while the first rollout prefills: see
        `engine.gather`. Generating itself needs no message between ranks, so ranks may generate
        unequally much and long. Ranks of one host, which read one copy, leave together, and so do
        all where ``weight_bytes`` has layers streamed, and the others may need what a rank sends.

        The KV cache is given back at the end, for the training to come; on the CPU
        an engine without ``train_engine`` keeps it for the next phase.
        """
        with self._enter("generation"):
            with self._weights_source().whole():
                try:
                    yield
                finally:
                    if self._native is not None:
                        self._native.release()
            if self.train_engine is not None:
                self.train_engine.check_frozen("generating")

    @property
    def gathered(self) -> GatherCounters | None:
        """What the last generation phase gathered; None where it had nothing to gather."""
        weights = self._weights
        return weights.counters if isinstance(weights, GatheredWeights) else None

    def _weights_source(self) -> WeightSource:
        if self._weights is None:
            slices = None
            if self.inference_tp > 1 and isinstance(self.model, CausalLM):
                self._together = TensorParallel(self.model.spec, self.inference_tp)
                slices = self._together.slices
            weights = weights_of(
                self.model,
                self.train_engine,
                self.merge_adapters,
                slices,
                weight_bytes=self.weight_bytes,
                kv_bytes=self.kv_bytes,
            )
            if self._on_plan is not None and isinstance(weights, GatheredWeights):
                self._on_plan(weights.plan_line)
            self._weights = weights
        return self._weights

    def _check_inference_tp(self) -> None:
        if self.inference_tp == 1:
            return
        check_divides(self.inference_tp, SETTING)
        model = self.model
        on_cpu = next(model.parameters()).device.type == "cpu"
        if not isinstance(model, CausalLM) or not native_available() or not on_cpu:
            raise UserError(NEEDS)

    @contextmanager
    def training(self) -> Iterator[None]:
        """Optimizer steps happen inside: training mode, where adapters drop out; no generating."""
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
        *,
        max_new_tokens: Sequence[int] | None = None,
        drafts: Sequence[Sequence[int]] | None = None,
    ) -> Rollout:
        """Sample ``params.n`` responses to each prompt.

        Args:
            prompts: token ids; each at least one, and shorter than the model's context.
            sample_ids: one a sample, naming its random stream. A sample depends on its id, the seed
                and the prompt alone: not on the batch, the order or the rank. By default this
                call's samples are numbered from zero, on every rank in a range of its own.
            on_progress: called with (finished samples, all samples, tokens so far), at the end and
                at most 20 times a second before.
            expected_lengths: one a prompt, for example of its last responses: the longest are
                started first, which leaves fewer slots idle at the end. Results stay the same.
                By default those of the drafts.
            on_token: called with (sample, token) for every token as soon as it is drawn; what it
                raises ends the call. Families without a native decoder stream a lone sample only,
                and report those of a batch at its end.
            max_new_tokens: one a prompt: lower limits than ``params.max_new_tokens``.
            drafts: one a sample (it may be empty): tokens to try, such as the response that the
                same prompt, seed and sample id had an epoch ago. All of them are computed in one
                prefill, and the leading ones that the sample draws itself are kept. Results stay
                the same, bit for bit; with another seed or sample id hardly a token would hold.

        Raises:
            UserError: a prompt that cannot be served, naming its index.

        Ctrl-C, or whatever a callback raises, ends the call after the running pass. The finished
        samples go with the exception: see `partial_rollout` (native and plain generators).
        """
        params = params or SamplingParams()
        lists = [list(prompt) for prompt in prompts]
        check_prompts(lists, *self._limits())
        if sample_ids is None:
            first = rank() * _SAMPLE_IDS_PER_RANK
            sample_ids = range(first, first + len(lists) * params.n)
        request = Request(
            prompts=lists,
            params=params,
            stop_tokens=self._stop_tokens(params),
            sample_ids=list(sample_ids),
            max_batch=self.max_batch,
            kv_bytes=self.kv_bytes,
            expected_lengths=expected_lengths or (),
            max_new_tokens=max_new_tokens or (),
            drafts=drafts or (),
            on_progress=on_progress,
            on_token=on_token,
        )
        with nullcontext() if self._phase == "generation" else self.generation():
            try:
                result = self._sample(request)
            except BaseException as error:
                keep_finished(error, lists, params.n)
                raise
        if "logprobs" not in result:
            result |= self._scores_of(request, result)
        return Rollout(prompts=lists, n=params.n, **result)

    def _sample(self, request: Request) -> dict[str, Any]:
        if isinstance(self.model, CausalLM) and native_available():
            if self._native is None:
                self._native = self._make_generator(self.model)
            return self._native.generate(request)
        if self._zero_stage() == 3:
            raise UserError(
                "generating under ZeRO-3 needs the native program (a compiler, and a family with a "
                "native decoder); use ZeRO stage 0, 1 or 2"
            )
        if isinstance(self.model, CausalLM):
            return reference_generate(self.model, request)
        return foreign_generate(self.model, request)

    def _make_generator(
        self, model: CausalLM
    ) -> NativeGenerator | DeviceGenerator | TogetherGenerator:
        weights = self._weights_source()
        if self._together is None:
            # Whoever never trains needs the cache's memory for the next rollout alone.
            return generator_for(model, weights, keeps_cache=self.train_engine is None)
        return TogetherGenerator(model, weights, self._together)

    def _stop_tokens(self, params: SamplingParams) -> list[int]:
        ends = () if params.ignore_eos else self.eos_token_ids
        return sorted({*params.stop_token_ids, *ends})

    @property
    def context_length(self) -> int | float:
        """Longest sequence, prompt and response together; infinite where the model states none."""
        return self._limits()[1]

    def _limits(self) -> tuple[int, int | float]:
        """Size of the vocabulary, and longest sequence."""
        if isinstance(self.model, CausalLM):
            return self.model.spec.vocab_size, self.model.spec.max_positions
        hf_model: Any = self.model.hf_model
        config = hf_model.config.get_text_config()
        return config.vocab_size, getattr(config, "max_position_embeddings", float("inf"))

    # Scoring

    def token_logprobs(
        self,
        sequences: Sequence[Sequence[int]],
        prompt_lengths: Sequence[int],
        temperature: float = 1.0,
        thresholds: Sequence[Sequence[float]] | None = None,
    ) -> list[Tensor]:
        """Log-probabilities of the tokens after each prompt, by the training forward.

        With the ``thresholds`` of a `Rollout`, over the sets that its truncated sampling kept: its
        ``kept_logprobs``.

        Returns:
            One fp32 tensor a sequence, of its length minus its prompt length. With several ranks
            every rank must call this; under ZeRO-3 outside `generation()`.
        """
        return self._score(sequences, prompt_lengths, temperature, thresholds)[0]

    def _score(
        self,
        sequences: Sequence[Sequence[int]],
        prompt_lengths: Sequence[int],
        temperature: float,
        thresholds: Sequence[Sequence[float]] | None = None,
    ) -> tuple[list[Tensor], list[Tensor]]:
        if self._phase == "generation" and self._zero_stage() == 3:
            raise RuntimeError("scoring runs the training forward: call it outside generation()")
        forward = self.train_engine or self.model
        return score_responses(
            forward, sequences, prompt_lengths, temperature, self.score_tokens, thresholds
        )

    def _scores_of(self, request: Request, result: dict[str, Any]) -> dict[str, Any]:
        rows, temperature = request.rows, request.params.scoring_temperature
        sequences = [prompt + tokens for prompt, tokens in zip(rows, result["tokens"], strict=True)]
        lengths = [len(prompt) for prompt in rows]
        scores = self._score(sequences, lengths, temperature)
        logprobs, entropies = ([values.tolist() for values in part] for part in scores)
        kept = logprobs
        if request.params.truncated:
            over_kept, _ = self._score(sequences, lengths, temperature, result["thresholds"])
            kept = [values.tolist() for values in over_kept]
        return {"logprobs": logprobs, "entropies": entropies, "kept_logprobs": kept}

    def _zero_stage(self) -> int:
        return self.train_engine.zero_stage if self.train_engine is not None else 0

    # Saving

    def save_pretrained(self, directory: str | Path) -> None:
        """Write a directory that transformers opens, adapters merged; every rank must call this."""
        save_model(self.model, directory, self.tokenizer)

    def save_adapter(self, directory: str | Path) -> None:
        """Write the model's LoRA adapter in PEFT's format; every rank must call this."""
        save_adapter(self.model, directory, self.tokenizer)
