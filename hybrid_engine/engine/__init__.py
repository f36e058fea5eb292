"""One set of weights, two schedules: the hybrid engine generates with them and trains them."""

from hybrid_engine.engine.hybrid import HybridEngine
from hybrid_engine.engine.partial import PartialRollout, partial_rollout
from hybrid_engine.engine.rollout import Rollout
from hybrid_engine.engine.sampling import SamplingParams
from hybrid_engine.engine.train_engine import TrainEngine

__all__ = [
    "HybridEngine",
    "PartialRollout",
    "Rollout",
    "SamplingParams",
    "TrainEngine",
    "partial_rollout",
]
