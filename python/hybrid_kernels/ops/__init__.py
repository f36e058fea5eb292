"""The operators: differentiable functions that run a native kernel where there is one."""

from hybrid_kernels.ops._dispatch import activations
from hybrid_kernels.ops.activation import bias_activation, gated_activation
from hybrid_kernels.ops.attention import (
    attention,
    kv_append,
    paged_attention,
    rope,
    rope_append,
)
from hybrid_kernels.ops.gather import unshard_
from hybrid_kernels.ops.head import linear_sample, linear_token_logprobs
from hybrid_kernels.ops.linear import linear, linear_activation, linear_recomputed, matmul
from hybrid_kernels.ops.lora import MergeRecord, lora_merge, lora_merge_, lora_unmerge_
from hybrid_kernels.ops.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from hybrid_kernels.ops.rlhf import (
    PolicyStats,
    ValueStats,
    combine_moments,
    gae,
    masked_moments,
    masked_whiten,
    ppo_policy_loss,
    ppo_value_loss,
)
from hybrid_kernels.ops.sampling import Sample, sample, token_logprobs

__all__ = [
    "MergeRecord",
    "PolicyStats",
    "Sample",
    "ValueStats",
    "activations",
    "add_layer_norm",
    "add_rms_norm",
    "attention",
    "bias_activation",
    "combine_moments",
    "gae",
    "gated_activation",
    "kv_append",
    "layer_norm",
    "linear",
    "linear_activation",
    "linear_recomputed",
    "linear_sample",
    "linear_token_logprobs",
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
