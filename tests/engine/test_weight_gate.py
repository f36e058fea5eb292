"""Generating from weights that arrive part by part."""

from __future__ import annotations

import _thread
import signal
import threading

import pytest
import torch

from hybrid_engine.engine.program import ProgramBuilder, run_program
from hybrid_engine.engine.sampling import SamplingParams
from hybrid_engine.models import CausalLM
from hybrid_kernels import native_module

from .rollouts import random_prompts

PARAMS = SamplingParams(max_new_tokens=6)
PROMPTS = random_prompts(3)


def bound(model: CausalLM, gate):
    builder = ProgramBuilder(model)
    builder.weights.gate = gate
    program = builder.build()
    builder.bind(program, model.spec.max_positions)
    return program


def generate(program) -> dict:
    return run_program(program, PROMPTS, PARAMS, [], sample_ids=[0, 1, 2])


def parts_of(model: CausalLM) -> list[list[torch.Tensor]]:
    """Parameters before, in and behind the blocks, as the gate numbers them."""
    decoder = model.decoder
    before = [p for module in decoder.embedding_modules() for p in module.parameters()]
    blocks = [list(block.parameters()) for block in decoder.blocks]
    known = {id(p) for part in (before, *blocks) for p in part}
    return [before, *blocks, [p for p in model.parameters() if id(p) not in known]]


def test_nothing_is_read_before_it_has_arrived(model: CausalLM) -> None:
    """Every part is NaN until just before it is announced, and the result is the usual one."""
    expected = generate(bound(model, None))
    gate = native_module().WeightGate()
    program = bound(model, gate)
    parts = [[p.detach() for p in part] for part in parts_of(model)]
    kept = [[p.clone() for p in part] for part in parts]
    for part in parts:
        for parameter in part:
            parameter.fill_(torch.nan)

    def bring() -> None:
        try:
            for number, (part, values) in enumerate(zip(parts, kept, strict=True)):
                for parameter, value in zip(part, values, strict=True):
                    parameter.copy_(value)
                gate.open(number)
        except Exception as error:  # or generate() would wait for ever
            gate.fail(f"the test's own thread: {error}")

    thread = threading.Thread(target=bring)
    threading.Timer(0.05, thread.start).start()  # generate() gets to the gate first
    found = generate(program)
    thread.join()
    assert gate.waited_seconds > 0
    assert (found["tokens"], found["logprobs"]) == (expected["tokens"], expected["logprobs"])


def test_a_failure_reaches_whoever_waits(llama: CausalLM) -> None:
    gate = native_module().WeightGate()
    program = bound(llama, gate)
    gate.open(1)
    threading.Timer(0.05, gate.fail, ["rank 1 is gone"]).start()
    with pytest.raises(RuntimeError, match="^rank 1 is gone$"):
        generate(program)
    with pytest.raises(RuntimeError, match="^rank 1 is gone$"):
        generate(program)
    gate.close()
    for part in range(llama.spec.num_layers + 2):
        gate.open(part)
    assert gate.waited_seconds == 0
    assert len(generate(program)["tokens"]) == len(PROMPTS)


def test_ctrl_c_ends_the_wait(llama: CausalLM) -> None:
    program = bound(llama, native_module().WeightGate())
    # A background job starts with it ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Timer(0.05, _thread.interrupt_main).start()
    with pytest.raises(KeyboardInterrupt):
        generate(program)
    signal.signal(signal.SIGINT, before)
    program.unbind()  # the call has ended: no "generate() is running"
