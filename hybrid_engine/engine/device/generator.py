"""From a training module to rollouts on the device that its parameters are on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hybrid_engine.engine.gather import GatheredWeights
from hybrid_engine.engine.program import CallerErrors, ProgramBuilder, lengths_of_drafts
from hybrid_engine.engine.request import Request
from hybrid_engine.engine.weights import OwnWeights
from hybrid_engine.errors import UserError
from hybrid_engine.models import CausalLM
from hybrid_kernels import native_module

from .cache import DeviceCache, block_bytes
from .graphs import Recorder, recorder_for
from .responses import Responses
from .rollout import DeviceRollout, Machinery
from .state import DecodeState
from .steps import DecodeSteps
from .walk import BLOCK, LayerWalk, activation_dtype, nothing_to_await

_PREFILL_ROWS = 512  # of one pass, as in the C++ program
_LAG = 4  # passes; the host is that far ahead of what it has read


@dataclass(frozen=True)
class _Kept:
    """What outlives a rollout, and where the weights were that its steps read."""

    pointers: dict[str, int]
    walk: LayerWalk
    cache: DeviceCache
    state: DecodeState
    steps: DecodeSteps


class DeviceGenerator:
    """Generates where a module's parameters are: `NativeGenerator` for a GPU.

    Cache, state and recorded steps are kept until :meth:`release`, and used again while parameters
    stay where they are.

    Args:
        weights: where its parameters are to be read.
        recorder: how a decode step is repeated; by default a CUDA graph on a GPU, a call elsewhere.
        lag: passes whose draws may be unread when the next is scheduled; by default none on the
            CPU, where a pass has ended when its call returns.
    """

    def __init__(
        self,
        model: CausalLM,
        weights: OwnWeights | GatheredWeights,
        *,
        recorder: Recorder | None = None,
        lag: int | None = None,
    ) -> None:
        self.spec, self.weights = model.spec, weights
        self.builder = ProgramBuilder(model, weights)
        self._recorder, self._lag = recorder, lag
        self._kept: _Kept | None = None

    @torch.no_grad()
    def generate(self, request: Request) -> dict[str, Any]:
        """As `NativeGenerator.generate`: the same result and the same errors. The counters have no
        seconds, because the host is ahead of the device.
        """
        callers = CallerErrors()
        request = replace(
            request,
            on_progress=callers.watch(request.on_progress),
            on_token=callers.watch(request.on_token),
        )
        rollout = self._rollout(request)
        try:
            rollout.run()
        except BaseException as error:
            if not isinstance(error, ValueError) or callers.error is not None:
                error.partial = self._result(rollout)  # type: ignore[attr-defined]
                raise
            refusal = UserError(str(error))
            raise refusal from error
        return self._result(rollout)

    def release(self) -> None:
        """Lets go of the parameters, the cache, and the steps that have their addresses."""
        self._kept = None

    def _rollout(self, request: Request) -> DeviceRollout:
        native = native_module()
        limits = [self._limit(request, i) for i in range(len(request.prompts))]
        queue = self._queue(native, request, limits)
        lengths = [len(prompt) + new for prompt, new in zip(request.prompts, limits, strict=True)]
        tensors = self.builder.whole_tensors(max(lengths, default=1))
        blocks = self._blocks(native, queue, request, _cache_dtype(tensors))
        samples = len(request.sample_ids)
        batch = max(1, min(request.max_batch, samples))
        kept = self._keep(tensors, blocks, batch, -(-max(lengths, default=1) // BLOCK), samples)
        pool = native.KvBlockPool(blocks)
        scheduler = native.Scheduler(
            queue,
            max_batch=batch,
            max_prefill_rows=_PREFILL_ROWS,
            pool=pool,
            copy=kept.cache.copy,
            freed=_leave_as_it_is,
        )
        gate, on_gpu = self.weights.gate, kept.cache.tensor.is_cuda
        machinery = Machinery(
            native,
            kept.walk,
            kept.cache,
            kept.state,
            kept.steps,
            await_part=nothing_to_await if gate is None else gate.wait,
            lag=(_LAG if on_gpu else 0) if self._lag is None else self._lag,
        )
        return DeviceRollout(request, Responses(request, limits), scheduler, pool, machinery)

    def _limit(self, request: Request, prompt: int) -> int:
        """Longest response."""
        room = self.spec.max_positions - len(request.prompts[prompt])
        return min(request.response_limit(prompt * request.params.n), room)

    def _queue(self, native: Any, request: Request, limits: list[int]) -> list[Any]:
        n = request.params.n
        expected = list(request.expected_lengths) or lengths_of_drafts(request)
        drafts = [min(len(d), limits[i // n]) for i, d in enumerate(request.drafts)]
        return [
            native.PromptRequest(
                len(prompt),
                limits[i],
                n,
                expected[i] if expected else 0.0,
                drafts[i * n : i * n + n],
            )
            for i, prompt in enumerate(request.prompts)
        ]

    def _blocks(self, native: Any, queue: list[Any], request: Request, dtype: torch.dtype) -> int:
        enough: int = native.Scheduler.enough_blocks(queue, request.max_batch)
        if not request.kv_bytes:
            return enough
        each = block_bytes(self.spec, dtype)
        affordable = request.kv_bytes // each
        for i, prompt in enumerate(queue):
            if prompt.least_blocks > affordable:
                raise UserError(
                    f"prompt {i} needs a KV cache of {prompt.least_blocks * each} bytes, but "
                    f"kv_bytes is {request.kv_bytes}"
                )
        return min(enough, affordable)

    def _keep(
        self, tensors: dict[str, Tensor], blocks: int, batch: int, width: int, samples: int
    ) -> _Kept:
        """What the last rollout left, where it is big enough and the weights have not moved."""
        kept, pointers = self._kept, {name: t.data_ptr() for name, t in tensors.items()}
        if (
            kept is None
            or kept.pointers != pointers
            or kept.cache.blocks < blocks
            or not kept.state.fits(batch, width, samples)
        ):
            self._kept = kept = None  # before the new cache: never both
            self._kept = kept = self._make(tensors, pointers, blocks, batch, width, samples)
        return kept

    def _make(
        self,
        tensors: dict[str, Tensor],
        pointers: dict[str, int],
        blocks: int,
        batch: int,
        width: int,
        samples: int,
    ) -> _Kept:
        device, dtype = tensors["head.weight"].device, _cache_dtype(tensors)
        walk = LayerWalk(self.spec, tensors, self.builder.adapters())
        try:
            cache = DeviceCache(self.spec, blocks, dtype, device)
        except torch.OutOfMemoryError as error:
            wanted = (blocks + 1) * block_bytes(self.spec, dtype)
            raise UserError(
                f"there is no room on {device} for a KV cache of {wanted} bytes; set kv_bytes, or "
                "a smaller max_batch"
            ) from error
        state = DecodeState(batch, width, samples, cache.idle_block, device)
        recorder = self._recorder or recorder_for(device)
        return _Kept(pointers, walk, cache, state, DecodeSteps(walk, cache, state, recorder))

    def _result(self, rollout: DeviceRollout) -> dict[str, Any]:
        assert self._kept is not None
        cache = self._kept.cache.tensor
        counters = {
            **rollout.counters,
            "draft_accepted": rollout.responses.draft_accepted,
            "preemptions": rollout.scheduler.preemptions,
            "block_bytes": block_bytes(self.spec, cache.dtype),
            "arena_blocks": rollout.pool.available + rollout.pool.used,
            "peak_blocks": rollout.pool.peak_used,
        }
        return {**rollout.responses.columns(), "counters": counters}


def _cache_dtype(tensors: dict[str, Tensor]) -> torch.dtype:
    head = tensors["head.weight"]
    return activation_dtype(head.dtype, head.device)


def _leave_as_it_is(block: int) -> None:
    """A block that is free again: nobody reads it before it is written."""
