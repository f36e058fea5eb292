"""The operators in plain torch: the test oracle (in float64), the baseline, and the fallback."""

from hybrid_kernels.reference.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "layer_norm",
    "rms_norm",
]
