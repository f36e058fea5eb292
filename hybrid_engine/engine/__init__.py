"""One set of weights, two schedules: the hybrid engine, its generation side and its training side."""

from hybrid_engine.engine.hybrid import HybridEngine
from hybrid_engine.engine.rollout import Rollout
from hybrid_engine.engine.sampling import SamplingParams
from hybrid_engine.engine.train_engine import TrainEngine

__all__ = ["HybridEngine", "Rollout", "SamplingParams", "TrainEngine"]
