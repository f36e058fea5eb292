"""The operators in plain torch: the test oracle (in float64), the baseline, and the fallback."""

from hybrid_kernels.reference.activation import bias_activation, gated_activation
from hybrid_kernels.reference.attention import attention, kv_append, paged_attention, rope
from hybrid_kernels.reference.linear import linear
from hybrid_kernels.reference.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm

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
