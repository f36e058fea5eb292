"""The rollouts of step 3: which random stream a sample draws from, and what the last answers to its
prompt are good for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import fmean

from hybrid_engine.data import PromptExample
from hybrid_engine.engine.rollout import Rollout
from hybrid_engine.engine.sampling import SamplingParams
from hybrid_engine.run import Run
from hybrid_engine.stages.cast import Cast
from hybrid_engine.stages.loop import local_share


class Rollouts:
    """Samples this rank's answers, and remembers the last ones to each prompt.

    When a prompt comes back in a later epoch, the lengths of its answers say what to start first;
    with ``reuse_responses`` the answers themselves are tried as drafts, for which they must draw
    from the same random stream again. Neither changes a result, so a checkpoint holds none of it.
    """

    def __init__(self, run: Run, cast: Cast, prompts: Sequence[PromptExample]) -> None:
        self._run = run
        self._cast = cast
        self._prompts = prompts
        self._config = run.config.rlhf
        self._last: dict[int, list[list[int]]] = {}

    def __call__(self, indices: Sequence[int], iteration: int) -> Rollout:
        """One rollout over all ranks of the prompts `indices`, of which this rank takes its share.

        Iterations count from 1.
        """
        generation = self._config.generation
        mine = local_share(indices)
        rollout = self._cast.actor.generate(
            [self._prompts[i].tokens for i in mine],
            SamplingParams(
                n=generation.samples_per_prompt,
                max_new_tokens=generation.max_new_tokens,
                temperature=generation.temperature,
                seed=self._run.config.seed,
                stop_token_ids=generation.stop_token_ids,
            ),
            self._sample_ids(indices, iteration),
            on_progress=self._run.reporter.tick,
            expected_lengths=self._expected_lengths(mine),
            drafts=self._drafts(mine) if generation.reuse_responses else None,
        )
        n = generation.samples_per_prompt
        for at, index in enumerate(mine):
            self._last[index] = rollout.tokens[at * n : (at + 1) * n]
        return rollout

    def _sample_ids(self, indices: Sequence[int], iteration: int) -> list[int]:
        """Names the random streams by the samples' places in the whole run, or, for them to come
        back, by their prompts. Two ranks never share one, nor do two samples of a rollout.
        """
        n = self._config.generation.samples_per_prompt
        if self._config.generation.reuse_responses:
            streams = [
                earlier * len(self._prompts) + index for earlier, index in _occurrences(indices)
            ]
        else:
            first = iteration * self._config.prompts_per_iteration
            streams = list(range(first, first + len(indices)))
        return [stream * n + k for stream in local_share(streams) for k in range(n)]

    def _expected_lengths(self, mine: Sequence[int]) -> list[float] | None:
        """Mean lengths of the last answers; a new prompt is expected to be like the others."""
        known = {i: fmean(map(len, self._last[i])) for i in mine if i in self._last}
        if not known:
            return None
        typical = fmean(known.values())
        return [known.get(i, typical) for i in mine]

    def _drafts(self, mine: Sequence[int]) -> list[list[int]]:
        nothing: list[list[int]] = [[]] * self._config.generation.samples_per_prompt
        return [draft for i in mine for draft in self._last.get(i, nothing)]


def _occurrences(indices: Sequence[int]) -> list[tuple[int, int]]:
    """(how often it came before, index): a batch that straddles two epochs may repeat a prompt."""
    seen: Counter[int] = Counter()
    found = []
    for index in indices:
        found.append((seen[index], index))
        seen[index] += 1
    return found
