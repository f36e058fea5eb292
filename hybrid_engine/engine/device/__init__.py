"""Generation on a GPU: the layer walk over the kernel library's operators, one CUDA graph a bucket.

The C++ program runs on the CPU. This one has its scheduler, and calls the same operators in the
same order, so on the CPU both give the same tokens and the same bits.
"""

from hybrid_engine.engine.gather import GatheredWeights
from hybrid_engine.engine.program import NativeGenerator
from hybrid_engine.engine.weights import OwnWeights
from hybrid_engine.models import CausalLM

from .generator import DeviceGenerator

__all__ = ["DeviceGenerator", "generator_for"]


def generator_for(
    model: CausalLM, weights: OwnWeights | GatheredWeights, keeps_cache: bool = False
) -> NativeGenerator | DeviceGenerator:
    """What generates where a model's parameters are: the C++ program on the CPU, else this one,
    whose cache goes with its recorded steps.
    """
    if next(model.parameters()).device.type == "cpu":
        return NativeGenerator(model, weights, keeps_cache=keeps_cache)
    return DeviceGenerator(model, weights)
