"""The operators in plain torch: the test oracle (in float64), the baseline, and the fallback."""

from hybrid_kernels.reference.activation import activate, bias_activation, gated_activation
from hybrid_kernels.reference.attention import (
    attention,
    kv_append,
    paged_attention,
    rope,
    rope_append,
)
from hybrid_kernels.reference.gather import unshard_
from hybrid_kernels.reference.linear import linear, matmul
from hybrid_kernels.reference.lora import lora_delta, lora_merge, lora_merge_, lora_unmerge_
from hybrid_kernels.reference.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from hybrid_kernels.reference.rlhf import (
    gae,
    masked_moments,
    masked_whiten,
    ppo_policy_loss,
    ppo_value_loss,
)
from hybrid_kernels.reference.sampling import kept_threshold, sample, token_logprobs

__all__ = [
    "activate",
    "add_layer_norm",
    "add_rms_norm",
    "attention",
    "bias_activation",
    "gae",
    "gated_activation",
    "kept_threshold",
    "kv_append",
    "layer_norm",
    "linear",
    "lora_delta",
    "lora_merge",
    "lora_merge_",
    "lora_unmerge_",
    "masked_moments",
    "masked_whiten",
    "matmul",
    "paged_attention",
    "ppo_policy_loss",
    "ppo_value_loss",
    "rms_norm",
    "rope",
    "rope_append",
    "sample",
    "token_logprobs",
    "unshard_",
]
