"""What a rollout says it needs is what it takes, and it gives everything back."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc"
)

# The growth of the process's peak from before the model exists: weights, cache and scratch, and
# nothing else. A first rollout of another model has loaded and warmed up whatever is loaded once.
COMMON = """
import sys
import torch
from hybrid_engine.engine import SamplingParams
from hybrid_engine.models import CausalLM, DecoderSpec, RopeSpec
from tests.engine.rollouts import run

def status(field):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024

def model_of(vocab, width, layers, heads, head_dim):
    model = CausalLM(DecoderSpec(
        family="llama", vocab_size=vocab, hidden_size=width, embed_dim=width, num_layers=layers,
        heads=heads, kv_heads=heads, head_dim=head_dim, intermediate_size=4 * width,
        max_positions=512, norm="rms_norm", norm_eps=1e-5, positions="rotary",
        rope=RopeSpec(1e4, head_dim), activation="silu", gated_mlp=True, attention_scale=0.125,
    ))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.01)
    return model
"""

DECLARED = """
def rollout(layers, samples, kv_blocks=0):
    model = model_of(4096, 256, layers, heads=8, head_dim=64)
    block = layers * 8 * 2 * 64 * 64 * 4
    # 64 tokens and 256 new ones that are fed fill five blocks.
    return run(model, [[i + 1] * 64 for i in range(samples)], SamplingParams(max_new_tokens=257),
               max_batch=samples, kv_bytes=kv_blocks * block).counters

torch.set_num_threads(2)
rollout(1, 2)
"""

# Every logit is the same, so that top-p looks into every block of the vocabulary, for every row.
SAMPLER = """
def rollout(samples, vocab):
    params = SamplingParams(max_new_tokens=4, top_p=0.99)
    model = model_of(vocab, 64, 1, heads=1, head_dim=8)
    return run(model, [[1, 2, 3, 4]] * samples, params, max_batch=samples).counters

torch.set_num_threads(2)
rollout(2, 64)
"""

MEASURE = """
open("/proc/self/clear_refs", "w").write("5")  # the peak starts again from here
before = status("VmRSS")
counters = rollout(*map(int, sys.argv[1:]))
names = ("declared_bytes", "weight_bytes", "peak_blocks", "preemptions")
print(status("VmHWM") - before, *(counters[name] for name in names))
"""

LEAK = """
import sys
import pytest
from hybrid_engine.engine import HybridEngine, SamplingParams

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

class Stop(Exception):
    pass

def stop(sample, token):
    raise Stop

engine = HybridEngine.from_pretrained(sys.argv[1], max_batch=3, kv_bytes=10 * 32768)
prompts = [[1, 2, 3], [4] * 70, [5]]
drafts = None
for i in range(1200):
    if i == 200:
        before = resident()
    params = SamplingParams(n=2, max_new_tokens=8, seed=i)
    if i % 10 == 0:
        with pytest.raises(Stop):
            engine.generate(prompts, params, on_token=stop)
    drafts = engine.generate(prompts, params, drafts=drafts).tokens
print(resident() - before)
"""


def measure(script: str, *arguments: object) -> list[int]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return [int(word) for word in done.stdout.split()]


@pytest.mark.parametrize(("samples", "kv_blocks"), [(16, 0), (16, 56)], ids=["whole", "preempting"])
def test_peak_memory_is_the_declared_sum(samples: int, kv_blocks: int) -> None:
    script = COMMON + DECLARED + MEASURE
    peak, declared, _, blocks, preemptions = measure(script, 6, samples, kv_blocks)
    assert blocks == (kv_blocks or 5 * samples)
    assert (preemptions > 0) == (kv_blocks > 0)
    assert declared > 100e6
    assert peak == pytest.approx(declared, rel=0.05)


def test_what_the_sampler_works_with_is_declared() -> None:
    peak, declared, weights, *_ = measure(COMMON + SAMPLER + MEASURE, 256, 16384)
    assert declared > 2 * weights  # the sampler has most of it, though less than its logits
    assert declared < weights + 256 * 16384 * 4 * 1.5
    assert peak == pytest.approx(declared, rel=0.05)


def test_a_thousand_rollouts_leak_nothing(tiny_directories: dict[str, Path]) -> None:
    """A leak of one page in four rollouts would be a megabyte."""
    (growth,) = measure(LEAK, tiny_directories["llama"])
    assert growth < 1 << 20
