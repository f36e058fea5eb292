"""The operators: differentiable functions that run a native kernel where there is one."""

from hybrid_kernels.ops.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "layer_norm",
    "rms_norm",
]
