"""Short ways to a rollout, and to comparing two of them bit for bit."""

from __future__ import annotations

import random
from typing import Any

from hybrid_engine.engine.program import ProgramBuilder, run_program
from hybrid_engine.engine.rollout import TOKEN_COLUMNS, Rollout
from hybrid_engine.engine.sampling import SamplingParams
from hybrid_engine.models import CausalLM

COLUMNS = (*TOKEN_COLUMNS, "finish_reasons")
# Arguments of DecodeProgram.generate for one greedy sample.
ONE_GREEDY: dict[str, Any] = {
    "samples_per_prompt": 1, "max_new_tokens": 8, "temperature": 0.0, "top_k": 0, "top_p": 1.0,
    "seed": 0, "sample_ids": [0], "stop_tokens": [],
}  # fmt: skip


def random_prompts(
    count: int, seed: int = 0, longest: int = 90, vocab: int = 256
) -> list[list[int]]:
    rng = random.Random(seed)
    lengths = [1, 63, 64, 65] + [rng.randrange(1, longest) for _ in range(count)]
    return [[rng.randrange(vocab) for _ in range(length)] for length in lengths[:count]]


def run(
    model: CausalLM,
    prompts: list[list[int]],
    params: SamplingParams,
    stop_tokens: tuple[int, ...] = (),
    sample_ids: list[int] | None = None,
    **options: Any,
) -> Rollout:
    """One rollout by the native program alone. ``options`` go to ``DecodeProgram.generate``."""
    builder = ProgramBuilder(model)
    program = builder.build()
    builder.bind(program, model.spec.max_positions)
    ids = list(range(len(prompts) * params.n)) if sample_ids is None else sample_ids
    result = run_program(program, prompts, params, list(stop_tokens), sample_ids=ids, **options)
    return Rollout(prompts=prompts, n=params.n, **result)


def assert_same(a: Rollout, b: Rollout) -> None:
    """Equal tokens, and statistics equal bit for bit."""
    for name in COLUMNS:
        assert getattr(a, name) == getattr(b, name), name
