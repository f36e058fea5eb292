"""A training step of a generated model in a process of its own: its peak beside what was planned.

``python -m tests.plan.measured FAMILY VARIANT ZERO_STAGE`` prints planned and measured bytes, net
of what the process held before the model was made: measured as resident memory, and by the counters
of torch's profiler, which see tensors alone.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import sys
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.profiler import ProfilerActivity, profile

from hybrid_engine.config import OptimizerConfig
from hybrid_engine.distributed.collectives import world_size
from hybrid_engine.engine.deepspeed_config import complete
from hybrid_engine.engine.passes import pack_pass
from hybrid_engine.engine.train_engine import TrainEngine
from hybrid_engine.models import CausalLM, DecoderSpec, LoRAConfig, RopeSpec, apply_lora
from hybrid_engine.plan import StepPlan, give_back_freed
from hybrid_engine.plan.activations import Activations, PassShape
from hybrid_engine.plan.models import model_size
from hybrid_engine.plan.training import Trained, Zero
from hybrid_engine.report.memory import KernelGauge

ROWS, LENGTH = 1024, 128
PLAIN = dict.fromkeys(("qkv_bias", "attn_out_bias", "mlp_bias"), True)
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {
        "vocab_size": 6000,
        "hidden_size": 320,
        "num_layers": 6,
        "heads": 8,
        "kv_heads": 4,
        "head_dim": 40,
        "intermediate_size": 900,
        "norm": "rms_norm",
        "positions": "rotary",
        "rope": RopeSpec(1e4, 40),
        "activation": "silu",
        "gated_mlp": True,
    },
    "gpt2": {
        "vocab_size": 9000,
        "hidden_size": 256,
        "num_layers": 8,
        "heads": 4,
        "kv_heads": 4,
        "head_dim": 64,
        "intermediate_size": 1024,
        "norm": "layer_norm",
        "positions": "learned",
        "activation": "gelu_tanh",
        **PLAIN,
    },
    "opt": {
        "vocab_size": 4000,
        "hidden_size": 448,
        "num_layers": 4,
        "heads": 7,
        "kv_heads": 7,
        "head_dim": 64,
        "intermediate_size": 1792,
        "norm": "layer_norm",
        "positions": "learned",
        "position_offset": 2,
        "activation": "relu",
        **PLAIN,
    },
}


def spec_of(family: str, **other: int) -> DecoderSpec:
    shape = SHAPES[family]
    width = shape["hidden_size"]
    spec = DecoderSpec(
        family=family, embed_dim=width, max_positions=512, norm_eps=1e-5, attention_scale=0.125,
        tied_head=True, **shape,
    )  # fmt: skip
    return dataclasses.replace(spec, **other)


def model_of(spec: DecoderSpec, variant: str) -> CausalLM:
    """`variant`: "all", "checkpointing" or "lora"."""
    model = CausalLM(spec)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02)
    if variant == "lora":
        apply_lora(model, LoRAConfig())
    model.gradient_checkpointing = variant == "checkpointing"
    return model


def planned(spec: DecoderSpec, variant: str, zero: Zero, scored: int) -> int:
    size = model_size(spec, "float32", "it", lora=LoRAConfig() if variant == "lora" else None)
    work = Activations(size, PassShape(ROWS, scored), checkpointing=variant == "checkpointing")
    trained = Trained("policy", work, zero, has_head=True, passes=True, knobs=())
    return StepPlan("sft", 0, tuple(trained.holdings())).peak("train")


def step(engine: TrainEngine) -> int:
    """Two passes and an optimizer step; returns the rows that are scored in a pass."""
    sequences = [[i % 200 for i in range(LENGTH)] for _ in range(ROWS // LENGTH)]
    part = pack_pass(sequences, [[(1, LENGTH)]] * len(sequences), list(range(len(sequences))))
    for _ in range(2):
        scores = engine(part.batch, part.rows, part.targets)
        engine.backward(-scores.logprobs.sum(), ROWS)
        del scores
    engine.step()
    return len(part.rows)


def tensors_held() -> int:
    """Bytes of all tensors that Python knows of, each storage once."""
    tensors = [found for found in gc.get_objects() if isinstance(found, torch.Tensor)]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def most_allocated(work: Callable[[], object]) -> int:
    """Most bytes that torch's allocator gave out at once during `work`, by torch's profiler."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(accumulate(nbytes for _, nbytes in changes))


def measure(family: str, variant: str, stage: str) -> dict[str, int]:
    give_back_freed()
    settings = {"zero_optimization": {"stage": int(stage)}}

    def engine_of(spec: DecoderSpec) -> TrainEngine:
        optimizer = OptimizerConfig(schedule="constant", warmup_ratio=0.0)
        return TrainEngine(model_of(spec, variant), optimizer, 1, settings)

    step(engine_of(spec_of(family, num_layers=1, vocab_size=256)))  # loads what is loaded once
    gc.collect()
    before = psutil.Process().memory_info().rss
    spec = spec_of(family)
    engine, gauge = engine_of(spec), KernelGauge()
    step(engine)  # moments are there from now on
    gauge.reset()
    scored = step(engine)
    measured = gauge.peak() - before
    zero = Zero.of(complete(settings, torch.float32, world_size(), 1.0), world_size())
    return {
        "planned": planned(spec, variant, zero, scored),
        "measured": measured,
        "profiled": tensors_held() + most_allocated(lambda: step(engine)),
    }


def on_ranks(directory: str, arguments: str = "") -> dict[str, dict[str, int]]:
    """For `tests.distributed.ranks`: the stages that need several."""
    family, variant, stage = Path(directory, "what").read_text().split()
    return measure(family, variant, stage)


if __name__ == "__main__":
    print(json.dumps(measure(*sys.argv[1:])))
