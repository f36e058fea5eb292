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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pinned", [(), (2,)])
def test_streamed_parts_are_read_in_their_turn(model: CausalLM, dtype, pinned) -> None:
    """A block is NaN except from when it is announced until the next one takes its place: as in a
    ring of one place, that is given away as soon as the gate allows."""
    model.to(dtype)
    expected = generate(bound(model, None))
    blocks = [number for number in range(1, model.spec.num_layers + 1) if number not in pinned]
    gate = native_module().WeightGate(set(blocks))
    program = bound(model, gate)
    for number in {*range(model.spec.num_layers + 2)} - {*blocks}:
        gate.open(number)
    parts = {number: [p.detach() for p in parts_of(model)[number]] for number in blocks}
    kept = {number: [p.clone() for p in part] for number, part in parts.items()}
    rounds = 0

    def fill(number: int, values: list[torch.Tensor]) -> None:
        for parameter, value in zip(parts[number], values, strict=True):
            parameter.copy_(value)

    def bring() -> None:
        nonlocal rounds
        last = blocks[-1]
        nothing = {number: [p * torch.nan for p in part] for number, part in kept.items()}
        for number in blocks:
            fill(number, nothing[number])
        while reader := gate.reader(1.0):
            gate.begin_round(reader)
            rounds += 1
            for number in blocks:
                gate.await_release(last)
                fill(last, nothing[last])
                fill(number, kept[number])
                gate.open(number)
                last = number
        for number in blocks:
            fill(number, kept[number])

    thread = threading.Thread(target=bring)
    thread.start()
    found = generate(program)
    thread.join()
    assert (found["tokens"], found["logprobs"]) == (expected["tokens"], expected["logprobs"])
    # One of a single block may be there ahead of a pass that never comes, and another one begun.
    assert 0 <= rounds - found["counters"]["passes"] <= 2


def test_what_comes_while_nobody_reads_is_dropped() -> None:
    gate = native_module().WeightGate({1, 2})
    gate.begin_round(gate.reader(0.0))
    gate.open(1)
    gate.await_release(1)  # nobody has it to release
    gate.enter(7)
    gate.open(2)  # of a round that began before the rollout did
    gate.await_release(2)
    gate.begin_round(gate.reader(0.0))
    gate.open(1)
    assert gate.delivering
    gate.leave()
    assert not gate.delivering
    gate.await_release(1)  # a rollout that ended in between holds nothing back
    gate.enter(8)
    gate.begin_round(7)  # sent for the one before
    assert not gate.delivering


def test_a_failure_reaches_whoever_waits(llama: CausalLM) -> None:
    gate = native_module().WeightGate()
    program = bound(llama, gate)
    gate.open(0)
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
