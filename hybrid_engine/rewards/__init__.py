"""Who scores answers: in training a weighted mix of rewards, afterwards a judge that training never
saw.
"""

from hybrid_engine.rewards.judges import build_judge
from hybrid_engine.rewards.mix import RewardMix, RewardScores, build_rewards
from hybrid_engine.rewards.sample import Sample

__all__ = ["RewardMix", "RewardScores", "Sample", "build_judge", "build_rewards"]
