"""Where generation reads a module's parameters: in place, in place with adapters merged,
dequantized, or gathered.

All of them have ``whole()``, inside which rollouts happen, ``tensors()``, and a ``gate`` where the
program waits for what is still on its way.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from operator import attrgetter
from typing import Any

from torch import Tensor

from hybrid_engine.distributed.collectives import world_size
from hybrid_engine.distributed.device import compute_device
from hybrid_engine.engine.gather import GatheredWeights
from hybrid_engine.engine.gather_plan import shard_of
from hybrid_engine.engine.slices import Slices
from hybrid_engine.engine.train_engine import TrainEngine
from hybrid_engine.errors import UserError
from hybrid_engine.models import CausalLM, ForeignCausalLM, adapters_merged, is_quantized
from hybrid_engine.models.quantized import weight_name
from hybrid_kernels import native_available

Model = CausalLM | ForeignCausalLM


class OwnWeights:
    """A module's parameters where they lie: nothing is gathered, nothing is waited for.

    Args:
        slices: the rows to read of each; None: all of them.
    """

    gate = None

    def __init__(self, model: Model, slices: Slices | None = None) -> None:
        self._model = model
        self._slices = slices

    def tensors(self) -> dict[str, Tensor | list[Tensor]]:
        """Take them anew for every rollout: DeepSpeed re-points parameters into its own buffers."""
        parameters: Iterable[tuple[str, Any]] = self._model.named_parameters(remove_duplicate=False)
        return {name: self._cut(name, self._storage(name, value)) for name, value in parameters}

    def _cut(self, name: str, parameter: Tensor) -> Tensor | list[Tensor]:
        return parameter if self._slices is None else self._slices.cut(name, parameter)

    def _storage(self, name: str, parameter: Any) -> Tensor:
        """Under ZeRO-3 a parameter may be away; a single rank's shard of it is all of it."""
        if not hasattr(parameter, "ds_tensor"):
            return parameter.detach()
        return shard_of(name, parameter, 1).view(parameter.ds_shape)

    def whole(self) -> AbstractContextManager[None]:
        return nullcontext()


class MergedWeights(OwnWeights):
    """A module's parameters with its adapters merged into them, which DeepSpeed gathers first."""

    def __init__(
        self, model: Model, train_engine: TrainEngine | None, slices: Slices | None = None
    ) -> None:
        super().__init__(model, slices)
        self._train_engine = train_engine

    def _storage(self, name: str, parameter: Any) -> Tensor:
        return parameter.detach()

    @contextmanager
    def whole(self) -> Iterator[None]:
        engine = self._train_engine
        with engine.full_parameters() if engine else nullcontext(), adapters_merged(self._model):
            yield


class DequantizedWeights(OwnWeights):
    """A module's parameters, of which quantized ones are dequantized for as long as the phase
    lasts: the very values that the training forward computes with.
    """

    def __init__(self, model: Model, slices: Slices | None = None) -> None:
        super().__init__(model, slices)
        self._whole: dict[str, Tensor] = {}

    def tensors(self) -> dict[str, Tensor | list[Tensor]]:
        parameters = self._model.named_parameters(remove_duplicate=False)
        plain = {name: value.detach() for name, value in parameters if not weight_name(name)}
        return {name: self._cut(name, value) for name, value in (plain | self._whole).items()}

    @contextmanager
    def whole(self) -> Iterator[None]:
        weights = (weight_name(name) for name, _ in self._model.named_parameters())
        try:
            for name in filter(None, weights):
                self._whole[name] = attrgetter(name)(self._model).detach()
            yield
        finally:
            self._whole.clear()


WeightSource = OwnWeights | GatheredWeights


def weights_of(
    model: Model,
    train_engine: TrainEngine | None,
    merge_adapters: bool,
    slices: Slices | None = None,
    *,
    weight_bytes: int = 0,
    kv_bytes: int = 0,
) -> WeightSource:
    """What serves a model in its ZeRO stage; under stage 3 every rank must call this. The bytes are
    those of `GatheredWeights`.

    Raises:
        UserError: a limit where weights are gathered whole whatever they take.
    """
    in_shards = train_engine is not None and train_engine.zero_stage == 3 and world_size() > 1
    if in_shards and weight_bytes:
        check_can_stream(merge_adapters)
    if merge_adapters:
        return MergedWeights(model, train_engine, slices)
    if is_quantized(model):
        return DequantizedWeights(model, slices)
    if in_shards and isinstance(model, CausalLM) and native_available():
        gradients = train_engine.gradient_memory() if train_engine else None
        return GatheredWeights(model, slices, weight_bytes, kv_bytes, gradients)
    return OwnWeights(model, slices)


def check_can_stream(merge_adapters: bool) -> None:
    """Raises UserError where gathered weights cannot keep to a limit."""
    if merge_adapters:
        raise UserError(
            "weight_bytes cannot limit weights that adapters are merged into, because under ZeRO-3 "
            "they are gathered whole; leave out merge_adapters or weight_bytes"
        )
    if compute_device().type != "cpu":
        raise UserError(
            "weight_bytes: on a GPU all layers stay gathered while generating, and none can be "
            "streamed; leave it out"
        )
