"""From a training module to the C++ program that generates from the same storage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from hybrid_engine.engine.request import Request
from hybrid_engine.engine.rollout import TOKEN_COLUMNS
from hybrid_engine.engine.sampling import SamplingParams
from hybrid_engine.engine.slices import Slices
from hybrid_engine.engine.weights import OwnWeights, WeightSource
from hybrid_engine.errors import UserError
from hybrid_engine.models import CausalLM, adapted_linears, rope_tables
from hybrid_engine.models.decoder import alibi_slopes
from hybrid_kernels import native_module


@dataclass(frozen=True)
class Adapter:
    """The factor of a layer's low-rank term, and the outputs of each of its (A, B) pairs."""

    scale: float
    splits: tuple[int, ...]


class ProgramBuilder:
    """Describes a `CausalLM` to the C++ side: spec, parameters by name, adapter scales.

    Args:
        weights: where its parameters are to be read; by default the module itself.
        slices: the part of them that they are.
        peers: native `Peers`, the ranks with the other parts.
    """

    def __init__(
        self,
        model: CausalLM,
        weights: WeightSource | None = None,
        slices: Slices | None = None,
        peers: Any = None,
    ) -> None:
        self.model = model
        self.weights = weights or OwnWeights(model)
        self._slices = slices
        self._peers = peers

    def spec(self) -> dict[str, Any]:
        return self.model.spec.as_dict()

    def tensors(self, longest: int) -> dict[str, Tensor | list[Tensor]]:
        """The parameters, without adapters that are switched off, and the position tables for
        ``longest`` tokens.

        Raises:
            UserError: parameters that the kernels cannot read.
        """
        spec = self.model.spec
        idle = {
            f"{name}.{part}"
            for name, linear in adapted_linears(self.model)
            if not linear.lora_enabled
            for part in ("lora_a", "lora_b")
        }
        tensors = {
            name: tensor for name, tensor in self.weights.tensors().items() if name not in idle
        }
        device = _pieces(tensors["head.weight"])[0].device
        for name, tensor in tensors.items():
            _check_readable(name, tensor, device)
        if spec.rope is not None:
            cos, sin = rope_tables(spec.rope, longest, spec.max_positions, device)
            tensors |= {"rope_cos": cos, "rope_sin": sin}
        elif spec.positions == "alibi":
            tensors["alibi_slopes"] = alibi_slopes(spec.heads).to(device)
        return tensors

    def whole_tensors(self, longest: int) -> dict[str, Tensor]:
        """:meth:`tensors`, of a builder without slices."""
        assert self._slices is None
        return cast(dict[str, Tensor], self.tensors(longest))

    def lora_scales(self) -> dict[str, float]:
        """The factor of every adapted linear layer's low-rank term."""
        return {name: adapter.scale for name, adapter in self.adapters().items()}

    def adapters(self) -> dict[str, Adapter]:
        """How the low-rank factors of every adapted linear layer apply."""
        return {
            name: Adapter(linear.lora_scale, tuple(linear.lora_splits))
            for name, linear in adapted_linears(self.model)
        }

    def build(self) -> Any:
        """A `DecodeProgram` of the native library; nothing is bound yet."""
        slices = self._slices and self._slices.as_dict()
        return native_module().DecodeProgram(self.spec(), slices, self._peers)

    def bind(self, program: Any, longest: int) -> None:
        """Point the program at the parameters as they lie now."""
        program.bind(self.tensors(longest), self.lora_scales(), self.weights.gate)


