"""DeepSpeed's checkpoint files, read without running what a pickle may say.

DeepSpeed loads its files with `weights_only=False`. They hold tensors, plain containers and the few
classes below, so torch's restricted unpickler suffices: a tampered file is an error, not a program.
"""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

_CLASSES = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]


class WeightsOnlyCheckpointEngine(TorchCheckpointEngine):
    """Writes as its parent does; reads tensors and known classes only."""

    def load(self, path: str, map_location: Any = None) -> Any:
        with torch.serialization.safe_globals(_CLASSES):
            return torch.load(path, map_location=map_location, weights_only=True)
