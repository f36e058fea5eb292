"""The declarative description of a decoder: every fact that its two executors need.

The training module (``decoder.py``) and the C++ generation program read the same
``DecoderSpec``, so a family is described once and neither executor knows its name.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

NORMS = ("rms_norm", "layer_norm")
NORM_POSITIONS = ("pre", "post")
POSITIONS = ("rotary", "learned", "alibi")
ACTIVATIONS = ("relu", "silu", "gelu_tanh", "gelu_erf")
ROPE_KINDS = ("default", "linear", "llama3", "yarn")


class UnsupportedFamily(ValueError):
    """The native decoder cannot express this model; the message says which feature is missing."""


@dataclass(frozen=True)
class RopeSpec:
    """Rotary embedding: which frequencies, and how they are stretched beyond the trained context.

    Fields after ``kind`` matter only to the kinds named beside them.
    """

    theta: float
    rotary_dim: int  # leading dimensions of a head that rotate
    kind: str = "default"
    factor: float = 1.0  # linear, llama3, yarn: context extension
    original_max_positions: int = 0  # llama3, yarn: context before the extension
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn: round the ramp's ends to whole dimensions
    attention_factor: float = 1.0  # yarn: cos and sin are multiplied by it

    def __post_init__(self) -> None:
        _one_of("rope kind", self.kind, ROPE_KINDS)
        if self.rotary_dim <= 0 or self.rotary_dim % 2:
            raise ValueError(f"rotary_dim must be positive and even, got {self.rotary_dim}")


@dataclass(frozen=True)
class DecoderSpec:
    """A causal decoder. Sizes in elements; see ``docs/design.md`` for the parameter names."""

    family: str
    vocab_size: int
    hidden_size: int
    embed_dim: int  # width of the token embedding; project_in/project_out exist when it differs
    num_layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    max_positions: int
    norm: str  # one of NORMS
    norm_eps: float
    positions: str  # one of POSITIONS
    activation: str  # one of ACTIVATIONS
    attention_scale: float
    norm_position: str = "pre"  # "post": normalise after the residual addition (OPT-350m)
    final_norm: bool = True
    position_offset: int = 0  # learned positions: row of position zero
    gated_mlp: bool = False  # act(gate) * up, gate|up stacked in mlp_in
    qkv_bias: bool = False
    attn_out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMS norm of every query and key head before rotation
    tied_head: bool = False
    sliding_window: int = 0  # keys visible to a query, itself included; 0 means all
    rope: RopeSpec | None = None

    def __post_init__(self) -> None:
        _one_of("norm", self.norm, NORMS)
        _one_of("norm_position", self.norm_position, NORM_POSITIONS)
        _one_of("positions", self.positions, POSITIONS)
        _one_of("activation", self.activation, ACTIVATIONS)
        if self.heads % self.kv_heads:
            raise ValueError(
                f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})"
            )
        if (self.rope is not None) != (self.positions == "rotary"):
            raise ValueError("rope must be given exactly when positions is 'rotary'")
        if self.norm_position == "post" and self.final_norm:
            raise ValueError("a post-norm decoder ends normalised: final_norm must be False")

    @property
    def q_size(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def qkv_splits(self) -> tuple[int, int, int]:
        """Rows of q, k and v in ``qkv.weight``."""
        return (self.q_size, self.kv_size, self.kv_size)

    @property
    def mlp_in_splits(self) -> tuple[int, ...]:
        """Rows of gate and up (or of the one projection) in ``mlp_in.weight``."""
        return (self.intermediate_size,) * (2 if self.gated_mlp else 1)

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and one nested ``rope`` dict (or None), for the C++ program."""
        return asdict(self)


def _one_of(what: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{what} must be one of {', '.join(allowed)}; got {value!r}")
