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

_Visit = tuple[int, int]  # how often the batch had the prompt before, and the prompt's index


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
        self._last: dict[_Visit, list[list[int]]] = {}

    def __call__(self, indices: Sequence[int], iteration: int) -> Rollout:
        """One rollout over all ranks of the prompts `indices`, of which this rank takes its share.

        Iterations count from 1.
        """
        generation = self._config.generation
        visits = _visits(indices)
        mine = local_share(visits)
        rollout = self._cast.actor.generate(
            [self._prompts[index].tokens for _, index in mine],
            SamplingParams(
                n=generation.samples_per_prompt,
                max_new_tokens=generation.max_new_tokens,
                temperature=generation.temperature,
                top_k=generation.top_k,
                top_p=generation.top_p,
                seed=self._run.config.seed,
                stop_token_ids=generation.stop_token_ids,
            ),
            self._sample_ids(visits, iteration),
            on_progress=self._run.reporter.tick,
            expected_lengths=self._expected_lengths(mine),
            drafts=self._drafts(mine) if generation.reuse_responses else None,
        )
        n = generation.samples_per_prompt
        for at, visit in enumerate(mine):
            self._last[visit] = rollout.tokens[at * n : (at + 1) * n]
        return rollout

    def _sample_ids(self, visits: Sequence[_Visit], iteration: int) -> list[int]:
        """Names the random streams by the samples' places in the whole run, or, for them to come
        back, by their prompts. Two ranks never share one, nor do two samples of a rollout.
        """
        n = self._config.generation.samples_per_prompt
        if self._config.generation.reuse_responses:
            streams = [earlier * len(self._prompts) + index for earlier, index in visits]
        else:
            first = iteration * self._config.prompts_per_iteration
            streams = list(range(first, first + len(visits)))
        return [stream * n + k for stream in local_share(streams) for k in range(n)]

    def _expected_lengths(self, mine: Sequence[_Visit]) -> list[float] | None:
        """Mean lengths of the last answers; a new prompt is expected to be like the others."""
        known = {visit: fmean(map(len, self._last[visit])) for visit in mine if visit in self._last}
        if not known:
            return None
        typical = fmean(known.values())
        return [known.get(visit, typical) for visit in mine]

    def _drafts(self, mine: Sequence[_Visit]) -> list[list[int]]:
        nothing: list[list[int]] = [[]] * self._config.generation.samples_per_prompt
        return [draft for visit in mine for draft in self._last.get(visit, nothing)]


def _visits(indices: Sequence[int]) -> list[_Visit]:
    """A batch that straddles two epochs, or is longer than one, repeats prompts."""
    seen: Counter[int] = Counter()
    visits = []
    for index in indices:
        visits.append((seen[index], index))
        seen[index] += 1
    return visits
