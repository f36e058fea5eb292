"""What a phase holds, declared: a name, bytes at the moments when it is there, and the knob that
turns it.

A phase (`generate`, `score`, `train`, ...) is as large as the largest of its moments: activations
are fullest when the backward pass begins, gradients when it ends. Moments are named
``phase.moment``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

ALWAYS = "*"  # at every moment of the step but those of loading
LOAD = "load"
PHASES = (LOAD, "evaluate", "generate", "score", "train")


@dataclass(frozen=True)
class Holding:
    """One thing that takes memory on a rank.

    Attributes:
        name: as messages call it.
        at: bytes by moment; those under `ALWAYS` are there at every other moment.
        knobs: settings that make it smaller, by dotted name.
        longest: it grows with the rows' lengths, so the bytes are those of the longest rows that
            the settings allow.
        host: in the host's memory even where models are on a GPU.
    """

    name: str
    at: Mapping[str, int]
    knobs: tuple[str, ...] = ()
    longest: bool = False
    host: bool = False

    def bytes_at(self, moment: str) -> int:
        default = 0 if moment.startswith(LOAD) else self.at.get(ALWAYS, 0)
        return self.at.get(moment, default)


def always(name: str, nbytes: int, *knobs: str, host: bool = False) -> Holding:
    """Something that the step holds all along."""
    return Holding(name, {ALWAYS: nbytes}, knobs, host=host)


@dataclass(frozen=True)
class StepPlan:
    """All that one step holds on one rank.

    Attributes:
        step: "sft", "reward" or "rlhf".
        baseline: bytes of the process itself: interpreter, libraries, what was there before.
    """

    step: str
    baseline: int
    holdings: tuple[Holding, ...]

    @property
    def phases(self) -> list[str]:
        """In the order of the run."""
        there = {moment.partition(".")[0] for holding in self.holdings for moment in holding.at}
        return [phase for phase in PHASES if phase in there]

    def peak(self, phase: str) -> int:
        """Bytes at the largest moment of a phase, the baseline included."""
        return self._total(self.moment(phase), self.holdings)

    def certain(self, phase: str) -> int:
        """Of the same phase, what is there however short the rows are."""
        holdings = [holding for holding in self.holdings if not holding.longest]
        return max(self._total(moment, holdings) for moment in self._moments(phase))

    def moment(self, phase: str) -> str:
        """The largest moment of a phase."""
        return max(self._moments(phase), key=lambda moment: self._total(moment, self.holdings))

    def top(self, phase: str, count: int = 4) -> list[tuple[Holding, int]]:
        """The largest holders at the largest moment of a phase, with their bytes."""
        moment = self.moment(phase)
        sizes = [(holding, holding.bytes_at(moment)) for holding in self.holdings]
        return sorted((s for s in sizes if s[1]), key=lambda size: -size[1])[:count]

    def _moments(self, phase: str) -> list[str]:
        names = dict.fromkeys(moment for holding in self.holdings for moment in holding.at)
        return [name for name in names if name.partition(".")[0] == phase]

    def _total(self, moment: str, holdings: Iterable[Holding]) -> int:
        return self.baseline + sum(holding.bytes_at(moment) for holding in holdings)


def gigabytes(nbytes: float) -> str:
    """ "1.53 GB", with 10^9 bytes."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes < 99.5e9 else f"{nbytes / 1e9:.0f} GB"
