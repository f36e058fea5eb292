"""Ctrl-C and exceptions of callbacks: the call ends soon, and what was finished is kept."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hybrid_engine.engine import HybridEngine, SamplingParams, partial_rollout
from hybrid_engine.engine.rollout import Rollout
from hybrid_engine.models import CausalLM
from tests.engine.rollouts import COLUMNS, random_prompts

PROMPTS = random_prompts(8)
# Half of the responses are short: they are finished when the long ones are interrupted.
LIMITS = [3, 200] * 4
PARAMS = SamplingParams(n=2, max_new_tokens=200, ignore_eos=True)


class Stop(Exception):
    pass


def stop_after(tokens: int, error: BaseException):  # type: ignore[no-untyped-def]
    seen = 0

    def on_token(sample: int, token: int) -> None:
        nonlocal seen
        seen += 1
        if seen == tokens:
            raise error

    return on_token


def whole(engine: HybridEngine) -> Rollout:
    return engine.generate(PROMPTS, PARAMS, max_new_tokens=LIMITS)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("error", [Stop("enough"), KeyboardInterrupt(), ValueError("a bug")])
def test_finished_samples_go_with_the_exception(
    llama: CausalLM, error: BaseException, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = HybridEngine(llama, None)
    expected = whole(engine)
    if not native:
        monkeypatch.setattr("hybrid_engine.engine.hybrid.native_available", lambda: False)
    with pytest.raises(type(error)) as caught:
        engine.generate(PROMPTS, PARAMS, max_new_tokens=LIMITS, on_token=stop_after(150, error))
    assert caught.value is error
    partial = partial_rollout(error)
    assert partial is not None
    assert partial.samples == [0, 1, 4, 5, 8, 9, 12, 13]
    assert partial.rollout.n == 1
    for name in COLUMNS:
        finished = [getattr(expected, name)[i] for i in partial.samples]
        assert getattr(partial.rollout, name) == finished, name
    assert partial.rollout.prompts == [PROMPTS[i // 2] for i in partial.samples]


def test_nothing_finished_is_an_empty_rollout(llama: CausalLM) -> None:
    error = Stop()
    with pytest.raises(Stop):
        HybridEngine(llama, None).generate(PROMPTS, PARAMS, on_token=stop_after(1, error))
    partial = partial_rollout(error)
    assert partial is not None
    assert partial.samples == []
    assert len(partial.rollout) == 0


def test_an_exception_from_elsewhere_has_no_rollout() -> None:
    assert partial_rollout(ValueError("of another call")) is None


def test_the_engine_goes_on_after_an_interruption(llama: CausalLM) -> None:
    engine = HybridEngine(llama, None)
    expected = whole(engine)
    with engine.generation():
        with pytest.raises(Stop):
            engine.generate(PROMPTS, PARAMS, on_token=stop_after(100, Stop()))
        again = engine.generate(PROMPTS, PARAMS, max_new_tokens=LIMITS)
    assert again.tokens == expected.tokens


SCRIPT = """
import signal, sys
from hybrid_engine.engine import HybridEngine, SamplingParams, partial_rollout

signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts with it ignored
engine = HybridEngine.from_pretrained(sys.argv[1], max_batch=4)
params = SamplingParams(max_new_tokens=400, ignore_eos=True)
limits = [2, 2, 2, 2] + [400] * 4000

def on_progress(done, total, tokens):
    if done >= 4:
        print("ready", flush=True)

try:
    prompts = [[1, 2, 3]] * len(limits)
    engine.generate(prompts, params, max_new_tokens=limits, on_progress=on_progress)
except KeyboardInterrupt as error:
    partial = partial_rollout(error)
    print(partial.samples[:4], len(partial.samples) < 4004, flush=True)
    sys.exit(130)
"""


def test_ctrl_c_ends_a_long_rollout(tiny_directories: dict[str, Path]) -> None:
    """SIGINT while the C++ loop runs: 4,000 responses of 400 tokens would take minutes."""
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tiny_directories["llama"])],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert output.splitlines()[-1] == "[0, 1, 2, 3] True"
