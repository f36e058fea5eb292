"""One call of generate(): passes from the scheduler to the device, draws back to the caller.

The host runs ahead. It knows every length, because only an end token can come unforeseen; so it
schedules the next passes while the last ones compute, and hears of an end token some passes late.
What a sample draws meanwhile is dropped. Prompts and preempted samples are a pass of their own
beside the decode step: a row's bits do not depend on the rows around it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hybrid_engine.engine.request import Request
from hybrid_kernels import ops

from .cache import DeviceCache
from .draws import Landing
from .packing import WHOLE_PROMPT, Item, PackedItems, Place, decode_row, decodes, places_of
from .responses import Responses
from .state import DecodeState, upload
from .steps import DecodeSteps, bucket_for
from .walk import Await, LayerWalk

_BEAT = 0.05  # seconds between two reports of progress
_COUNTERS = ("passes", "prefill_passes", "decode_steps", "prefill_tokens", "recomputed_tokens",
             "decode_tokens", "draft_tokens")  # fmt: skip


@dataclass(frozen=True)
class Machinery:
    """What a rollout runs on.

    Attributes:
        native: the native library's module.
        lag: passes whose draws may be unread when the next one is scheduled.
    """

    native: Any
    walk: LayerWalk
    cache: DeviceCache
    state: DecodeState
    steps: DecodeSteps
    await_part: Await
    lag: int


class DeviceRollout:
    """The passes of one request.

    Args:
        responses: without a token yet.
        scheduler: of the native library, with the request's prompts in its queue.
        pool: the scheduler's blocks.
    """

    def __init__(
        self,
        request: Request,
        responses: Responses,
        scheduler: Any,
        pool: Any,
        machinery: Machinery,
    ) -> None:
        self.request, self.responses = request, responses
        self.scheduler, self.pool, self.on = scheduler, pool, machinery
        self.device = machinery.cache.tensor.device
        self.counters = dict.fromkeys(_COUNTERS, 0)
        self._stop_tokens = upload(request.stop_tokens, torch.int64, self.device)
        self._flying: deque[Landing] = deque()
        self._next_beat = 0.0

    def run(self) -> None:
        while not self.scheduler.done:
            items = self.scheduler.next_pass()
            decoding = [item for item in items if decodes(item)]
            others = [item for item in items if not decodes(item)]
            self._count(items)
            taken = self._run_others(others) | self._run_decoding(decoding)
            if not self.request.drafts:
                self._read(self._unread_passes())
            self.scheduler.finish_pass(self._outcomes(items, taken))
            self._report()
        self._read(0)
        self._report(at_the_end=True)

    # Passes. Where the request has drafts, their draws are read at once and come back as
    # {sample: (tokens taken in, all of them the draft's)}: how far a draft held, the scheduler
    # must know.

    def _run_decoding(self, items: Sequence[Item]) -> dict[int, tuple[int, bool]]:
        if not items:
            return {}
        bucket = bucket_for(len(items), self.on.state.batch)
        self.on.steps.prepare(bucket)
        rows = [decode_row(item, self.request) for item in items]
        self.on.state.set_rows(rows)
        hidden = self.on.steps(bucket)[: len(rows)]
        places = [(row.sample, row.drawn) for row in rows]
        return self._draw(hidden, *self.on.state.keys(len(rows)), places)

    def _run_others(self, items: Sequence[Item]) -> dict[int, tuple[int, bool]]:
        """Rows of prompts, of preempted samples and of drafts."""
        if not items:
            return {}
        if any(item.sample != WHOLE_PROMPT for item in items):
            self._read(0)  # what they drew is fed again
        packed = PackedItems()
        for item in items:
            packed.add(item, self._token_at, self.request)
        rows = packed.rows(self.device)
        hidden = self.on.walk.run(rows, self.on.cache.tensor, self.on.await_part)
        if not packed.draws:
            return {}
        keys = [[s, self.request.sample_ids[s], position] for s, position in packed.draws]
        sample, sample_id, position = upload(keys, torch.int64, self.device).t().contiguous()
        hidden = hidden.index_select(0, upload(packed.draw_rows, torch.int64, self.device))
        return self._draw(hidden, sample, sample_id, position, packed.draws)

    def _draw(
        self,
        hidden: Tensor,
        sample: Tensor,
        sample_id: Tensor,
        position: Tensor,
        places: list[Place],
    ) -> dict[int, tuple[int, bool]]:
        rule = self.request.params
        drawn = ops.linear_sample(
            hidden,
            self.on.walk.head,
            rule.temperature,
            rule.top_k,
            rule.top_p,
            rule.seed,
            sample_id,
            position,
        )
        self._flying.append(Landing(places, drawn, self._stop_tokens))
        if self.request.drafts:
            self._read(0)
            self._correct_latest()
            return self.responses.taken
        self.on.state.set_latest(sample, drawn.token)
        return {}

    def _correct_latest(self) -> None:
        """The token that a sample feeds next: of a draft's rows, the last one that was kept."""
        latest = [[sample, self.responses.latest(sample)] for sample in self.responses.taken]
        samples, tokens = upload(latest, torch.int64, self.device).t().contiguous()
        self.on.state.set_latest(samples, tokens)

    def _token_at(self, item: Item, place: int) -> int:
        prompt = self.request.prompts[item.prompt]
        if place < len(prompt):
            return prompt[place]
        return self.responses.token(item.sample, place - len(prompt))

    # Results

    def _unread_passes(self) -> int:
        """Where blocks are short, none: nobody is preempted for a sample that has ended."""
        return self.on.lag if self.pool.available >= self.scheduler.slots_taken else 0

    def _read(self, unread: int) -> None:
        """Takes in draws until at most ``unread`` passes' are on their way."""
        while len(self._flying) > unread:
            self.responses.take(self._flying.popleft().read())

    def _outcomes(self, items: Sequence[Item], taken: dict[int, tuple[int, bool]]) -> list[Any]:
        """For every sample that drew. Without drafts that was one token each."""
        outcomes = []
        for item in items:
            last = dict(places_of(item, self.request))
            for sample, position in last.items():
                tokens, on_draft = taken.get(sample, (1, False))
                ended = self.responses.ended(sample, position + 1)
                outcomes.append(self.on.native.Outcome(tokens, ended, on_draft))
        return outcomes

    def _count(self, items: Sequence[Item]) -> None:
        """As the C++ program does: rows of prompts, computed again, decoded, and of drafts."""
        decoding = drafts = prompts = recomputed = rows = 0
        for item in items:
            first = item.rows - item.recomputed
            rows += item.rows
            recomputed += item.recomputed
            if item.sample == WHOLE_PROMPT:
                prompts += first
            elif first:
                decoding += 1
                drafts += first - 1
        counted = (1, decoding < rows, decoding > 0, prompts, recomputed, decoding, drafts)
        for name, count in zip(_COUNTERS, counted, strict=True):
            self.counters[name] += count

    def _report(self, at_the_end: bool = False) -> None:
        on_progress, now = self.request.on_progress, time.monotonic()
        if on_progress is None or (now < self._next_beat and not at_the_end):
            return
        on_progress(self.responses.done, len(self.responses), self.responses.tokens)
        self._next_beat = now + _BEAT