class NativeGenerator:
    """Runs the C++ program on a module's parameters.

    Args:
        keeps_cache: `release` leaves the KV cache for the next phase.
    """

    def __init__(
        self,
        model: CausalLM,
        weights: WeightSource,
        slices: Slices | None = None,
        peers: Any = None,
        keeps_cache: bool = False,
    ) -> None:
        self.builder = ProgramBuilder(model, weights, slices, peers)
        self.keeps_cache = keeps_cache
        self.program = self.builder.build()

    def generate(self, request: Request) -> dict[str, Any]:
        """Binds the parameters as they lie now and generates; the KV cache stays until `release`.

        Raises:
            UserError: a request that does not fit, or weights that give no finite logits. What a
                callback raises, and Ctrl-C, comes through as it is, with an attribute ``partial``
                that is this function's result up to then.
        """
        longest = max((len(prompt) for prompt in request.prompts), default=0)
        longest += request.params.max_new_tokens
        self.builder.bind(self.program, min(longest, self.builder.model.spec.max_positions))
        callers = CallerErrors()
        try:
            return run_program(
                self.program,
                request.prompts,
                request.params,
                request.stop_tokens,
                sample_ids=request.sample_ids,
                expected_new=list(request.expected_lengths) or lengths_of_drafts(request),
                prompt_max_new=list(request.max_new_tokens),
                drafts=[list(draft) for draft in request.drafts],
                max_batch=request.max_batch,
                kv_bytes=request.kv_bytes,
                keep_cache=True,
                on_progress=callers.watch(request.on_progress),
                on_token=callers.watch(request.on_token),
            )
        except ValueError as error:
            if callers.error is not None:
                raise
            raise UserError(str(error)) from error

    def release(self) -> None:
        """Lets go of the parameters, whose memory may be given back, and of the cache."""
        self.program.unbind()
        if not self.keeps_cache:
            self.program.release_cache()


class CallerErrors:
    """Tells what the caller's own callbacks raise from what the program refuses."""

    def __init__(self) -> None:
        self.error: BaseException | None = None

    def watch(self, callback: Callable[..., None] | None) -> Callable[..., None] | None:
        if callback is None:
            return None

        def watched(*arguments: int) -> None:
            try:
                callback(*arguments)
            except BaseException as error:
                self.error = error
                raise

        return watched


def run_program(
    program: Any,
    prompts: list[list[int]],
    params: SamplingParams,
    stop_tokens: list[int],
    **options: Any,
) -> dict[str, Any]:
    """One call of ``DecodeProgram.generate``; flat tensors become one list a sample."""
    try:
        flat = program.generate(
            prompts,
            samples_per_prompt=params.n,
            max_new_tokens=params.max_new_tokens,
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            seed=params.seed,
            stop_tokens=stop_tokens,
            **options,
        )
    except BaseException as error:
        if hasattr(error, "partial"):
            error.partial = _one_list_a_sample(error.partial)
        raise
    return _one_list_a_sample(flat)


def _one_list_a_sample(flat: dict[str, Any]) -> dict[str, Any]:
    lengths = flat["offsets"].diff().tolist()
    per_sample = {
        name: [part.tolist() for part in flat[name].split(lengths)] if lengths else []
        for name in TOKEN_COLUMNS
    }
    return {**per_sample, "finish_reasons": flat["finish_reasons"], "counters": flat["counters"]}


def lengths_of_drafts(request: Request) -> list[float]:
    """The longest draft of each prompt: what its samples will likely take."""
    lengths, n = [float(len(draft)) for draft in request.drafts], request.params.n
    return [max(lengths[i : i + n]) for i in range(0, len(lengths), n)]


def _pieces(tensor: Tensor | list[Tensor]) -> list[Tensor]:
    return tensor if isinstance(tensor, list) else [tensor]


def _check_readable(name: str, pieces: Tensor | list[Tensor], device: torch.device) -> None:
    tensor = _pieces(pieces)[0]
    readable = (torch.float32, torch.bfloat16, *([torch.float16] if device.type == "cuda" else []))
    if device.type not in ("cpu", "cuda") or tensor.dtype not in readable:
        what = f"{str(tensor.dtype).removeprefix('torch.')} on {device.type}"
        raise UserError(
            f"generation reads float32 or bfloat16 weights on the CPU or a GPU, but {name} is "
            f'{what}; load the model with dtype="float32" or "bfloat16"'
        )
    if tensor.device != device:
        raise UserError(
            f"generation reads all weights on one device, but {name} is on {tensor.device} and the "
            f"head on {device}; move the whole model"
        )
