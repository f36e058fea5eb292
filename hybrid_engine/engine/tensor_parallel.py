"""Ranks that generate together: the same prompts, each rank with a slice of every layer.

The group's ranks bring their own prompts and take their own results home; in between they run the
same requests through the same scheduler, so nothing but activations has to be exchanged, and
training stays data parallel.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from typing import Any

from hybrid_engine.distributed.subgroup import Subgroup
from hybrid_engine.engine.program import NativeGenerator
from hybrid_engine.engine.request import OnToken, Request
from hybrid_engine.engine.rollout import TOKEN_COLUMNS
from hybrid_engine.engine.slices import slice_decoder
from hybrid_engine.engine.weights import WeightSource
from hybrid_engine.errors import UserError
from hybrid_engine.models import CausalLM, DecoderSpec
from hybrid_kernels import native_module

SETTING = "inference_tp"
NEEDS = (
    f"{SETTING} above 1 needs the native program: a model on the CPU, of a family with a native "
    "decoder, and a compiler; give 1"
)
_PHASE = "tensor-parallel generation"
# Settings of a request that must agree, because all of the group's prompts run under one.
_COMMON = ("params", "stop_tokens", "max_batch", "kv_bytes")


class TensorParallel:
    """This rank's place in its group, the group's shared memory, and the slices of a decoder.

    Making one is a collective of all ranks.
    """

    def __init__(self, spec: DecoderSpec, size: int) -> None:
        group = self.group = Subgroup(size, SETTING)
        self.slices = slice_decoder(spec, group.rank, size)
        native = native_module()
        memory = group.shared_memory(native.Peers.bytes_for(size))
        timeout = group.timeout.total_seconds()
        self.peers = native.Peers(memory, group.rank, size, group.first, timeout)

    def begin(self, value: Any) -> list[Any]:
        """One JSON-able value of every rank as a rollout begins; one that fails must leave it."""
        self.group.meet(_PHASE)
        said = self.group.gather_json([self.peers.position, value])
        self.peers.begin(1 + max(position for position, _ in said))
        return [theirs for _, theirs in said]


class TogetherGenerator:
    """Runs the C++ program on every rank of a group; each gets the results of its own prompts."""

    def __init__(self, model: CausalLM, weights: WeightSource, together: TensorParallel) -> None:
        self._together = together
        self._native = NativeGenerator(model, weights, together.slices, together.peers)
        self.program = self._native.program

    def generate(self, request: Request) -> dict[str, Any]:
        """As `NativeGenerator.generate`; every rank of the group must call it equally often.

        ``on_progress`` and the counters tell of the whole group's rollout. Whatever ends it on one
        rank ends it on all of them after the same pass, on the others with a RuntimeError.

        Raises:
            UserError: requests that do not go together.
        """
        everyone = self._together.begin(_described(request))
        at, n = self._together.group.rank, request.params.n
        before = sum(len(one["prompts"]) for one in everyone[:at]) * n
        own = slice(before, before + len(request.prompts) * n)
        try:
            _check_common(everyone, self._together.group.first)
            joined = _join(everyone, request)
            return _own_part(
                self._native.generate(replace(joined, on_token=_own_tokens(request.on_token, own))),
                own,
            )
        except BaseException as error:
            self._together.peers.leave()
            if hasattr(error, "partial"):
                error.partial = _own_part(error.partial, own)
            raise

    def release(self) -> None:
        self._native.release()


def _described(request: Request) -> dict[str, Any]:
    """What the other ranks need to know, JSON-able, with nothing left out that some may give."""
    params, prompts = request.params, request.prompts
    samples = len(prompts) * params.n
    return {
        "params": asdict(params),
        "stop_tokens": request.stop_tokens,
        "max_batch": request.max_batch,
        "kv_bytes": request.kv_bytes,
        "prompts": prompts,
        "sample_ids": request.sample_ids,
        "expected_lengths": list(request.expected_lengths),
        "max_new_tokens": list(request.max_new_tokens) or [params.max_new_tokens] * len(prompts),
        "drafts": [list(draft) for draft in request.drafts] or [[]] * samples,
    }


def _check_common(everyone: Sequence[dict[str, Any]], first: int) -> None:
    for at, theirs in enumerate(everyone):
        for name in _COMMON:
            if _plain(theirs[name]) != _plain(everyone[0][name]):
                raise UserError(
                    f"ranks that generate together ({SETTING}) must give equal {name}, but rank "
                    f"{first + at} has {theirs[name]} where rank {first} has {everyone[0][name]}"
                )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _join(everyone: Sequence[dict[str, Any]], request: Request) -> Request:
    """All prompts under one request; as many more sequences are decoded together."""
    expected = [_expected(one) for one in everyone]
    drafts = _chained(one["drafts"] for one in everyone)
    return replace(
        request,
        prompts=_chained(one["prompts"] for one in everyone),
        sample_ids=_chained(one["sample_ids"] for one in everyone),
        max_batch=request.max_batch * len(everyone),
        expected_lengths=_chained(expected) if any(map(any, expected)) else (),
        max_new_tokens=_chained(one["max_new_tokens"] for one in everyone),
        drafts=drafts if any(drafts) else (),
    )


def _expected(one: dict[str, Any]) -> list[float]:
    """One expected length a prompt; 0 where none is known."""
    return one["expected_lengths"] or [0.0] * len(one["prompts"])


def _chained(lists: Iterable[list[Any]]) -> list[Any]:
    return [item for items in lists for item in items]


def _own_part(result: dict[str, Any], own: slice) -> dict[str, Any]:
    columns = (*TOKEN_COLUMNS, "finish_reasons")
    return {**result, **{name: result[name][own] for name in columns}}


def _own_tokens(on_token: OnToken | None, own: slice) -> OnToken | None:
    if on_token is None:
        return None

    def tell(sample: int, token: int) -> None:
        if own.start <= sample < own.stop:
            on_token(sample - own.start, token)

    return tell
