"""The operators: differentiable functions that run a native kernel where there is one."""

from hybrid_kernels.ops.activation import bias_activation, gated_activation
from hybrid_kernels.ops.attention import attention, kv_append, paged_attention, rope
from hybrid_kernels.ops.linear import linear
from hybrid_kernels.ops.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "attention",
    "bias_activation",
    "gated_activation",
    "kv_append",
    "layer_norm",
    "linear",
    "paged_attention",
    "rms_norm",
    "rope",
]
