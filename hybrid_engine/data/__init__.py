"""Prompts, answers and preferences: from files to the examples of each step."""

from hybrid_engine.data.batches import Batches, rank_share
from hybrid_engine.data.examples import PairExample, PromptExample, SFTExample
from hybrid_engine.data.records import Origin, Record
from hybrid_engine.data.stage import StageData, load_stage

__all__ = [
    "Batches",
    "Origin",
    "PairExample",
    "PromptExample",
    "Record",
    "SFTExample",
    "StageData",
    "load_stage",
    "rank_share",
]
