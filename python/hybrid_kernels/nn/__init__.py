"""Thin modules over the operators: parameters and a forward, no policy."""

from hybrid_kernels.nn.linear import Linear
from hybrid_kernels.nn.norm import LayerNorm, RMSNorm

__all__ = ["LayerNorm", "Linear", "RMSNorm"]
