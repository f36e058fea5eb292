"""Which layers take adapters, by the names that transformers and PEFT give them.

PEFT adapts the layers of transformers' module tree. Some of ours are several of those fused (q|k|v,
gate|up): each keeps a pair of factors of its own there. Where transformers has one fused layer
(GPT-2's c_attn), so does the adapter.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from hybrid_engine.errors import UserError

from .families import family_of_spec
from .spec import DecoderSpec

ALL_LINEAR = "all-linear"
_ADAPTABLE = tuple(f".{name}.weight" for name in ("qkv", "attn_out", "mlp_in", "mlp_out"))


class Place(NamedTuple):
    """One layer of transformers', as PEFT adapts it, and where its factors lie in ours."""

    module: str  # such as model.layers.0.self_attn.q_proj
    linear: str  # such as decoder.blocks.0.qkv
    part: int  # which of the linear's pairs
    outputs: tuple[int, ...]  # of each of the linear's pairs; empty: one pair for all
    transposed: bool  # transformers keeps the weight as [in, out]


def adaptable(spec: DecoderSpec) -> list[Place]:
    """The linear layers of every block, in the order of the family's table."""
    family = family_of_spec(spec)
    return [
        Place(
            family.prefix + source.removesuffix(".weight"),
            "decoder." + entry.name.removesuffix(".weight"),
            part,
            entry.rows,
            entry.transposed,
        )
        for entry in family.entries(spec)
        if entry.name.endswith(_ADAPTABLE)
        for part, source in enumerate(entry.sources)
    ]


def select(places: Sequence[Place], targets: Iterable[str]) -> list[Place]:
    """The places that ``targets`` name, by PEFT's rules: a whole name, the end of one after a dot,
    or a regular expression of a whole name. "all-linear" names them all.

    Raises:
        UserError: a target that names none.
    """
    targets = list(targets)
    for target in targets:
        if target != ALL_LINEAR and not any(_names(target, place) for place in places):
            raise UserError(
                f"LoRA target {target!r} is no linear layer of this model's blocks; give "
                f"{ALL_LINEAR}, some of {', '.join(_leaves(places))}, or a regular "
                f"expression of whole names such as {places[0].module}"
            )
    return [p for p in places if ALL_LINEAR in targets or any(_names(t, p) for t in targets)]


def target_modules(places: Sequence[Place], chosen: Iterable[Place]) -> list[str]:
    """What ``adapter_config.json`` calls the chosen places: the shortest names that PEFT's rule
    takes for them and for no other.
    """
    taken = {place.module for place in chosen}
    others = [place for place in places if place.module not in taken]
    names: dict[str, None] = {}
    for module in sorted(taken):
        parts = module.split(".")
        candidates = [".".join(parts[-n:]) for n in (1, 2)]
        unique = [c for c in candidates if not any(_names(c, other) for other in others)]
        names[(unique or [module])[0]] = None
    return sorted(names)


def _names(target: str, place: Place) -> bool:
    if place.module == target or place.module.endswith("." + target):
        return True
    try:
        return re.fullmatch(target, place.module) is not None
    except re.error:
        return False


def _leaves(places: Iterable[Place]) -> list[str]:
    return list(dict.fromkeys(place.module.rpartition(".")[2] for place in places))
