"""The parameters of a trained module as its ranks hold them, and as a whole: for saving and for
averaging.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from hybrid_engine.distributed.collectives import all_gather_tensor, is_main
from hybrid_engine.distributed.parts import Part
from hybrid_engine.engine.master_state import shard_of
from hybrid_engine.engine.train_state import forget_secondary_shards


class HeldParameters:
    """Of a module under a DeepSpeed engine.

    Attributes:
        zero_stage: that of the engine; under 3 every rank holds flat shards.
    """

    def __init__(self, module: nn.Module, engine: Any, zero_stage: int) -> None:
        self.module = module
        self.zero_stage = zero_stage
        self._engine = engine

    def local_parameters(self) -> dict[str, Tensor]:
        """What this rank holds of each trainable parameter: all of it, or its flat ZeRO-3 shard."""
        return {
            name: getattr(p, "ds_tensor", p).detach()
            for name, p in self.module.named_parameters()
            if p.requires_grad
        }

    @contextmanager
    def full_parameters(self) -> Iterator[nn.Module]:
        """The module with every parameter whole, on every rank; ZeRO-3 gathers them all at once.

        For reading: changes are lost under ZeRO-3.
        """
        with self._gathered(list(self.module.parameters())):
            yield self.module

    @contextmanager
    def parameters_replaced(self, local: Mapping[str, Tensor]) -> Iterator[None]:
        """Show other values (an average) in place of the trained ones, for saving; then restore
        them.

        `local` is keyed and shaped like :meth:`local_parameters`. Do not train inside.
        """
        held = self.local_parameters()
        kept = {name: held[name].clone() for name in local}
        try:
            self._overwrite(local)
            yield
        finally:
            self._overwrite(kept)

    @torch.no_grad()
    def _overwrite(self, local: Mapping[str, Tensor]) -> None:
        for name, parameter in self.module.named_parameters():
            if name not in local:
                continue
            getattr(parameter, "ds_tensor", parameter).detach().copy_(local[name])
            if (
                self.zero_stage == 3 and parameter.numel() > 0
            ):  # small: ZeRO-3 keeps it gathered too
                shape = parameter.ds_shape  # type: ignore[attr-defined]
                whole = all_gather_tensor(local[name]).flatten()
                parameter.detach().copy_(whole[: math.prod(shape)].view(shape))
        forget_secondary_shards(self._engine.optimizer)

    def gathered_state_dict(self) -> dict[str, Tensor]:
        """Every parameter and buffer on rank 0's CPU, gathered one at a time; empty on other ranks.

        Tied parameters share their tensor; without ZeRO-3 on a CPU the tensors are the live ones.
        """
        copies: dict[int, Tensor] = {}
        state: dict[str, Tensor] = {}
        for name, parameter in self.module.named_parameters(remove_duplicate=False):
            if id(parameter) not in copies:
                with self._gathered([parameter]):
                    if is_main():
                        value = parameter.detach().cpu()
                        copies[id(parameter)] = value.clone() if self.zero_stage == 3 else value
                    else:
                        copies[id(parameter)] = torch.empty(0)
            if is_main():
                state[name] = copies[id(parameter)]
        if is_main():
            state |= {name: buffer.detach().cpu() for name, buffer in self.module.named_buffers()}
        return state

    def _gathered(self, parameters: list[nn.Parameter]) -> AbstractContextManager[Any]:
        if self.zero_stage < 3:
            return nullcontext()
        import deepspeed

        return deepspeed.zero.GatheredParameters(parameters, modifier_rank=None)

    def parts(self, values: Mapping[str, Tensor]) -> dict[str, Part]:
        """`values` (an average), keyed and shaped like :meth:`local_parameters`, for a checkpoint
        to write or to fill.
        """
        parameters = dict(self.module.named_parameters())
        return {
            name: Part(0, value.view(-1), everywhere=True)
            if self.zero_stage < 3
            else _shard(parameters[name], value)
            for name, value in values.items()
        }


def _shard(parameter: nn.Parameter, values: Tensor) -> Part:
    start, count = shard_of(parameter)
    return Part(start, values[:count])
